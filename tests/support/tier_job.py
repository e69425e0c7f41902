"""Runs of tier_trainer.py under a real torchrun: two ranks, FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.daemon_process import ROOT, DaemonProcess

RANKS = 2
CUT, END = 3, 6  # steps: where it is stopped, and how far it goes


def train(daemon: DaemonProcess, first: int, last: int, result: Path, *more: str) -> list[dict[str, Any]]:
    """Run the job from step `first`, as its restore must give it, to `last`; what each rank wrote."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    script = str(ROOT / "tests/support/tier_trainer.py")
    command = [sys.executable, *torchrun, script, str(first), str(last), str(result), *more]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(result.with_suffix(f".rank{rank}.json").read_text()) for rank in range(RANKS)]


def check_resumed(resumed: list[dict[str, Any]], undisturbed: list[dict[str, Any]], cut: int) -> None:
    """From step `cut` on every rank had the losses of the run that nothing happened to, and ended with its bytes."""
    for mine, whole in zip(resumed, undisturbed, strict=True):
        assert mine["fingerprint"] == whole["fingerprint"]
        assert mine["losses"] == {step: loss for step, loss in whole["losses"].items() if int(step) > cut}
