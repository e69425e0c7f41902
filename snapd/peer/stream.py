"""Byte streams between two daemons: what the frames travel on, and its plain implementation over a socket."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from typing import Protocol

from snapd.peer.deadline import Deadline

Buffer = bytes | bytearray | memoryview

KEEPALIVE_IDLE_S = 20
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
SLICE_S = 5.0  # so long the kernel waits at most before the deadline is looked at again


class ByteStream(Protocol):
    """Both directions, in order. One thread at a time uses it and closes it; `interrupt` may come from any thread.

    Every wait raises TimeoutError when the deadline has passed and OSError when the stream is broken or closed; after
    either the stream is good for nothing but `close`.
    """

    peer: str
    """Where the other end is, for log lines."""
    names: tuple[str, ...] | None
    """Whom the other end's verified certificate names; None where there are no certificates."""
    sent_bytes: int
    received_bytes: int

    def send(self, parts: tuple[Buffer, ...], deadline: Deadline) -> None: ...

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        """Fill the view."""

    def has_more(self) -> bool:
        """Whether something has arrived already, or the end; False when that is not known."""

    def interrupt(self) -> None:
        """End the waits of the thread that uses it, which then finds the stream broken."""

    def close(self) -> None: ...


class SocketStream:
    """A connected TCP socket; receives straight into the caller's memory. For TLS: see PlainStream."""

    def __init__(self, connection: socket.socket, peer: str, names: tuple[str, ...] | None) -> None:
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self.peer, self.names = peer, names
        self.sent_bytes = self.received_bytes = 0

    def send(self, parts: tuple[Buffer, ...], deadline: Deadline) -> None:
        for part in parts:
            view = memoryview(part)
            while len(view):
                self._socket.settimeout(deadline.remaining_s())
                count = self._socket.send(view)
                self.sent_bytes += count
                view = view[count:]

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        while len(view):
            self._socket.settimeout(deadline.remaining_s())
            count = self._socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            self.received_bytes += count
            view = view[count:]

    def has_more(self) -> bool:
        return bool(self._poll.poll(0))

    def close(self) -> None:
        end_socket(self._socket)
        self._socket.close()

    def interrupt(self) -> None:
        end_socket(self._socket)


class PlainStream(SocketStream):
    """Without TLS the kernel does the waiting, too: a whole frame is one call each way, not a poll and a call for each
    piece that has come, each of which would take the GIL anew.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        super().__init__(connection, peer, None)
        connection.settimeout(None)
        self._armed = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}

    def send(self, parts: tuple[Buffer, ...], deadline: Deadline) -> None:
        left = [memoryview(part) for part in parts]
        while left:
            self._arm(socket.SO_SNDTIMEO, deadline)
            try:
                count = self._socket.sendmsg(left)
            except BlockingIOError:
                continue  # a slice of the time has passed
            self.sent_bytes += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        while len(view):
            self._arm(socket.SO_RCVTIMEO, deadline)
            try:
                count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                continue
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            self.received_bytes += count
            view = view[count:]

    def _arm(self, option: int, deadline: Deadline) -> None:
        """The next call waits until the deadline, or for a slice of the time until then."""
        wait_s = min(deadline.remaining_s(), SLICE_S)
        if wait_s != self._armed[option]:
            microseconds = max(1, int(wait_s * 1e6))  # 0 would be for ever
            self._socket.setsockopt(
                socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(microseconds, 10**6))
            )
            self._armed[option] = wait_s


def end_socket(connection: socket.socket) -> None:
    """Shut a socket down, whoever waits on it.

    The plain socket's method on purpose: SSLSocket's first forgets its TLS state, so that a thread that
    is just about to send would send in the clear.
    """
    with contextlib.suppress(OSError):  # not connected any more, which is what we want
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def tune(connection: socket.socket, stall_s: float) -> None:
    """No delays for small frames, and dead peers are noticed: by probes when idle, by `stall_s` when not."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
