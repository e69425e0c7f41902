"""Real S3 servers that take conditional creations and checksums and ignore them: rclone's and JuiceFS's gateways."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.support.seaweed import BUCKET

ACCESS_KEY, SECRET_KEY = "AKGATE", "skgate0123456789"
_STARTED_WITHIN_S = 20.0


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """Its URL; the bucket is a folder."""
    (folder / "files" / BUCKET).mkdir(parents=True)
    port = _free_port()
    command = [
        "rclone", "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(folder / "files"),
    ]  # fmt: skip
    with _serving(command, port, folder, {}) as url:
        yield url


@contextmanager
def juicefs(folder: Path) -> Iterator[str]:
    """Its URL; a bucket is made like in S3."""
    database = f"sqlite3://{folder}/jfs.db"
    subprocess.run(
        [
            "juicefs",
            "format",
            "--no-update",
            "--storage",
            "file",
            "--bucket",
            f"{folder}/jfs/",
            database,
            BUCKET,
        ],
        check=True,
        capture_output=True,
    )
    port = _free_port()
    login = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    command = [
        "juicefs", "gateway", "--no-usage-report", "--keep-etag", "--cache-dir", str(folder / "cache"),
        database, f"127.0.0.1:{port}",
    ]  # fmt: skip
    with _serving(command, port, folder, login) as url:
        yield url


GATEWAYS: dict[str, Callable[[Path], AbstractContextManager[str]]] = {"rclone": rclone, "juicefs": juicefs}


@contextmanager
def _serving(command: list[str], port: int, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    with (folder / "gateway.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    try:
        until = time.monotonic() + _STARTED_WITHIN_S
        while True:
            assert process.poll() is None and time.monotonic() < until, (folder / "gateway.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
