"""The client's side of one session: connection, control page, segments, calls.

Owns the descriptors and mappings of one (job, rank). Thread-safe: calls come from the training thread (start-up,
restore, waits) and from the control thread (reconnection, new segments); `_lock` guards the connection.
It must not know what a snapshot consists of.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from snapd_native import ControlPage, Mapping
from snapd_proto import format_pb2
from snapd_proto import trainer_pb2 as pb

from . import handshake, locate
from .errors import ProtocolError, SnapdError, UnavailableError, from_daemon

if TYPE_CHECKING:
    import grpc
    from snapd_proto.trainer_pb2_grpc import TrainerStub

PROTOCOL_VERSION = 1
CALL_TIMEOUT_S = 60.0
ERROR_KEY = "snapd-error-bin"  # trailing metadata: a serialized Refusal
_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardMemory:
    """Where the segments that a snapshot's shards lie in are mapped, by (rank, segment).

    Segments of this session are read where they are mapped already (mapping 1 GB anew costs more page faults than
    its copy takes); all others are mapped read-only, for as long as this lives.
    """

    mappings: dict[tuple[int, int], Mapping]
    borrowed: set[tuple[int, int]]

    def borrow(self, rank: int, segments: dict[int, Mapping]) -> None:
        """What the session itself has mapped, and keeps."""
        for number, mapping in segments.items():
            if (rank, number) not in self.mappings:
                self.mappings[rank, number] = mapping
                self.borrowed.add((rank, number))

    def close(self) -> None:
        for key, mapping in self.mappings.items():
            if key not in self.borrowed:
                mapping.close()


class Session:
    """One (job, rank, generation) at the daemon."""

    def __init__(self, sockets: locate.Sockets, software_version: str) -> None:
        self.sockets = sockets
        self.software_version = software_version
        self.session_id = 0
        self.generation = 0
        self.chunk_bytes = 0
        self.rank = 0
        self.reply = pb.OpenSessionReply()
        self.page: ControlPage | None = None
        self.wake_fd = -1
        self.segments: dict[int, Mapping] = {}
        self.is_connected = False
        self.reconnect_count = 0
        self._segments_version = -1
        self._pin: Callable[[int, int], None] | None = None
        self._secret = b""
        self._token = ""
        self.may_start_daemon = False  # the one that was there last had been started by a trainer
        self._connection: socket.socket | None = None
        self._channel: grpc.Channel | None = None
        self._lock = threading.RLock()

    # --- opening ------------------------------------------------------------------------------------------------
    def open(self, request: pb.OpenSessionRequest) -> pb.OpenSessionReply:
        """Connect (starting a per-user daemon if none answers and none is configured) and open the session.

        Raises:
            SnapdError: by kind; nothing is left behind.
        """
        try:
            self._greet(locate.connect_or_start(self.sockets))
            self.reply = self.call(
                lambda stub, **options: stub.OpenSession(request, **options), timeout_s=300.0
            )
            self.rank = request.rank
            self.session_id, self._secret = self.reply.session_id, self.reply.session_secret
            self.generation, self.chunk_bytes = self.reply.generation, self.reply.chunk_bytes
            self.refresh_segments()
            self._want_first_grant(request.state_bytes_estimate)
        except SnapdError:
            self.disconnect()
            raise
        return self.reply

    def _want_first_grant(self, state_bytes: int) -> None:
        """Have the first lane granted before the first snapshot asks for it; what it lacks is added then."""
        page = self.page
        if page is not None:
            page.store("wanted_frames", min(page.entry_capacity, max(1, state_bytes // self.chunk_bytes)))
            os.eventfd_write(self.wake_fd, 1)

    def _greet(self, connection: socket.socket) -> None:
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            software_version=self.software_version,
            role=pb.PEER_ROLE_TRAINER,
            session_id=self.session_id,
            session_secret=self._secret,
        )
        try:
            reply, _ = handshake.exchange(connection, pb.HandshakeRequest(hello=hello))
        except SnapdError:
            connection.close()
            raise
        if not reply.HasField("welcome"):
            connection.close()
            raise ProtocolError("the daemon did not answer the greeting", socket=self.sockets.handshake)
        with self._lock:
            self._close_connection()
            self._connection, self._token = connection, reply.welcome.token
            self.may_start_daemon = reply.welcome.is_embedded and not self.sockets.is_configured
            self.is_connected = True

    def reconnect(self) -> None:
        """Greet a restarted daemon again and take up the session there.

        Raises:
            UnavailableError: not yet.
            SnapdError: it does not know the session any more.
        """
        self._greet(locate.connect(self.sockets, timeout_s=5.0))
        self._segments_version = -1
        self.refresh_segments()
        self.reconnect_count += 1

    def connection_fileno(self) -> int:
        with self._lock:
            return self._connection.fileno() if self._connection is not None else -1

    # --- segments -----------------------------------------------------------------------------------------------
    def refresh_segments(self) -> None:
        """Map what the daemon has added since; the control page and the wake descriptor on the first time."""
        with self._lock:
            if self._connection is None:
                raise UnavailableError("the daemon is away", socket=self.sockets.handshake)
            request = pb.FetchSegments(session_id=self.session_id, session_secret=self._secret)
            reply, descriptors = handshake.exchange(
                self._connection, pb.HandshakeRequest(fetch_segments=request)
            )
            try:
                self._take(reply, descriptors)
            finally:
                handshake.close_all(descriptors)

    def _take(self, reply: pb.HandshakeReply, descriptors: list[int]) -> None:
        infos = reply.descriptors.segments
        if len(descriptors) != len(infos) + 2:
            raise ProtocolError(
                "the daemon passed another number of descriptors than it named", got=len(descriptors)
            )
        if self.page is None:
            self.page = ControlPage.attach(descriptors[0])
        version = self.page.load("segments_version")
        if self.wake_fd < 0:
            self.wake_fd = os.dup(descriptors[1])
            os.set_inheritable(self.wake_fd, False)
        else:  # in place: another thread may be about to write to it
            os.dup2(descriptors[1], self.wake_fd, inheritable=False)
        for info, descriptor in zip(infos, descriptors[2:], strict=True):
            if info.segment not in self.segments:
                mapping = Mapping(descriptor, info.nbytes, True)
                if self._pin is not None:
                    self._pin(mapping.address, mapping.nbytes)
                self.segments[info.segment] = mapping  # from here on lanes in it may be used
        self._segments_version = version

    def pin_with(self, pin: Callable[[int, int], None] | None) -> None:
        """Have `pin(address, nbytes)` called for each segment: those that are mapped, and new ones before their use."""
        with self._lock:
            self._pin = pin
            if pin is not None:
                for mapping in self.segments.values():
                    pin(mapping.address, mapping.nbytes)

    def has_new_segments(self) -> bool:
        return self.page is not None and self.page.load("segments_version") != self._segments_version

    def populate(self) -> None:
        """Fill this process's page tables for the arena, so that the first copies take no faults. Best effort."""
        for mapping in list(self.segments.values()):
            with contextlib.suppress(OSError):
                mapping.populate()

    @contextlib.contextmanager
    def shard_memory(
        self, job: str, generation: int, step: int, shards: Sequence[format_pb2.ShardRecord]
    ) -> Iterator[ShardMemory]:
        """Map what these shards lie in, for the time of a restore."""
        memory = ShardMemory({}, set())
        memory.borrow(self.rank, self.segments)
        try:
            for record in shards:
                if any((chunk.segment_rank, chunk.segment) not in memory.mappings for chunk in record.chunks):
                    self.map_shard(memory, job, generation, step, record.rank)
            yield memory
        finally:
            memory.close()

    def map_shard(
        self,
        memory: ShardMemory,
        job: str,
        generation: int,
        step: int,
        rank: int,
        *,
        is_fetched: bool = False,
    ) -> None:
        """Map what the shard of `rank` lies in, for reading. `is_fetched`: and what was brought into that rank's arena
        for the restore under way.
        """
        request = pb.FetchShard(job=job, generation=generation, step=step, rank=rank, fetched=is_fetched)
        with self._lock:
            if self._connection is None:
                raise UnavailableError("the daemon is away", socket=self.sockets.handshake)
            reply, descriptors = handshake.exchange(
                self._connection, pb.HandshakeRequest(fetch_shard=request)
            )
        try:
            infos = reply.descriptors.segments
            if len(infos) != len(descriptors):
                raise ProtocolError("the daemon passed another number of descriptors than it named")
            for info, descriptor in zip(infos, descriptors, strict=True):
                key = (info.rank, info.segment)
                if key not in memory.mappings:
                    memory.mappings[key] = Mapping(descriptor, info.nbytes, False)
        finally:
            handshake.close_all(descriptors)

    # --- calls --------------------------------------------------------------------------------------------------
    def call(self, invoke: Callable[..., _T], *, timeout_s: float = CALL_TIMEOUT_S) -> _T:
        """`invoke(stub, timeout=..., metadata=...)`; gRPC's errors become ours.

        Raises:
            UnavailableError, FencedError, CapacityError, ...: as the daemon says.
        """
        import grpc

        try:
            return invoke(self._stub(), timeout=timeout_s, metadata=(("snapd-token", self._token),))
        except grpc.RpcError as error:
            raise _translate(error) from error

    def _stub(self) -> TrainerStub:
        import grpc
        from snapd_proto.trainer_pb2_grpc import TrainerStub

        with self._lock:
            if self._channel is None:
                options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 256 << 20)]
                self._channel = grpc.insecure_channel(f"unix:{self.sockets.grpc}", options=options)
            return TrainerStub(self._channel)

    # --- closing ------------------------------------------------------------------------------------------------
    def mark_lost(self) -> None:
        """The daemon's end of the connection is gone."""
        with self._lock:
            self.is_connected = False
            self._close_connection()
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def disconnect(self) -> None:
        """Give everything back; snapshots stay with the daemon. Idempotent."""
        self.mark_lost()
        with self._lock:
            for mapping in self.segments.values():
                mapping.close()
            self.segments.clear()
            if self.page is not None:
                self.page.close()
                self.page = None
            if self.wake_fd >= 0:
                os.close(self.wake_fd)
                self.wake_fd = -1

    def abandon_in_child(self) -> None:
        """In a forked child: close the sockets that would keep the session alive; touch nothing else.

        The mappings are not there (MADV_DONTFORK); locks may be held by threads that do not exist here.
        """
        if self._connection is not None:
            with contextlib.suppress(OSError):
                os.close(self._connection.detach())
        if self.wake_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.wake_fd)
        self.is_connected = False

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _translate(error: grpc.RpcError) -> SnapdError:
    """The daemon's own words if it sent any (trailing metadata), else what gRPC says."""
    import grpc

    call: Any = error
    if not isinstance(call, grpc.Call):
        return UnavailableError("the daemon did not answer a call", cause=error)
    sent = dict(call.trailing_metadata() or ()).get(ERROR_KEY)
    if isinstance(sent, bytes):
        words = pb.Refusal.FromString(sent)
        return from_daemon(words.kind, words.message, words.hint, status=call.code().name)
    return UnavailableError("the daemon did not answer a call", code=call.code().name, details=call.details())
