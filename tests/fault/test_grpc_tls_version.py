"""The control channel speaks TLS 1.3 and nothing older, in a process that begins as the program does."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.peer_scene import Authority

ROOT = Path(__file__).resolve().parents[2]
SERVE = """
import asyncio, sys
import snapd.cli  # as the program does, before gRPC
import grpc
from snapd.peer.grpc_peer import channel_credentials, server_credentials
from snapd.peer.grpc_peer import channel_options
from snapd.peer.trust import Trust, TrustFiles
from pathlib import Path
import time

async def main() -> None:
    trust = Trust("a", TrustFiles(*map(Path, sys.argv[1:4])), clock=time.monotonic, log_once=print)
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(trust))
    await server.start()
    own = channel_credentials(trust), channel_options("a")
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", *own) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_caller_that_knows_no_newer_version_is_refused(tmp_path: Path, version: ssl.TLSVersion) -> None:
    files = Authority(tmp_path).files("a")
    paths = [str(path) for path in (files.certificate, files.key, files.ca)]
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_SSL_CIPHER_SUITES"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *paths],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        port = int(process.stdout.readline())
        context = ssl.create_default_context(cafile=str(files.ca))
        context.check_hostname = False
        context.load_cert_chain(files.certificate, files.key)
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        agreed = _agreed(context, port)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
    assert agreed == ("TLSv1.3" if version is ssl.TLSVersion.TLSv1_3 else None)


def _agreed(context: ssl.SSLContext, port: int) -> str | None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain) as connection:
                return connection.version()
        except (ssl.SSLError, ConnectionError):
            return None
