"""The handshake socket: who is there (SO_PEERCRED), a token for gRPC, and descriptors (SCM_RIGHTS).

Each message is a 4-byte little-endian length, at most 1 MiB, and a HandshakeRequest or HandshakeReply.
Whatever is malformed ends that connection only, and is logged once per kind.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

from google.protobuf.message import DecodeError
from snapd_proto import trainer_pb2

from snapd import __version__
from snapd.core.ids import SnapshotId
from snapd.errors import AuthError, NotFoundError, RemoteProtocolError, SnapdError
from snapd.rpc.status import refusal_of
from snapd.runtime.descriptors import PassedSegment, session_descriptors, shard_descriptors
from snapd.runtime.liveness import Peer
from snapd.runtime.node import Node

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = 1 << 20
DESCRIPTORS_MAX = 250
HELLO_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.2
_CREDENTIALS = struct.Struct("3i")


class HandshakeServer:
    """Accepts connections until closed; each is served by a task of its own."""

    def __init__(self, node: Node, path: Path, *, connections_max: int) -> None:
        self._node = node
        self._path = path
        self._connections_max = connections_max
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        """Bind the socket (0600); a stale one was removed under the daemon's lock."""
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        listener.bind(str(self._path))
        os.chmod(self._path, 0o600)
        listener.listen(128)
        self._listener = listener

    async def run(self) -> None:
        """Serve until cancelled."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    await self._wait_accept(error)
                    continue
                if len(self._tasks) >= self._connections_max:
                    self._node.context.log.once(
                        "connections", "handshake.refused", reason="too many connections"
                    )
                    connection.close()
                    continue
                task = loop.create_task(self._serve(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._listener.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_accept(self, error: OSError) -> None:
        """Out of descriptors or memory, or the other end went before we came: who waits is served when that is over."""
        self._node.context.log.once(
            f"accept {error.errno}",
            "handshake.accept_failed",
            reason=f"nobody can connect for now: {error.strerror or error}; who is connected is served",
        )
        await asyncio.sleep(ACCEPT_PAUSE_S)

    async def _serve(self, connection: socket.socket) -> None:
        peer: Peer | None = None
        try:
            connection.setblocking(False)
            pid, uid, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if uid != os.getuid():
                raise AuthError(f"user {uid} is not the daemon's user", kind="user")
            request = await asyncio.wait_for(_receive(connection), HELLO_TIMEOUT_S)
            if request is not None:
                peer = self._greet(request, pid)
                await _send(connection, self._welcome(peer))
            while peer is not None:
                request = await _receive(connection)
                if request is None:
                    break
                await self._answer(connection, peer, request)
        except TimeoutError:
            self._node.context.log.once("hello", "handshake.refused", reason="nothing was said in time")
        except SnapdError as error:
            await self._refuse(connection, error)
        except OSError:
            pass  # the other end is gone
        finally:
            connection.close()
            if peer is not None:
                self._node.disconnect(peer)

    async def _refuse(self, connection: socket.socket, error: SnapdError) -> None:
        self._node.context.metrics.handshakes_refused.inc()
        self._node.context.log.once(f"handshake {error.kind}", "handshake.refused", reason=str(error))
        with contextlib.suppress(OSError, TimeoutError):
            await _send(connection, trainer_pb2.HandshakeReply(refusal=refusal_of(error)))

    def _greet(self, request: trainer_pb2.HandshakeRequest, pid: int) -> Peer:
        if request.WhichOneof("kind") != "hello":
            raise RemoteProtocolError("a connection begins with Hello", kind="handshake")
        hello = request.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"the client speaks protocol {hello.protocol_version}, this daemon {PROTOCOL_VERSION}",
                kind="protocol_version",
                hint="install the same snapd for the client and the daemon",
            )
        if hello.role not in (trainer_pb2.PEER_ROLE_TRAINER, trainer_pb2.PEER_ROLE_ADMIN):
            raise RemoteProtocolError("an unknown role", kind="handshake")
        peer = self._node.connect(pid, is_admin=hello.role == trainer_pb2.PEER_ROLE_ADMIN)
        if hello.session_id:
            try:
                self._node.resume(peer, hello.session_id, hello.session_secret)
            except SnapdError:
                self._node.disconnect(peer)
                raise
        return peer

    def _welcome(self, peer: Peer) -> trainer_pb2.HandshakeReply:
        return trainer_pb2.HandshakeReply(
            welcome=trainer_pb2.Welcome(
                protocol_version=PROTOCOL_VERSION,
                software_version=__version__,
                token=peer.token,
                daemon_instance=self._node.instance,
                is_embedded=self._node.is_embedded,
            )
        )

    async def _answer(
        self, connection: socket.socket, peer: Peer, request: trainer_pb2.HandshakeRequest
    ) -> None:
        kind = request.WhichOneof("kind")
        descriptors: list[int] = []
        try:
            if kind == "ping":
                reply = trainer_pb2.HandshakeReply(pong=trainer_pb2.Pong())
            elif kind == "fetch_segments":
                reply, descriptors = self._segments(request.fetch_segments)
            elif kind == "fetch_shard":
                reply, descriptors = self._shard(peer, request.fetch_shard)
            else:
                raise RemoteProtocolError("an unknown request", kind="handshake")
            if len(descriptors) > DESCRIPTORS_MAX:
                raise RemoteProtocolError("too many segments for one message", kind="descriptors")
            await _send(connection, reply, descriptors)
        except SnapdError as error:
            if isinstance(error, RemoteProtocolError):
                raise
            await self._refuse(connection, error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _segments(self, request: trainer_pb2.FetchSegments) -> tuple[trainer_pb2.HandshakeReply, list[int]]:
        job, session = self._node.find_session(request.session_id)
        if not session.is_live or session.is_page_closed:
            raise NotFoundError("the session has ended", kind="session", session=session.id)
        if session.row.secret != request.session_secret:
            raise AuthError("the session's secret is wrong", kind="secret", session=session.id)
        passed, descriptors = session_descriptors(job, session, self._node.woken)
        return _descriptors(passed, has_page=True), descriptors

    def _shard(
        self, peer: Peer, request: trainer_pb2.FetchShard
    ) -> tuple[trainer_pb2.HandshakeReply, list[int]]:
        job = self._node.existing_job(request.job)
        own = next((session for session in job.live_sessions() if session.peer is peer), None)
        if not peer.is_admin and own is None:
            raise AuthError("the connection has no session of this job", kind="job", job=job.name)
        snapshot = SnapshotId(request.generation, request.step)
        fetched: set[int] = set()
        if request.fetched and own is not None:
            fetched = job.fetched.segments(own.generation, request.rank)
        passed, descriptors = shard_descriptors(job, snapshot, request.rank, fetched)
        if peer.is_admin:  # a trainer's restore is held by its round
            self._node.readers.hold(peer, job, snapshot)
        return _descriptors(passed, has_page=False), descriptors


def _descriptors(passed: list[PassedSegment], *, has_page: bool) -> trainer_pb2.HandshakeReply:
    infos = [
        trainer_pb2.SegmentInfo(segment=s.number, nbytes=s.nbytes, chunk_bytes=s.chunk_bytes, rank=s.rank)
        for s in passed
    ]
    return trainer_pb2.HandshakeReply(
        descriptors=trainer_pb2.Descriptors(segments=infos, has_control_page=has_page)
    )


async def _receive(connection: socket.socket) -> trainer_pb2.HandshakeRequest | None:
    """Read one message; None at the end of the connection. Descriptors that come with it are dropped by the
    kernel.
    """
    head = await _receive_exactly(connection, 4)
    if head is None:
        return None
    length = int.from_bytes(head, "little")
    if not 0 < length <= FRAME_BYTES_MAX:
        raise RemoteProtocolError("a message's length is out of range", kind="handshake", nbytes=length)
    body = await _receive_exactly(connection, length)
    if body is None:
        return None
    try:
        return trainer_pb2.HandshakeRequest.FromString(body)
    except DecodeError:
        raise RemoteProtocolError("a message does not parse", kind="handshake") from None


async def _receive_exactly(connection: socket.socket, nbytes: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < nbytes:
        piece = await loop.sock_recv(connection, min(1 << 16, nbytes - len(data)))
        if not piece:
            return None
        data += piece
    return bytes(data)


async def _send(
    connection: socket.socket, reply: trainer_pb2.HandshakeReply, descriptors: list[int] | None = None
) -> None:
    body = reply.SerializeToString()
    data = len(body).to_bytes(4, "little") + body
    async with asyncio.timeout(SEND_TIMEOUT_S):
        sent = 0
        if descriptors:
            sent = await _send_with_descriptors(connection, data, descriptors)
        if sent < len(data):
            await asyncio.get_running_loop().sock_sendall(connection, data[sent:])


async def _send_with_descriptors(connection: socket.socket, data: bytes, descriptors: list[int]) -> int:
    """Send the first bytes, and the descriptors with them; returns how many bytes went."""
    loop = asyncio.get_running_loop()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    while True:
        try:
            return connection.sendmsg([data], ancillary)
        except BlockingIOError:
            writable: asyncio.Future[None] = loop.create_future()
            loop.add_writer(connection, writable.set_result, None)
            try:
                await writable
            finally:
                loop.remove_writer(connection)
