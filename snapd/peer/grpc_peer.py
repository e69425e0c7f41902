"""The same frames inside gRPC messages (`Peer.Transfer`): the fallback where the side channel's port is not to be had.

One call is one byte stream, cut into messages of at most MESSAGE_BYTES; where a message ends means nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.errors import AuthError
from snapd.peer.deadline import Deadline
from snapd.peer.identity import URI_PREFIX
from snapd.peer.links import Dial
from snapd.peer.serving import Serve, Serving, serve_stream
from snapd.peer.stream import Buffer, ByteStream
from snapd.peer.trust import Material, Trust

T = TypeVar("T")
MESSAGE_BYTES = 1 << 20
_MESSAGES_WAITING_MAX = 4
_JOIN_S = 5.0
_HANDSHAKE_WORDS = ("certificate", "handshake", "hostname verification", "ssl_error", "wrong_version_number")


def server_credentials(trust: Trust) -> grpc.ServerCredentials:
    """Mutual TLS; files that changed are used from the next connection on."""
    current = trust.material()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called at every handshake; None for no change."""
        nonlocal current
        material = trust.material()
        if material is current:
            return None
        current = material
        return _server_configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(current),
        fetch,  # type: ignore[arg-type]  # the stubs leave out the None that gRPC documents
        True,
    )


def channel_credentials(trust: Trust) -> grpc.ChannelCredentials:
    """Of a new channel; it keeps them until it is closed."""
    material = trust.material()
    return grpc.ssl_channel_credentials(material.ca, material.key, material.certificate)


def channel_options(node: str) -> list[tuple[str, str | int]]:
    """Of a channel to `node`: its certificate must have that as DNS name, wherever the node is."""
    return [
        ("grpc.ssl_target_name_override", node),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]


class CallContext(Protocol):
    """What is used of grpc.aio.ServicerContext."""

    def auth_context(self) -> dict[str, list[bytes]]: ...
    def peer(self) -> str: ...
    async def read(self) -> object: ...
    async def write(self, message: peer_pb2.TransferReply) -> None: ...


def certificate_names(context: CallContext) -> tuple[str, ...] | None:
    """Whom the caller's verified certificate names; None on a connection without TLS."""
    facts = context.auth_context()
    if facts.get("transport_security_type") != [b"ssl"]:
        return None
    names = [raw.decode("utf-8", "replace") for raw in facts.get("x509_subject_alternative_name", [])]
    return tuple(dict.fromkeys(name.removeprefix(URI_PREFIX) for name in names))


def _server_configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.ca
    )


def dial_grpc(trust: Trust | None) -> Dial:
    """Opens a channel and a call for each stream; in the clear without `trust`."""

    def dial(node: str, address: str, deadline: Deadline) -> ByteStream:
        if trust is None:
            return _CallStream(grpc.insecure_channel(address, channel_options(node)), address, None)
        channel = grpc.secure_channel(address, channel_credentials(trust), channel_options(node))
        # gRPC has compared the certificate with the node's name before the first message comes.
        return _CallStream(channel, address, (node,))

    return dial


class TransferService:
    """The serving half: `serve` is the body of the servicer's `Transfer`."""

    def __init__(self, serving: Serving, *, serve: Serve = serve_stream) -> None:
        self._serving, self._serve = serving, serve
        count = serving.limits.connections_max
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="snapd-bulk-grpc")
        self._streams: set[_ContextStream] = set()

    async def serve(self, context: CallContext) -> None:
        """Serve one call until it ends; runs on a thread of its own."""
        loop = asyncio.get_running_loop()
        peer = context.peer().partition(":")[2]
        stream = _ContextStream(context, loop, peer, certificate_names(context))
        self._streams.add(stream)
        try:
            await loop.run_in_executor(self._threads, self._serve, stream, self._serving)
        finally:
            self._streams.discard(stream)
            stream.interrupt()

    def close(self) -> None:
        """Break off all calls. On the event loop's thread; the loop has to go on for the calls to end."""
        for stream in self._streams:
            stream.interrupt()
        self._threads.shutdown(wait=False)


class _Pieces:
    """What both ends do alike: the rest of the last message, and cutting what is sent."""

    def __init__(self, peer: str, names: tuple[str, ...] | None) -> None:
        self.peer, self.names = peer, names
        self.sent_bytes = self.received_bytes = 0
        self._rest = memoryview(b"")

    def send(self, parts: tuple[Buffer, ...], deadline: Deadline) -> None:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), MESSAGE_BYTES):
                piece = bytes(view[start : start + MESSAGE_BYTES])
                self._put(piece, deadline)
                self.sent_bytes += len(piece)

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        while len(view):
            if not len(self._rest):
                self._rest = memoryview(self._get(deadline))
            count = min(len(view), len(self._rest))
            view[:count] = self._rest[:count]
            self.received_bytes += count
            self._rest, view = self._rest[count:], view[count:]

    def has_more(self) -> bool:
        return len(self._rest) > 0

    def _put(self, piece: bytes, deadline: Deadline) -> None:
        raise NotImplementedError

    def _get(self, deadline: Deadline) -> bytes:
        raise NotImplementedError


