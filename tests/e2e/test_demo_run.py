"""The demo itself, shortened, and stopped half-way."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGUN_S = 180.0  # three Pythons import torch, on a machine that has more to do
ENDED_S = 60.0
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


def ranks_begun(out: Path) -> list[int]:
    """The process ids of the ranks that have said so; a heartbeat begins with it."""
    heads = [path.read_bytes()[:8] for path in sorted((out / "reference").glob("heartbeat-*"))]
    return [int.from_bytes(head, "little") for head in heads if len(head) == 8]


def is_running(pid: int) -> bool:
    """Whether the process can still do something: one that has ended may wait for whoever inherited it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--steps", "14", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        until = time.monotonic() + BEGUN_S
        while len(pids := ranks_begun(out)) < 2:
            assert time.monotonic() < until, "the ranks did not start"
            assert demo.poll() is None
            time.sleep(0.02)
        assert all(is_running(pid) for pid in pids)
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=ENDED_S)
    assert demo.returncode == 130
    assert not leftovers(demo.pid)
    until = time.monotonic() + 10
    while running := [pid for pid in pids if is_running(pid)]:  # SIGKILL has been sent, and takes its time
        assert time.monotonic() < until, f"still there: {running}"
        time.sleep(0.02)
