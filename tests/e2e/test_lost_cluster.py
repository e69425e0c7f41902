"""Everything is lost but the bucket: a fresh daemon that has nothing but credentials goes on with the training, bit for
bit. A real S3 server, real daemons, a real FSDP2 job of two ranks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import seaweed
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.tier_job import CUT, END, check_resumed, train

pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweed.Seaweed]:
    with seaweed.running(tmp_path_factory.mktemp("weed")) as server:
        yield server


def tier_settings(server: seaweed.Seaweed) -> dict[str, str]:
    return {
        **server.environment(),
        "SNAPD_TIER_SHARED": f"s3://{seaweed.BUCKET}/lost",
        "SNAPD_TIER_ENDPOINT": server.endpoint,
        "SNAPD_TIER_EVERY_STEPS": "1",
        "OMP_NUM_THREADS": "1",
    }


def snapd(daemon: DaemonProcess, *arguments: str) -> str:
    command = [sys.executable, "-m", "snapd", *arguments]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_a_fresh_machine_goes_on_bit_for_bit(
    server: seaweed.Seaweed, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    with daemon_folders(**tier_settings(server)) as first:
        first.start()
        train(first, 0, CUT, tmp_path / "before")
        snapd(first, "restore", "--job", "lost", "--to", str(tmp_path / "memory"))
        first.kill()
        shutil.rmtree(first.arena)
        shutil.rmtree(first.runtime)
    with daemon_folders(**tier_settings(server)) as fresh:
        rescued = snapd(fresh, "restore", "--to", str(tmp_path / "rescued"), "--from", "shared")
        assert f"step {CUT}" in rescued
        for rank in range(2):  # before any daemon is there, on any machine with credentials
            name = f"rank-{rank:05d}.safetensors"
            assert (tmp_path / "rescued" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
        fresh.start()
        resumed = train(fresh, CUT, END, tmp_path / "after")
        assert {e["step"] for e in fresh.events("shard.brought")} == {CUT}
    check_resumed(resumed, undisturbed, CUT)


def test_what_the_commands_say_of_a_bucket(server: seaweed.Seaweed, tmp_path: Path) -> None:
    """Nothing there, wrong credentials, a server that does not answer: three exit codes, and one line each."""
    url = f"s3://{seaweed.BUCKET}/empty"
    with daemon_folders(**tier_settings(server)) as here:
        env = {**here.env, "SNAPD_TIER_DEADLINE": "2", "SNAPD_TIER_CONNECT": "1", "SNAPD_TIER_STALL": "1"}
        for changed, code in (
            ({}, 1),
            ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 4),
            ({"SNAPD_TIER_ENDPOINT": "http://127.0.0.1:9"}, 4),
        ):
            command = [sys.executable, "-m", "snapd", "restore", "--to", str(tmp_path / "x"), "--from", url]
            done = subprocess.run(
                command, env={**env, **changed}, capture_output=True, text=True, check=False
            )
            assert done.returncode == code, (changed, done.stderr)
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
