"""The demo itself, shortened, and stopped half-way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "demo" / "run_demo.py")]


def leftovers(pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"snapd-demo-{pid}-*")]


def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    command = [*COMMAND, "--steps", "14", "--seed", "3", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        said, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, said
    assert "EQUAL TO THE BIT" in said
    assert "SIGKILL" in said
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "demo.svg").stat().st_size > 10_000
    assert not leftovers(demo.pid)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--steps", "14", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        until = time.monotonic() + 60
        while not (out / "reference" / "heartbeat-1").exists():
            assert time.monotonic() < until, "the ranks did not start"
            assert demo.poll() is None
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert not leftovers(demo.pid)
    pids = [
        int.from_bytes((out / "reference" / f"heartbeat-{rank}").read_bytes()[:8], "little")
        for rank in (0, 1)
    ]
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
