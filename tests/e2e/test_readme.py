"""The README's example, as it stands: it starts a daemon by itself, is killed, and goes on from where it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon_process import ROOT, DaemonProcess, daemon_folders
from tests.support.waiting import wait_for

BEGUN_S = 120.0  # a Python imports torch and starts a daemon, on a machine that has more to do
ENOUGH_STEPS = 5


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    [code] = [block for block in blocks if block.startswith("# train.py")]
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 14
    return code


def start_of(trainer: subprocess.Popen[str]) -> int:
    """The step that it says it goes on from."""
    assert trainer.stdout is not None
    match = re.fullmatch(r"goes on from step (\d+)\n", trainer.stdout.readline())
    assert match is not None
    return int(match.group(1))


def complete_step(daemon: DaemonProcess) -> int:
    jobs = daemon.status().jobs
    return jobs[0].complete_step if jobs and jobs[0].has_complete else 0


@pytest.mark.timeout(300)
def test_the_example_goes_on_after_a_kill(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(example())
    with daemon_folders() as daemon:
        env = {
            name: value for name, value in daemon.env.items() if name not in ("SNAPD_JOB", "SNAPD_AUTOSTART")
        }
        newest = 0
        try:
            for _ in range(2):
                with subprocess.Popen(
                    [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True
                ) as trainer:
                    try:
                        start = start_of(trainer)
                        assert start >= newest
                        assert start > 0 or newest == 0
                        enough = start + ENOUGH_STEPS
                        newest = wait_for(
                            lambda enough=enough: (
                                max(0, complete_step(daemon) - enough) and complete_step(daemon)
                            ),
                            "some steps are complete",
                            BEGUN_S,
                        )
                    finally:
                        trainer.send_signal(signal.SIGKILL)
        finally:  # the daemon that the example started
            os.kill(int((daemon.runtime / "daemon.lock").read_text()), signal.SIGKILL)
