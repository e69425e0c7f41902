"""Three real etcd members on loopback, which ask for a certificate and for a user with a role of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from aetcd import rpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.etcd import BINARY, STARTED_WITHIN_S, free_ports

USER, PASSWORD, PREFIX = "snapd", "a password", b"/snapd/"
MEMBERS = 3


def make_certificates(folder: Path) -> None:
    """`ca.crt`, and `node.crt`, `node.key` for 127.0.0.1: etcd shows them, and so does the client."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("ca", ca_key, "ca", ca_key, is_ca=True)
    key = ec.generate_private_key(ec.SECP256R1())
    made = _certificate("node", key, "ca", ca_key, is_ca=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.public_bytes(pem))
    (folder / "node.crt").write_bytes(made.public_bytes(pem))
    (folder / "node.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if not is_ca:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


class EtcdQuorum:
    """`kill` and `start` single members; their data stay."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_certificates(folder)
        ports = free_ports(2 * MEMBERS)
        self._clients, self._peers = ports[:MEMBERS], ports[MEMBERS:]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ca, self.cert, self.key = (
            (folder / name).read_bytes() for name in ("ca.crt", "node.crt", "node.key")
        )

    @property
    def url(self) -> str:
        return "etcds://" + ",".join(f"127.0.0.1:{port}" for port in self._clients)

    def start(self, *members: int) -> None:
        """Those members, or all; returns at once."""
        assert BINARY is not None
        for member in members or range(MEMBERS):
            client = f"https://127.0.0.1:{self._clients[member]}"
            peer = f"https://127.0.0.1:{self._peers[member]}"
            crt, key, ca = (str(self._folder / name) for name in ("node.crt", "node.key", "ca.crt"))
            command = [
                BINARY, "--name", f"m{member}", "--data-dir", str(self._folder / f"data{member}"), "--logger", "zap",
                "--unsafe-no-fsync", "--heartbeat-interval", "100", "--election-timeout", "1000",
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", ",".join(f"m{n}=https://127.0.0.1:{p}" for n, p in enumerate(self._peers)),
                "--cert-file", crt, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth",
                "--peer-cert-file", crt, "--peer-key-file", key, "--peer-trusted-ca-file", ca,
                "--peer-client-cert-auth",
            ]  # fmt: skip
            with (self._folder / f"etcd{member}.log").open("ab") as log:
                self._processes[member] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, *members: int) -> None:
        """kill -9 of those, or of all that run."""
        for member in members or list(self._processes):
            process = self._processes.pop(member)
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def stop_answering(self, member: int) -> None:
        self._processes[member].send_signal(signal.SIGSTOP)

    async def ask_for_users(self) -> None:
        """Make the users, and have etcd ask for them from now on."""
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.cert)
        async with grpc.aio.secure_channel(f"127.0.0.1:{self._clients[0]}", credentials) as channel:
            auth = rpc.AuthStub(channel)
            await self._first_answer(auth)
            await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="root"))
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
            await auth.UserAdd(rpc.AuthUserAddRequest(name=USER, password=PASSWORD))
            await auth.RoleAdd(rpc.AuthRoleAddRequest(name="snapd"))
            permission = rpc.Permission(
                permType=rpc.Permission.READWRITE, key=PREFIX, range_end=PREFIX[:-1] + b"0"
            )
            await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="snapd", perm=permission))
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=USER, role="snapd"))
            await auth.AuthEnable(rpc.AuthEnableRequest())

    async def _first_answer(self, auth: rpc.AuthStub) -> None:
        deadline = time.monotonic() + STARTED_WITHIN_S
        while True:
            try:
                await auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"), timeout=2)
            except grpc.aio.AioRpcError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
            else:
                return
