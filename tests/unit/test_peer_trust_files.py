"""Certificate files: one clear line for each way in which they can be wrong, and new ones are taken up."""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.errors import ConfigError
from snapd.peer.certificates import make_ca, make_node
from snapd.peer.trust import Trust, load
from tests.support.peer_scene import Authority, Log

DAY = datetime.timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def unlink_key(authority: Authority) -> None:
    (authority.folder / "a.key").unlink()


def folder_as_ca(authority: Authority) -> None:
    (authority.folder / "ca.crt").unlink()
    (authority.folder / "ca.crt").mkdir()


def junk_certificate(authority: Authority) -> None:
    (authority.folder / "a.crt").write_text("hello")


def junk_key(authority: Authority) -> None:
    (authority.folder / "a.key").write_text("hello")


def junk_ca(authority: Authority) -> None:
    (authority.folder / "ca.crt").write_text("hello")


def huge_ca(authority: Authority) -> None:
    (authority.folder / "ca.crt").write_bytes(bytes(2 << 20))


def node_as_ca(authority: Authority) -> None:
    (authority.folder / "ca.crt").write_bytes((authority.folder / "a.crt").read_bytes())


def other_key(authority: Authority) -> None:
    authority.files("b")
    os.replace(authority.folder / "b.key", authority.folder / "a.key")


def other_ca(authority: Authority) -> None:
    (authority.folder / "ca.crt").write_bytes(make_ca("other", authority.now, DAY).certificate)


def expired(authority: Authority) -> None:
    authority.files("a", age_days=3)


def not_yet_valid(authority: Authority) -> None:
    authority.files("a", age_days=-3)


def other_name(authority: Authority) -> None:
    authority.files("a", name="z")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (unlink_key, r"a\.key cannot be read: No such file or directory \[certificate_files\]"),
        (folder_as_ca, r"ca\.crt cannot be read: Is a directory \["),
        (junk_certificate, r"a\.crt or .*a\.key is not readable PEM \["),
        (junk_key, r"a\.crt or .*a\.key is not readable PEM \["),
        (junk_ca, r"ca\.crt holds no certificate in PEM \["),
        (huge_ca, r"ca\.crt is too large for a PEM file \["),
        (node_as_ca, r"ca\.crt holds no certificate of an authority \["),
        (other_key, r"a\.key is not the key of .*a\.crt \["),
        (other_ca, r"a\.crt does not convince with .*ca\.crt: unable to get local issuer certificate \["),
        (expired, r"a\.crt does not convince with .*ca\.crt: certificate has expired \["),
        (not_yet_valid, r"a\.crt does not convince with .*ca\.crt: certificate is not yet valid \["),
        (other_name, r"a\.crt is for z, and this node is a \["),
    ],
)
def test_broken_files_are_named(authority: Authority, spoil: Callable[[Authority], None], line: str) -> None:
    files = authority.files("a")
    assert load("a", files).names == ("a",)
    spoil(authority)
    with pytest.raises(ConfigError, match=line) as caught:
        load("a", files)
    assert caught.value.kind == "certificate_files"
    assert "\n" not in str(caught.value)


def test_a_name_as_uri_alone_is_enough(authority: Authority) -> None:
    """As other authorities may make them; only gRPC needs the DNS name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    files = authority.files("a")
    key = ec.generate_private_key(ec.SECP256R1())
    signer = serialization.load_pem_private_key(authority.ca.key, None)
    issuer = x509.load_pem_x509_certificate(authority.ca.certificate).subject
    names = [x509.UniformResourceIdentifier("snapd-node:a"), x509.UniformResourceIdentifier("other:x")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(authority.now - DAY)
        .not_valid_after(authority.now + DAY)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .sign(signer, hashes.SHA256())
    )
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    assert load("a", files).names == ("a",)


def test_contexts_insist_on_tls_1_3_and_certificates(authority: Authority) -> None:
    material = load("a", authority.files("a"))
    for context in (material.server, material.client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert abs(material.not_after_s - (authority.now + DAY).timestamp()) < 2


def test_new_files_are_taken_up_and_bad_ones_are_not(authority: Authority) -> None:
    now, log = [100.0], Log()
    trust = Trust("a", authority.files("a"), clock=lambda: now[0], log_once=log.once)
    first = trust.material()
    now[0] += 10
    assert trust.material() is first
    authority.files("a")
    assert trust.material() is first  # not looked at more often than every second
    now[0] += 1
    second = trust.material()
    assert second is not first
    assert second.certificate != first.certificate

    authority.files("a", age_days=3)
    for _ in range(3):
        now[0] += 1
        assert trust.material() is second
    assert [event for event, _ in log.lines] == ["peer.certificates_refused"]
    assert "certificate has expired" in log.lines[0][1]["why"]
    (authority.folder / "a.crt").unlink()
    now[0] += 1
    assert trust.material() is second
    assert len(log.lines) == 2
    authority.files("a")
    now[0] += 1
    assert trust.material().certificate not in (first.certificate, second.certificate)


def test_a_new_authority_is_taken_up_with_what_it_made(authority: Authority) -> None:
    now = [0.0]
    files = authority.files("a")
    trust = Trust("a", files, clock=lambda: now[0], log_once=Log().once)
    other = make_ca("next", authority.now, DAY)
    files.ca.write_bytes(authority.ca.certificate + other.certificate)
    issued = make_node(other, "a", authority.now, DAY)
    files.certificate.write_bytes(issued.certificate)
    files.key.write_bytes(issued.key)
    now[0] += 1
    assert trust.material().certificate == issued.certificate
