"""Bulk bytes over TCP: threads that block on sockets, and receive straight into the arena."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Protocol

from snapd.core.addresses import split
from snapd.errors import AuthError, ConfigError, SnapdError, UnavailableError
from snapd.peer.deadline import Deadline
from snapd.peer.links import Dial
from snapd.peer.serving import Serve, Serving, log_refusal, serve_stream
from snapd.peer.stream import ByteStream, PlainStream, SocketStream, end_socket, tune
from snapd.peer.tls import handshake, wrapped

_BACKLOG = 64
_JOIN_S = 10.0
_ACCEPT_PAUSE_S = 0.1
_PARTING_S = 0.5
_PARTING_READ_BYTES = 64 << 10
_PARTING_READS_MAX = 64


class Contexts(Protocol):
    """Where TLS contexts come from; they are asked for at every connection, so that new files take effect."""

    def server_context(self) -> ssl.SSLContext: ...
    def client_context(self) -> ssl.SSLContext: ...


def dial_socket(contexts: Contexts | None, *, stall_s: float) -> Dial:
    """Connects to side channels: with TLS if there are contexts, else in the clear."""

    def dial(node: str, address: str, deadline: Deadline) -> ByteStream:
        connection = socket.create_connection(
            split(address, f"the address of {node}"), timeout=deadline.remaining_s()
        )
        try:
            tune(connection, stall_s)
            if contexts is None:
                return PlainStream(connection, address)
            connection = wrapped(contexts.client_context(), connection, is_server=False, server_name=node)
            return handshake(connection, address, deadline)
        except (OSError, SnapdError):
            connection.close()
            raise

    return dial


class BulkServer:
    """Serves a BulkStore on a TCP port; one thread accepts, and each connection has one."""

    def __init__(self, serving: Serving, contexts: Contexts | None, *, serve: Serve = serve_stream) -> None:
        """`contexts`: None for a channel without TLS."""
        self._serving, self._contexts, self._serve_stream = serving, contexts, serve
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._is_closed = False
        self._pause = threading.Event()

    def start(self, host: str, port: int) -> int:
        """Listen; return the port (a free one for 0).

        Raises:
            ConfigError: kind `address`: it cannot be listened on.
        """
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(f"cannot listen on {host}:{port}: {why}", kind="address") from error
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=[listener], name="snapd-bulk-accept")
        self._acceptor.start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Stop listening and break off all connections; returns when their threads are done."""
        with self._lock:
            self._is_closed = True
            self._pause.set()
            connections = dict(self._connections)
        if self._listener is None or self._acceptor is None:
            return
        end_socket(self._listener)
        for connection in connections.values():
            end_socket(connection)
        for thread in (self._acceptor, *connections):
            thread.join(_JOIN_S)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                # Out of descriptors, or the client went before we came. Not to be repeated without a pause.
                self._serving.log_once("peer.accept", "peer.accept_failed", why=str(error))
                self._pause.wait(_ACCEPT_PAUSE_S)
                continue
            self._begin(connection, f"{address[0]}:{address[1]}")

    def _begin(self, connection: socket.socket, peer: str) -> None:
        """Give the connection a thread, or close it."""
        limits = self._serving.limits
        try:
            tune(connection, limits.stall_s)
            if self._contexts is not None:
                connection = wrapped(self._contexts.server_context(), connection, is_server=True)
        except OSError:
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=[connection, peer], name=f"snapd-bulk {peer}")
        with self._lock:
            is_full = len(self._connections) >= limits.connections_max
            if not (is_full or self._is_closed):
                self._connections[thread] = connection
                thread.start()
                return
        connection.close()
        if is_full:
            error = UnavailableError(f"{limits.connections_max} connections are open", kind="connections")
            log_refusal(self._serving.log_once, peer, error)

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            if isinstance(connection, ssl.SSLSocket):
                deadline = Deadline(self._serving.clock, self._serving.limits.hello_s)
                stream: SocketStream = handshake(connection, peer, deadline)
            else:
                stream = PlainStream(connection, peer)
            self._serve_stream(stream, self._serving)
        except AuthError as error:
            log_refusal(self._serving.log_once, peer, error)
        except OSError:
            pass  # gone before it said who it is
        finally:
            self._part(connection)
            with self._lock:
                del self._connections[threading.current_thread()]
            connection.close()

    def _part(self, connection: socket.socket) -> None:
        """Give the other end a moment to read why it was refused: closed with its bytes unread, a connection is reset,
        and what we said last is lost. Below TLS, which may be broken.
        """
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_WR)
            deadline = Deadline(self._serving.clock, _PARTING_S)
            for _ in range(_PARTING_READS_MAX):
                connection.settimeout(deadline.remaining_s())
                if not socket.socket.recv(connection, _PARTING_READ_BYTES):
                    return
