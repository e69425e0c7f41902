"""TLS 1.3 over a socket: the handshake, whom a certificate names, and TLS's errors as ours."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from snapd.errors import AuthError
from snapd.peer.deadline import Deadline
from snapd.peer.identity import URI_PREFIX
from snapd.peer.stream import Buffer, SocketStream


class TlsStream(SocketStream):
    """As SocketStream; what TLS refuses raises AuthError (kind `certificate`)."""

    def send(self, parts: tuple[Buffer, ...], deadline: Deadline) -> None:
        with _translated(self.peer):
            super().send(parts, deadline)

    def has_more(self) -> bool:
        assert isinstance(self._socket, ssl.SSLSocket)
        return self._socket.pending() > 0 or super().has_more()

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        with _translated(self.peer):
            super().receive_into(view, deadline)


def wrapped(
    context: ssl.SSLContext, connection: socket.socket, *, is_server: bool, server_name: str | None = None
) -> ssl.SSLSocket:
    """The connection with TLS; nothing is sent yet. `connection` itself is closed by this."""
    return context.wrap_socket(
        connection, server_side=is_server, server_hostname=server_name, do_handshake_on_connect=False
    )


def handshake(connection: ssl.SSLSocket, peer: str, deadline: Deadline) -> TlsStream:
    """Agree on keys and check each other's certificate against the authority; names are the caller's matter.

    Raises:
        AuthError: kind `certificate`: there is none, or it is not to be trusted. OSError.
    """
    with _translated(peer):
        connection.settimeout(deadline.remaining_s())
        connection.do_handshake()
    return TlsStream(connection, peer, names_in(connection.getpeercert() or {}))


def names_in(certificate: Mapping[str, object]) -> tuple[str, ...]:
    """Nodes that a verified certificate (of `getpeercert`) names: DNS names, and URIs `snapd-node:NAME`."""
    alternatives = certificate.get("subjectAltName", ())
    assert isinstance(alternatives, tuple)
    names: list[str] = []
    for kind, value in alternatives:
        if kind == "DNS":
            names.append(value)
        elif kind == "URI" and value.startswith(URI_PREFIX):
            names.append(value.removeprefix(URI_PREFIX))
    return tuple(dict.fromkeys(names))


@contextmanager
def _translated(peer: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise ConnectionResetError("closed by the peer") from error
    except ssl.SSLCertVerificationError as error:
        raise AuthError(
            f"the certificate of {peer} is refused: {error.verify_message}",
            kind="certificate",
            hint="snapd certs show tells who made it, for whom, and until when",
        ) from error
    except ssl.SSLError as error:
        reason = str(error.reason or error).lower().replace("_", " ")
        raise AuthError(
            f"TLS with {peer} failed: {reason}",
            kind="certificate",
            hint="do both ends use TLS, with certificates of the same authority?",
        ) from error
