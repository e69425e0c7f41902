"""The command line's way to the daemon of this machine: handshake socket, then gRPC on the other one.

Owns the connection and every descriptor that came over it until `close`. Not thread-safe.
The daemon keeps what the descriptors of a shard point at for as long as this connection lives.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.message import DecodeError
from snapd_proto import admin_pb2, trainer_pb2
from snapd_proto.admin_pb2_grpc import AdminStub

import snapd
from snapd.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    JobUnusable,
    NotFoundError,
    RemoteProtocolError,
    SnapdError,
    UnavailableError,
)
from snapd.rpc.status import error_of

PROTOCOL_VERSION = 1
MESSAGE_BYTES_MAX = 1 << 20
REPLY_BYTES_MAX = 256 << 20  # a record of 100 GB in 4 MiB chunks has about 1 MB
DESCRIPTORS_MAX = 250  # the kernel passes at most 253 in one message (SCM_MAX_FD)
CALL_TIMEOUT_S = 30.0
_LENGTH = struct.Struct("<I")
_T = TypeVar("_T")
_CLASS_BY_KIND: dict[str, type[SnapdError]] = {
    **dict.fromkeys(("not_found", "job", "shard", "snapshot", "session"), NotFoundError),
    **dict.fromkeys(("auth", "user", "token", "secret", "role"), AuthError),
    **dict.fromkeys(("remote_protocol", "handshake", "protocol_version", "descriptors"), RemoteProtocolError),
    **dict.fromkeys(("capacity", "connections"), CapacityError),
    "job_unusable": JobUnusable,
}
_HOW_TO_START = "start one with `snapd serve`, or name its folder with --runtime-dir or SNAPD_RUNTIME_DIR"


class LocalClient:
    """A connection with the rights of the user who owns the daemon."""

    def __init__(self, runtime_dir: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.runtime_dir = runtime_dir
        self._timeout_s = timeout_s
        self._connection: socket.socket | None = None
        self._channel: grpc.Channel | None = None
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._descriptors: dict[tuple[int, int], int] = {}
        self.welcome = trainer_pb2.Welcome()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Greet the daemon.

        Raises:
            UnavailableError: nobody answers at the socket, or not in time.
            ConfigError: the folder belongs to another user or is open to others.
            AuthError: the daemon is another user's.
            RemoteProtocolError: who answers is not this version of snapd.
        """
        path = self.runtime_dir / "handshake.sock"
        check_folder(self.runtime_dir)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(self._timeout_s)
        self._connection = connection
        try:
            connection.connect(str(path))
        except OSError as error:
            self.close()
            what = f"no snapd daemon answers at {path}: {error.strerror or error}"
            raise UnavailableError(what, hint=_HOW_TO_START) from error
        hello = trainer_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            software_version=snapd.__version__,
            role=trainer_pb2.PEER_ROLE_ADMIN,
        )
        try:
            reply, descriptors = self._exchange(trainer_pb2.HandshakeRequest(hello=hello))
            _close_all(descriptors)
            if not reply.HasField("welcome"):
                raise RemoteProtocolError(f"{path} did not answer the greeting", hint="is it a snapd daemon?")
        except SnapdError:
            self.close()
            raise
        self.welcome = reply.welcome
        self._metadata = (("snapd-token", reply.welcome.token),)

    def close(self) -> None:
        """End the connection and close every descriptor. Idempotent."""
        _close_all(list(self._descriptors.values()))
        self._descriptors.clear()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- questions -----------------------------------------------------------------------------------------
    def status(self, job: str = "", *, ask_peers: bool = False) -> admin_pb2.StatusReply:
        """What the daemon holds and serves, of one job or (empty) of all; `ask_peers`: and what the other nodes of its
        cluster say of themselves. Raises SnapdError.
        """
        request = admin_pb2.StatusRequest(job=job, ask_peers=ask_peers)
        return self._call(lambda stub: stub.Status(request, timeout=self._timeout_s, metadata=self._metadata))

    def list_snapshots(self, job: str = "") -> list[admin_pb2.SnapshotSummary]:
        """Every snapshot that is there, complete or not. Raises SnapdError as the daemon says."""
        request = admin_pb2.ListSnapshotsRequest(job=job)
        reply = self._call(
            lambda stub: stub.ListSnapshots(request, timeout=self._timeout_s, metadata=self._metadata)
        )
        return list(reply.snapshots)

    def get_snapshot(
        self, job: str, *, step: int | None = None, generation: int | None = None
    ) -> admin_pb2.GetSnapshotReply:
        """One snapshot with its records; the newest complete one unless step or generation says otherwise.

        Raises:
            NotFoundError: there is none.
        """
        request = admin_pb2.GetSnapshotRequest(
            job=job,
            has_step=step is not None,
            step=step or 0,
            has_generation=generation is not None,
            generation=generation or 0,
        )
        return self._call(
            lambda stub: stub.GetSnapshot(request, timeout=self._timeout_s, metadata=self._metadata)
        )

    def verify(
        self, job: str, *, step: int | None = None, generation: int | None = None
    ) -> Iterator[admin_pb2.VerifyProgress]:
        """Have every chunk hashed again; yields progress until `finished`, without a deadline."""
        request = admin_pb2.VerifyRequest(
            job=job,
            has_step=step is not None,
            step=step or 0,
            has_generation=generation is not None,
            generation=generation or 0,
        )
        try:
            yield from AdminStub(self._open_channel()).Verify(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def fill_arena(self, request: admin_pb2.FillArenaRequest) -> Iterator[admin_pb2.FillArenaProgress]:
        """Have a snapshot of the shared tier brought into the arena; yields progress until `finished`."""
        try:
            yield from AdminStub(self._open_channel()).FillArena(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def remove_job(self, job: str, *, force: bool) -> admin_pb2.RemoveJobReply:
        """Drop all snapshots of a job and give its memory back.

        Raises:
            NotFoundError: no such job.
            ConflictError: a trainer is attached and `force` is False.
        """
        request = admin_pb2.RemoveJobRequest(job=job, force=force)
        return self._call(
            lambda stub: stub.RemoveJob(request, timeout=self._timeout_s, metadata=self._metadata)
        )

    def drain(self, node: str, *, undo: bool = False, is_question: bool = False) -> admin_pb2.DrainReply:
        """Have a node of the cluster emptied, or take that back, or only ask how far it is.

        Raises:
            NotFoundError: no such node. ConfigError: the daemon is in no cluster.
        """
        request = admin_pb2.DrainRequest(node=node, undo=undo, is_question=is_question)
        return self._call(lambda stub: stub.Drain(request, timeout=self._timeout_s, metadata=self._metadata))

    def flush(self, job: str, *, timeout_s: float, is_again: bool = False) -> admin_pb2.FlushReply:
        """Have the newest complete snapshot of a job become durable; at most `timeout_s` are waited. What the tier has
        refused is tried anew, unless `is_again`: the same wait goes on.

        Raises:
            ConfigError: there is no shared tier. NotFoundError: no such job, or it has no complete snapshot.
        """
        request = admin_pb2.FlushRequest(job=job, timeout_s=timeout_s, is_again=is_again)
        timeout_s += self._timeout_s
        return self._call(lambda stub: stub.Flush(request, timeout=timeout_s, metadata=self._metadata))

    def fetch_shard(self, job: str, generation: int, step: int, rank: int) -> dict[tuple[int, int], int]:
        """Descriptors, open for reading, of the segments that a shard lies in, by (rank, segment number).

        They are closed with this client. Raises NotFoundError when the snapshot is gone.
        """
        request = trainer_pb2.FetchShard(job=job, generation=generation, step=step, rank=rank)
        reply, descriptors = self._exchange(trainer_pb2.HandshakeRequest(fetch_shard=request))
        infos = reply.descriptors.segments
        if not reply.HasField("descriptors") or len(infos) != len(descriptors):
            _close_all(descriptors)
            what = f"{len(descriptors)} descriptors came for {len(infos)} segments of rank {rank}"
            raise RemoteProtocolError(what)
        found: dict[tuple[int, int], int] = {}
        for info, descriptor in zip(infos, descriptors, strict=True):
            key = (info.rank, info.segment)
            if key in self._descriptors:
                os.close(descriptor)
            else:
                self._descriptors[key] = descriptor
            found[key] = self._descriptors[key]
        return found

    # --- below ---------------------------------------------------------------------------------------------
    def _call(self, invoke: Callable[[AdminStub], _T]) -> _T:
        try:
            return invoke(AdminStub(self._open_channel()))
        except grpc.RpcError as error:
            raise error_of(error) from error

    def _open_channel(self) -> grpc.Channel:
        if self._channel is None:
            options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", REPLY_BYTES_MAX)]
            self._channel = grpc.insecure_channel(f"unix:{self.runtime_dir / 'snapd.sock'}", options=options)
        return self._channel

    def _exchange(
        self, request: trainer_pb2.HandshakeRequest
    ) -> tuple[trainer_pb2.HandshakeReply, list[int]]:
        if self._connection is None:
            raise UnavailableError("not connected")
        descriptors: list[int] = []
        try:
            body = request.SerializeToString()
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
            (nbytes,) = _LENGTH.unpack(_receive(self._connection, _LENGTH.size, descriptors))
            if nbytes > MESSAGE_BYTES_MAX:
                raise RemoteProtocolError(
                    f"a reply of {nbytes} bytes on the handshake socket; is it snapd's?"
                )
            reply = trainer_pb2.HandshakeReply.FromString(_receive(self._connection, nbytes, descriptors))
        except DecodeError as error:
            _close_all(descriptors)
            what = f"{self.runtime_dir / 'handshake.sock'} gave an answer that is no message of snapd's"
            raise RemoteProtocolError(what, hint="is another program listening there?") from error
        except OSError as error:
            _close_all(descriptors)
            what = f"the daemon at {self.runtime_dir} broke off: {error.strerror or error}"
            raise UnavailableError(what, hint=_HOW_TO_START) from error
        except SnapdError:
            _close_all(descriptors)
            raise
        if reply.HasField("refusal"):
            _close_all(descriptors)
            raise refused(reply.refusal)
        return reply, descriptors


def check_folder(folder: Path) -> None:
    """Refuse a runtime folder that another user could have put there.

    Raises:
        UnavailableError: it does not exist, so no daemon runs there.
        ConfigError: it is another user's, or others can enter it.
    """
    try:
        facts = folder.lstat()
    except OSError as error:
        what = f"no snapd daemon runs in {folder}: {error.strerror or error}"
        raise UnavailableError(what, hint=_HOW_TO_START) from error
    if not stat.S_ISDIR(facts.st_mode):
        raise ConfigError(f"{folder} is not a folder", hint="name another one with SNAPD_RUNTIME_DIR")
    if facts.st_uid != os.getuid():
        what = f"{folder} belongs to user {facts.st_uid}, not to you ({os.getuid()})"
        raise AuthError(
            what, hint="run the command as that user, or name another folder with SNAPD_RUNTIME_DIR"
        )
    if facts.st_mode & 0o077:
        what = f"{folder} is open to other users (mode {stat.S_IMODE(facts.st_mode):04o})"
        raise ConfigError(what, hint=f"chmod 700 {folder}")


def refused(refusal: trainer_pb2.Refusal) -> SnapdError:
    """The error for a refusal on the handshake socket, which carries its kind but not its class."""
    cls = _CLASS_BY_KIND.get(refusal.kind, SnapdError)
    return cls(refusal.message, kind=refusal.kind, hint=refusal.hint)


def _receive(connection: socket.socket, nbytes: int, descriptors: list[int]) -> bytes:
    """Exactly `nbytes` bytes; descriptors that came with them are appended."""
    data = bytearray()
    while len(data) < nbytes:
        room = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
        piece, ancillary, flags, _ = connection.recvmsg(nbytes - len(data), room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            raise ConfigError(
                "descriptors were lost on the way", hint="raise the limit of open files (ulimit -n)"
            )
        if not piece:
            raise ConnectionResetError("end of stream")
        data += piece
    return bytes(data)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
