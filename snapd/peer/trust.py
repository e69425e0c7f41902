"""Certificates of a node: loaded, checked, taken up again when the files change."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snapd.errors import ConfigError
from snapd.peer.identity import LogOnce
from snapd.peer.tls import names_in

_LOOK_INTERVAL_S = 1.0
_FILE_BYTES_MAX = 1 << 20
_HANDSHAKE_TURNS_MAX = 8
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TrustFiles:
    """PEM files: the node's certificate (with what lies between it and the authority), its key, the authority's."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held at one moment, already checked."""

    certificate: bytes
    key: bytes
    ca: bytes
    server: ssl.SSLContext
    client: ssl.SSLContext
    names: tuple[str, ...]
    not_after_s: float
    """Seconds since 1970."""


class Trust:
    """TLS contexts of a node (TLS 1.3, both sides with certificates). Thread-safe.

    Files are looked at again when a context is asked for, at most once a second. New ones that cannot be used are
    refused: the old ones stay in use, and the reason is logged once.
    """

    def __init__(
        self, node: str, files: TrustFiles, *, clock: Callable[[], float], log_once: LogOnce
    ) -> None:
        """Raise ConfigError (kind `certificate_files`) saying which file it is and what is wrong with it."""
        self._node, self._files, self._clock, self._log_once = node, files, clock, log_once
        self._lock = threading.Lock()
        self._stamp = _stamp_of(files)
        self._material = load(node, files)
        self._looked_s = clock()

    def server_context(self) -> ssl.SSLContext:
        return self.material().server

    def client_context(self) -> ssl.SSLContext:
        return self.material().client

    def material(self) -> Material:
        """What is to be used now."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._looked_s >= _LOOK_INTERVAL_S:
                self._looked_s = now_s
                self._look_again()
            return self._material

    def _look_again(self) -> None:
        try:
            stamp = _stamp_of(self._files)
            if stamp != self._stamp:
                self._material = load(self._node, self._files)
                self._stamp = stamp
        except ConfigError as error:
            self._log_once(f"trust {error}", "peer.certificates_refused", kind=error.kind, why=str(error))


def load(node: str, files: TrustFiles) -> Material:
    """Read and check all three files.

    Raises:
        ConfigError: kind `certificate_files`.
    """
    certificate, key, ca = (_read(path) for path in (files.certificate, files.key, files.ca))
    server, client = _context(files, is_server=True), _context(files, is_server=False)
    names, not_after_s = _shake_hands(files, server, client)
    if node not in names:
        why = f"is for {', '.join(names) or 'no node'}, and this node is {node}"
        raise _broken(files.certificate, why, hint=f"snapd certs node {node} makes one")
    return Material(certificate, key, ca, server, client, names, not_after_s)


def _context(files: TrustFiles, *, is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names are node names, not host names: the transport compares them (snapd/peer/identity.py).
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if is_server:
        context.num_tickets = (
            0  # nobody resumes; and a client that never reads would find the ticket in its way
        )
    try:
        context.load_verify_locations(cafile=files.ca)
    except ssl.SSLError as error:
        raise _broken(files.ca, "holds no certificate in PEM") from error
    if context.cert_store_stats()["x509_ca"] == 0:
        raise _broken(files.ca, "holds no certificate of an authority")
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _broken(files.key, f"is not the key of {files.certificate}") from error
        raise _broken(files.certificate, f"or {files.key} is not readable PEM") from error
    return context


def _no_password() -> bytes:
    """Keys with a passphrase are not supported: an empty answer fails at once, where OpenSSL would ask the terminal."""
    return b""


def _shake_hands(
    files: TrustFiles, server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[tuple[str, ...], float]:
    """Names of the certificate and when it ends, after it convinced both of its own ends, in memory: what a peer
    with the same authority would refuse is found here.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname="self")
    serving = server.wrap_bio(to_server, to_client, server_side=True)
    unfinished = [asking, serving]
    try:
        for _ in range(_HANDSHAKE_TURNS_MAX):
            unfinished = [end for end in unfinished if not _advance(end)]
    except ssl.SSLCertVerificationError as error:
        why = f"does not convince with {files.ca}: {error.verify_message}"
        raise _broken(files.certificate, why) from error
    except ssl.SSLError as error:
        raise _broken(files.certificate, f"is unusable: {error.reason}") from error
    if unfinished:
        raise _broken(files.certificate, "is unusable: the handshake with itself does not end")
    certificate = asking.getpeercert() or {}
    return names_in(certificate), ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def _advance(end: ssl.SSLObject) -> bool:
    """Whether it has finished its handshake."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror}") from error
    if len(raw) > _FILE_BYTES_MAX:
        raise _broken(path, "is too large for a PEM file")
    return raw


def _stamp_of(files: TrustFiles) -> _Stamp:
    """Changes whenever a file is written or replaced."""
    stamps = []
    for path in (files.certificate, files.key, files.ca):
        try:
            found = os.stat(path)
        except OSError as error:
            raise _broken(path, f"cannot be read: {error.strerror}") from error
        stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
    return tuple(stamps)


def _broken(path: Path, why: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{path} {why}", kind="certificate_files", hint=hint or "snapd certs show tells more")
