"""A trainer without torch: it speaks the handshake, the calls and the control page directly.

In a test's own process it is the class `FakeTrainer`. As a program (`python fake_trainer.py RUNTIME_DIR`) it
obeys one JSON command a line on standard input and answers each with one line, so that a test can kill or
stop it in any state: {"do": "open", "job": "a", "rank": 0, ...} calls `FakeTrainer.open(job="a", rank=0,
...)`, and so on.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import snapd_native as native
import xxhash
from snapd_proto import format_pb2, trainer_pb2, trainer_pb2_grpc

TIMEOUT_S = 20.0


class Refused(Exception):
    """The daemon said no."""

    def __init__(self, refusal: trainer_pb2.Refusal, code: grpc.StatusCode | None = None) -> None:
        super().__init__(f"{refusal.kind}: {refusal.message} ({refusal.hint})")
        self.kind = refusal.kind
        self.message = refusal.message
        self.hint = refusal.hint
        self.code = code


@dataclass
class Handshake:
    """One connection to the handshake socket."""

    path: Path
    role: int = trainer_pb2.PEER_ROLE_TRAINER
    connection: socket.socket = field(init=False)
    welcome: trainer_pb2.Welcome = field(init=False)

    def connect(self, session_id: int = 0, secret: bytes = b"") -> Handshake:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(TIMEOUT_S)
        self.connection.connect(str(self.path))
        hello = trainer_pb2.Hello(
            protocol_version=1,
            software_version="test",
            role=self.role,
            session_id=session_id,
            session_secret=secret,
        )
        reply, _ = self.ask(trainer_pb2.HandshakeRequest(hello=hello))
        self.welcome = reply.welcome
        return self

    def ask(self, request: trainer_pb2.HandshakeRequest) -> tuple[trainer_pb2.HandshakeReply, list[int]]:
        body = request.SerializeToString()
        self.connection.sendall(len(body).to_bytes(4, "little") + body)
        return self.receive()

    def receive(self) -> tuple[trainer_pb2.HandshakeReply, list[int]]:
        data, descriptors = b"", array.array("i")
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            piece, ancillary, _, _ = self.connection.recvmsg(1 << 20, socket.CMSG_SPACE(253 * 4))
            if not piece:
                raise ConnectionError("the daemon closed the connection")
            data += piece
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        reply = trainer_pb2.HandshakeReply.FromString(data[4:])
        if reply.WhichOneof("kind") == "refusal":
            raise Refused(reply.refusal)
        return reply, list(descriptors)

    def close(self) -> None:
        self.connection.close()


class FakeTrainer:
    """One session of one (job, rank)."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = Path(runtime)
        self.handshake: Handshake | None = None
        self.channel: grpc.Channel | None = None
        self.page: native.ControlPage | None = None
        self.wake_fd = -1
        self.segments: dict[int, native.Mapping] = {}
        self.session = trainer_pb2.OpenSessionReply()
        self.job = ""
        self.rank = 0
        self.world_size = 1
        self.sequence = 0
        self.lane = -1
        self.entries: list[tuple[int, int, int, int]] = []
        self.segments_seen = 0
        self.check: Callable[[], None] = lambda: None  # called while waiting: a test may raise

    # calls

    def shake_hands(self, *, is_again: bool = False) -> None:
        self.handshake = Handshake(self.runtime / "handshake.sock")
        if is_again:
            self.handshake.connect(self.session.session_id, self.session.session_secret)
        else:
            self.handshake.connect()
        if self.channel is not None:
            self.channel.close()
        self.channel = grpc.insecure_channel(
            f"unix:{self.runtime / 'snapd.sock'}", options=[("grpc.max_receive_message_length", 64 << 20)]
        )

    def call(self, name: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        assert self.channel is not None and self.handshake is not None
        stub = trainer_pb2_grpc.TrainerStub(self.channel)
        metadata = (("snapd-token", self.handshake.welcome.token),)
        try:
            return getattr(stub, name)(request, timeout=timeout_s, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            for key, value in error.trailing_metadata() or ():
                if key == "snapd-error-bin":
                    raise Refused(trainer_pb2.Refusal.FromString(value), error.code()) from None
            raise

    def open(
        self, *, job: str, rank: int = 0, world_size: int = 1, incarnation: str = "one", **more: Any
    ) -> int:
        """Shake hands, open a session, map everything. Returns the generation."""
        if self.handshake is None:
            self.shake_hands()
        self.job, self.rank, self.world_size = job, rank, world_size
        request = trainer_pb2.OpenSessionRequest(
            job=job,
            incarnation=incarnation,
            rank=rank,
            world_size=world_size,
            local_rank=more.pop("local_rank", rank),
            local_world_size=more.pop("local_world_size", world_size),
            pid=os.getpid(),
            **more,
        )
        self.session = self.call("OpenSession", request)
        self.fetch()
        return self.session.generation

    def fetch(self) -> None:
        """Map the page and all segments."""
        assert self.handshake is not None
        request = trainer_pb2.FetchSegments(
            session_id=self.session.session_id, session_secret=self.session.session_secret
        )
        reply, descriptors = self.handshake.ask(trainer_pb2.HandshakeRequest(fetch_segments=request))
        page_fd, wake_fd, *segment_fds = descriptors
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
        self.wake_fd = wake_fd
        self.page = native.ControlPage.attach(page_fd)
        for info, descriptor in zip(reply.descriptors.segments, segment_fds, strict=True):
            if info.segment not in self.segments:
                self.segments[info.segment] = native.Mapping(descriptor, info.nbytes, True)
        for descriptor in (page_fd, *segment_fds):
            os.close(descriptor)
        self.segments_seen = self.page.load("segments_version")

    def reconnect(self) -> None:
        """After the daemon was restarted."""
        self.shake_hands(is_again=True)
        self.fetch()

    # capturing, in the steps in which a trainer can be killed

    def want(self, frames: int) -> None:
        assert self.page is not None
        self.page.store("wanted_frames", frames)
        self.wake()

    def wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    def take_lane(self, frames: int, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for a lane granted with at least `frames`; returns it."""
        assert self.page is not None
        self.want(frames)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for lane in range(self.page.lane_count):
                if (
                    self.page.lane_state(lane) == native.LANE_GRANTED
                    and self.page.lane_load(lane, "grant_count") >= frames
                ):
                    if self.page.load("segments_version") != self.segments_seen:
                        self.fetch()
                    self.lane = lane
                    return lane
            self.check()
            time.sleep(0.002)
        raise TimeoutError(f"no lane of {frames} frames was granted")

    def open_lane(self, step: int, seed: int = 0, chunk_count: int = 6, is_reusing_last: bool = False) -> int:
        """GRANTED -> OPEN with the table of a shard of `chunk_count` chunks; nothing is copied yet."""
        assert self.page is not None
        page = self.page
        base = page.read_entries(self.lane) if is_reusing_last else None
        page.store("step_seen_plus_one", step + 1)
        self.take_lane(chunk_count)
        segments, frames = (numbers[:chunk_count] for numbers in page.read_grant(self.lane))
        chunk_bytes = page.chunk_bytes
        sizes = [len(data) for data in self.chunks(step, seed, chunk_count)]
        flags = [0] * chunk_count
        if base is not None:  # the last chunk is where the daemon said that the last shard has it
            segments[-1], frames[-1], flags[-1] = base[0][-1], base[1][-1], native.ENTRY_REUSED
        self.entries = list(zip(segments, frames, sizes, flags, strict=True))
        page.write_entries(self.lane, segments, frames, sizes, flags)
        self.sequence += 1
        layout_nbytes = sizes[0]
        for name, value in {
            "sequence": self.sequence,
            "generation": page.load("generation"),
            "step": step,
            "layout_nbytes": layout_nbytes,
            "early_values_offset": chunk_bytes,
            "early_values_nbytes": sizes[1],
            "handed_over_ns": time.monotonic_ns(),
        }.items():
            page.lane_store(self.lane, name, value)
        if not page.set_lane_state(self.lane, native.LANE_GRANTED, native.LANE_OPEN):
            raise RuntimeError("the lane was taken back")
        return self.lane

    def write(self, step: int, seed: int = 0, chunk_count: int = 6) -> None:
        """Copy every byte of the shard into the open lane."""
        assert self.page is not None
        contents = self.chunks(step, seed, chunk_count)
        for (segment, frame, nbytes, flags), data in zip(self.entries, contents, strict=False):
            if not flags:
                self.segments[segment].view(frame * self.page.chunk_bytes, nbytes)[:] = data

    def commit(self) -> bool:
        assert self.page is not None
        self.page.lane_store(self.lane, "copied_ns", time.monotonic_ns())
        return self.page.commit(self.lane, self.wake_fd)

    def discard(self, reason: int = 1) -> bool:
        assert self.page is not None
        self.page.lane_store(self.lane, "discard_reason", reason)
        done = self.page.set_lane_state(self.lane, native.LANE_OPEN, native.LANE_DISCARDED)
        self.wake()
        return done

    def capture(
        self,
        step: int,
        seed: int = 0,
        chunk_count: int = 6,
        is_waiting: bool = True,
        is_reusing_last: bool = False,
    ) -> None:
        """A whole snapshot of this rank, up to `captured`."""
        self.open_lane(step, seed, chunk_count, is_reusing_last)
        self.write(step, seed, chunk_count)
        if not self.commit():
            raise RuntimeError("the lane was not open")
        if is_waiting:
            self.wait_captured(step)

    def wait_captured(self, step: int, timeout_s: float = TIMEOUT_S) -> None:
        self._wait_word("captured_step_plus_one", step + 1, timeout_s)

    def wait_complete(self, step: int, timeout_s: float = TIMEOUT_S) -> None:
        self._wait_word("complete_step_plus_one", step + 1, timeout_s)

    def _wait_word(self, word: str, value: int, timeout_s: float) -> None:
        assert self.page is not None
        deadline = time.monotonic() + timeout_s
        while self.page.load(word) < value:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{word} is {self.page.load(word)}, not {value}")
            time.sleep(0.002)

    def wait_durable(self, step: int, timeout_s: float = TIMEOUT_S) -> trainer_pb2.WaitLevelReply:
        """Ask for it, and wait until it is, or the time is over."""
        request = trainer_pb2.WaitLevelRequest(
            session_id=self.session.session_id,
            step=step,
            level=trainer_pb2.LEVEL_DURABLE,
            timeout_s=timeout_s,
        )
        return self.call("WaitLevel", request, timeout_s + TIMEOUT_S)

    def skip(self, step: int) -> None:
        """What a client does that found no lane within wait_max."""
        assert self.page is not None
        self.page.store("step_seen_plus_one", step + 1)
        self.page.store("skipped_step_plus_one", step + 1)
        self.page.add("skipped_count", 1)
        self.wake()

    # the state: a pure function of (job, rank, step, seed)

    def layout(self) -> bytes:
        assert self.page is not None
        return format_pb2.ShardLayout(
            format_version=1,
            job=self.job,
            rank=self.rank,
            world_size=self.world_size,
            chunk_bytes=self.page.chunk_bytes,
            client_version="fake",
        ).SerializeToString()

    def chunks(self, step: int, seed: int, chunk_count: int) -> list[bytes]:
        """Layout, early values, then chunks of which the last is frozen (the same at every step)."""
        assert self.page is not None
        early = format_pb2.EarlyValues(generation=self.page.load("generation"), step=step).SerializeToString()
        found = [self.layout(), early]
        for index in range(2, chunk_count):
            number = 0 if index == chunk_count - 1 else step
            found.append(content(self.page.chunk_bytes, self.job, self.rank, number, seed, index))
        return found

    # restoring

    def plan(self, round: int = 0, step: int | None = None) -> trainer_pb2.PlanRestoreReply:
        request = trainer_pb2.PlanRestoreRequest(session_id=self.session.session_id, round=round)
        if step is not None:
            request.has_step, request.step = True, step
        return self.call("PlanRestore", request)

    def read(self, record: format_pb2.ShardRecord) -> tuple[list[bytes], list[int]]:
        """All chunks of a shard through read-only descriptors; and the indexes of bad ones."""
        assert self.handshake is not None
        request = trainer_pb2.FetchShard(
            job=record.job, generation=record.generation, step=record.step, rank=record.rank
        )
        reply, descriptors = self.handshake.ask(trainer_pb2.HandshakeRequest(fetch_shard=request))
        found: list[bytes] = []
        by_number = {i.segment: fd for i, fd in zip(reply.descriptors.segments, descriptors, strict=True)}
        for chunk in record.chunks:
            found.append(os.pread(by_number[chunk.segment], chunk.nbytes, chunk.frame * record.chunk_bytes))
        for descriptor in descriptors:
            os.close(descriptor)
        bad = [
            index
            for index, (chunk, data) in enumerate(zip(record.chunks, found, strict=True))
            if xxhash.xxh3_128_digest(data) != chunk.xxh3_128
        ]
        return found, bad

    def finish(
        self, round: int = 0, succeeded: bool = True, bad: list[int] | None = None, failure: str = ""
    ) -> trainer_pb2.FinishRestoreReply:
        request = trainer_pb2.FinishRestoreRequest(
            session_id=self.session.session_id,
            round=round,
            succeeded=succeeded,
            failure=failure,
            bad_chunks=[
                trainer_pb2.BadChunk(rank=self.rank, chunk_index=i, what="hash differs") for i in bad or []
            ],
        )
        return self.call("FinishRestore", request)

    def restore(self, seed: int = 0, chunk_count: int = 6) -> int:
        """Plan, read, compare with what was captured, finish. Returns the step, -1 if there is none."""
        plan = self.plan()
        if plan.outcome == trainer_pb2.PlanRestoreReply.ABSENT:
            return -1
        if plan.outcome != trainer_pb2.PlanRestoreReply.FOUND:
            raise RuntimeError(f"not restorable: {plan.reason}")
        record = plan.shards[0]
        found, bad = self.read(record)
        if bad:
            raise RuntimeError(f"bad chunks {bad}")
        for index in range(2, chunk_count):
            number = 0 if index == chunk_count - 1 else plan.step
            if found[index] != content(record.chunk_bytes, self.job, self.rank, number, seed, index):
                raise RuntimeError(f"chunk {index} of step {plan.step} has other bytes")
        if not self.finish().committed:
            raise RuntimeError("not committed")
        return plan.step

    def rollback(self, count: int) -> int:
        request = trainer_pb2.BeginRollbackRequest(session_id=self.session.session_id, rollback_count=count)
        return self.call("BeginRollback", request).generation

    def close(self, final: bool = False) -> None:
        self.call(
            "CloseSession", trainer_pb2.CloseSessionRequest(session_id=self.session.session_id, final=final)
        )

    def word(self, name: str) -> int:
        assert self.page is not None
        return self.page.load(name)

    def lane_states(self) -> list[int]:
        assert self.page is not None
        return [self.page.lane_state(lane) for lane in range(self.page.lane_count)]

    def disconnect(self) -> None:
        """Drop connections without closing the session."""
        if self.handshake is not None:
            self.handshake.close()
            self.handshake = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None


def content(nbytes: int, job: str, rank: int, step: int, seed: int, index: int) -> bytes:
    """The bytes of a chunk: cheap to make, different for every argument."""
    word = xxhash.xxh3_128_digest(f"{job}/{rank}/{step}/{seed}/{index}".encode())
    return word * (nbytes // len(word))


def _answers(trainer: FakeTrainer) -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "exit":
            return
        try:
            result = getattr(trainer, name)(**command)
            yield {
                "ok": True,
                "result": result if isinstance(result, (int, bool, list, type(None))) else str(result),
            }
        except Refused as error:
            yield {"ok": False, "kind": error.kind, "message": error.message, "hint": error.hint}
        except (RuntimeError, TimeoutError, OSError, ValueError) as error:
            yield {"ok": False, "kind": type(error).__name__, "message": str(error)}


def main() -> None:
    for answer in _answers(FakeTrainer(Path(sys.argv[1]))):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
