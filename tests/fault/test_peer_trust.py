"""Peers that must not get in, over real sockets: refused, logged once, and nobody else notices."""

from __future__ import annotations

import datetime
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapd.core.cluster import Token
from snapd.errors import AuthError, SnapdError, UnavailableError
from snapd.peer.asking import Asking
from snapd.peer.base import PeerLink
from snapd.peer.certificates import make_ca
from snapd.peer.identity import Identity
from snapd.peer.links import PeerLinks
from snapd.peer.trust import Trust, TrustFiles, load
from tests.support.peer_scene import LIMITS, Authority, Scene, chunk, digest_of, fragment, push, room

DAY = datetime.timedelta(days=1)
CONTENT = b"123456"


@pytest.fixture(params=["side-tls", "grpc-tls"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(request.param, tmp_path)
    scene.server.store.put(chunk(0), CONTENT)
    yield scene
    scene.close()


class ForcedTrust:
    """Trusts the cluster's authority, and shows what the node itself would refuse to start with."""

    def __init__(self, ca: Path, files: TrustFiles | None) -> None:
        self.ca = ca.read_bytes()
        self._ca, self._files = ca, files
        self.certificate = files.certificate.read_bytes() if files else None
        self.key = files.key.read_bytes() if files else None

    def client_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self._ca)
        if self._files is not None:
            context.load_cert_chain(self._files.certificate, self._files.key)
        return context

    def material(self) -> ForcedTrust:
        return self


def intruder(scene: Scene, trust: ForcedTrust | Trust, node: str = "a") -> PeerLinks:
    identity = Identity(node, Token("cluster-1", 5))
    asking = Asking(identity=lambda: identity, clock=time.monotonic, limits=LIMITS)
    return scene.links_with(asking, trust)  # type: ignore[arg-type]


def is_fine(link: PeerLink) -> bool:
    view = room(len(CONTENT))
    return link.fetch([(chunk(0), view)], timeout_s=5) == [digest_of(CONTENT)] and view == CONTENT


def other_ca(authority: Authority, folder: Path) -> TrustFiles:
    return Authority(folder).files("a", ca=make_ca("other", authority.now, DAY))


def none(authority: Authority, folder: Path) -> None:
    return None


def expired(authority: Authority, folder: Path) -> TrustFiles:
    return Authority(folder).files("a", ca=authority.ca, age_days=3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (other_ca, "unable to get local issuer certificate"),
        (expired, "certificate has expired"),
        (none, "peer did not return a certificate"),
    ],
)
def test_a_certificate_that_is_not_trusted_is_refused(
    scene: Scene, tmp_path: Path, make: Callable[[Authority, Path], TrustFiles | None], why: str
) -> None:
    assert scene.authority is not None
    good = scene.links.to("b")
    assert is_fine(good)
    bad = intruder(scene, ForcedTrust(tmp_path / "ca.crt", make(scene.authority, tmp_path / "bad"))).to("b")
    for _ in range(3):
        with pytest.raises(SnapdError) as caught:
            bad.fetch([(chunk(0), room(6))], timeout_s=5)
        assert is_fine(good)
        time.sleep(0.06)  # past the pause after a failure, so that it really tries again
    assert isinstance(caught.value, AuthError | UnavailableError)
    if scene.kind == "side-tls":
        assert caught.value.kind == "certificate"
        assert scene.server.log.kinds() == ["certificate"]
        assert why in scene.server.log.lines[0][1]["why"]


def test_a_certificate_of_another_name_is_refused(scene: Scene, tmp_path: Path) -> None:
    assert scene.authority is not None
    good = scene.links.to("b")
    assert is_fine(good)
    files = scene.authority.files("c")
    trust = Trust("c", files, clock=time.monotonic, log_once=scene.log.once)
    bad = intruder(scene, trust, node="a").to("b")  # calls itself a, and is c
    for _ in range(3):
        with pytest.raises(AuthError) as caught:
            push(bad, fragment(0), memoryview(b"x"), digest_of(b"x"), timeout_s=5)
        assert caught.value.kind == "peer_name"
        assert is_fine(good)
        time.sleep(0.06)
    assert scene.server.log.kinds() == ["peer_name"]
    assert "the certificate of what calls itself a is for c" in scene.server.log.lines[0][1]["why"]
    assert fragment(0) not in scene.server.store.items
    # Under its own name it is let in.
    assert is_fine(intruder(scene, trust, node="c").to("b"))


def test_a_server_that_is_not_trusted_gets_nothing(scene: Scene, tmp_path: Path) -> None:
    """The other way round: a node that took over b's address."""
    scene.server.stop()
    folder = tmp_path / "bad"
    authority = Authority(folder)
    scene.server.trust = Trust("b", authority.files("b"), clock=time.monotonic, log_once=scene.log.once)
    scene.server.start()
    with pytest.raises(AuthError) as caught:
        push(scene.links.to("b"), fragment(0), memoryview(b"x"), digest_of(b"x"), timeout_s=5)
    assert caught.value.kind == "certificate"
    assert scene.server.store.items.keys() == {chunk(0)}


@pytest.mark.parametrize("scene", ["side-tls"], indirect=True)
@pytest.mark.parametrize("what", ["no certificate", "tls 1.2", "plain", "silence"])
def test_what_is_not_mutual_tls_1_3_has_no_way_in(scene: Scene, what: str) -> None:
    assert scene.authority is not None
    good = scene.links.to("b")
    assert is_fine(good)
    files = scene.authority.files("a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca)
    if what == "tls 1.2":
        context.load_cert_chain(files.certificate, files.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    answers = []
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", scene.server.port), timeout=5) as connection:
            if what == "silence":
                assert is_fine(good), "who says nothing holds up the others"
                connection.settimeout(0.1)
            try:
                if what == "plain":
                    connection.sendall(b"snpB" + bytes(1000))
                    answers.append(connection.recv(100))
                elif what == "silence":
                    answers.append(connection.recv(1))
                else:
                    with context.wrap_socket(connection) as wrapped:
                        answers.append(wrapped.recv(1))
            except OSError:
                answers.append(b"")
        assert is_fine(good)
    assert answers == [b"", b""], "something was answered"
    until = time.monotonic() + 5
    while scene.server.log.kinds() != ([] if what == "silence" else ["certificate"]):
        assert time.monotonic() < until, scene.server.log.lines
        time.sleep(0.01)


def test_replaced_files_are_taken_up_without_a_restart(scene: Scene) -> None:
    """The whole cluster moves to a new authority: first both are trusted, then new certificates, then only the new."""
    assert scene.authority is not None and scene.server.trust is not None
    authority, folder = scene.authority, scene.authority.folder
    assert is_fine(scene.links.to("b"))
    old, new = authority.ca, make_ca("next", authority.now, DAY)
    certificates = [load("b", authority.files("b")).certificate]

    def took_up(trusted: bytes, ca: object) -> None:
        (folder / "ca.crt").write_bytes(trusted)
        for node in ("a", "b"):
            authority.files(node, ca=ca)  # type: ignore[arg-type]
        certificates.append((folder / "b.crt").read_bytes())
        until = time.monotonic() + 5
        while scene.server.trust.material().certificate != certificates[-1]:  # type: ignore[union-attr]
            assert time.monotonic() < until
            time.sleep(0.05)
        scene.links.forget("b")  # a new connection
        assert is_fine(scene.links.to("b"))

    took_up(old.certificate + new.certificate, old)
    took_up(old.certificate + new.certificate, new)
    took_up(new.certificate, new)
    assert len(set(certificates)) == 4
    assert scene.log.lines == [] and scene.server.log.lines == []