class _ContextStream(_Pieces):
    """The serving end: a thread that has the event loop read and write for it."""

    def __init__(
        self,
        context: CallContext,
        loop: asyncio.AbstractEventLoop,
        peer: str,
        names: tuple[str, ...] | None,
    ) -> None:
        super().__init__(peer, names)
        self._context, self._loop = context, loop
        self._lock = threading.Lock()
        self._pending: concurrent.futures.Future[Any] | None = None
        self._is_over = False

    def interrupt(self) -> None:
        with self._lock:
            self._is_over = True
            if self._pending is not None:
                self._pending.cancel()

    def close(self) -> None:
        self.interrupt()

    def _put(self, piece: bytes, deadline: Deadline) -> None:
        self._wait(self._context.write(peer_pb2.TransferReply(frame=piece)), deadline)

    def _get(self, deadline: Deadline) -> bytes:
        message = self._wait(self._context.read(), deadline)
        if not isinstance(message, peer_pb2.TransferRequest):
            raise ConnectionResetError("closed by the peer")
        return message.frame

    def _wait(self, work: Coroutine[object, object, T], deadline: Deadline) -> T:
        seconds = deadline.remaining_s()
        with self._lock:
            if self._is_over:
                work.close()
                raise ConnectionAbortedError("the call is over")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._pending = future
        try:
            return future.result(seconds)
        except concurrent.futures.CancelledError:
            raise ConnectionAbortedError("the call is over") from None
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            raise ConnectionResetError(f"the call broke: {error}") from error
        finally:
            future.cancel()


class _Mailbox:
    """A bounded queue between two threads that either of them can close."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[bytes] = deque()
        self._end: OSError | AuthError | None = None

    def put(self, item: bytes, seconds: float | None) -> None:
        """Raise TimeoutError, or what the box was closed with. `seconds`: None to wait until it is closed."""
        with self._changed:
            is_ready = self._changed.wait_for(
                lambda: self._end or len(self._items) < _MESSAGES_WAITING_MAX, seconds
            )
            if self._end is not None:
                raise self._end
            if not is_ready:
                raise TimeoutError("the peer takes nothing")
            self._items.append(item)
            self._changed.notify_all()

    def get(self, seconds: float | None) -> bytes:
        """The same; what was put before the box was closed is still given."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._end or self._items, seconds):
                raise TimeoutError("the peer sends nothing")
            if not self._items:
                assert self._end is not None
                raise self._end
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self, error: OSError | AuthError) -> None:
        """The first error stays."""
        with self._changed:
            self._end = self._end or error
            self._changed.notify_all()


class _CallStream(_Pieces):
    """The asking end: gRPC's thread takes what is sent, one of ours what is received."""

    def __init__(self, channel: grpc.Channel, peer: str, names: tuple[str, ...] | None) -> None:
        super().__init__(peer, names)
        self._channel = channel
        self._outgoing, self._incoming = _Mailbox(), _Mailbox()
        self._call = peer_pb2_grpc.PeerStub(channel).Transfer(self._requests())
        self._reader = threading.Thread(target=self._read, name=f"snapd-bulk-grpc {peer}")
        self._reader.start()

    def interrupt(self) -> None:
        self._outgoing.close(ConnectionAbortedError("closed"))
        self._call.cancel()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.interrupt()
        self._incoming.close(ConnectionAbortedError("closed"))
        self._reader.join(_JOIN_S)
        self._channel.close()

    def _put(self, piece: bytes, deadline: Deadline) -> None:
        self._outgoing.put(piece, deadline.remaining_s())

    def _get(self, deadline: Deadline) -> bytes:
        return self._incoming.get(deadline.remaining_s())

    def _requests(self) -> Iterator[peer_pb2.TransferRequest]:
        try:
            while True:
                yield peer_pb2.TransferRequest(frame=self._outgoing.get(None))
        except (OSError, AuthError):
            return

    def _read(self) -> None:
        end: OSError | AuthError = ConnectionResetError("closed by the peer")
        try:
            for reply in self._call:
                self._incoming.put(reply.frame, None)
        except grpc.RpcError as error:
            end = _error_of(error, self.peer)
        except (OSError, AuthError) as error:
            end = error
        self._incoming.close(end)
        self._outgoing.close(end)


def _error_of(error: grpc.RpcError, peer: str) -> OSError | AuthError:
    """What a broken call means; gRPC tells of a failed handshake in words only."""
    details = str(getattr(error, "details", lambda: "")() or error)
    if any(word in details.lower() for word in _HANDSHAKE_WORDS):
        return AuthError(
            f"TLS with {peer} failed",
            kind="peer_name" if "hostname verification" in details.lower() else "certificate",
            hint="do both ends use TLS, with certificates of the same authority that name the node as DNS name?",
            why=details[:200],
        )
    return ConnectionResetError(details[:200])
