"""Saved by some ranks, restored by others: ways to cut the same model, bit for bit, under real torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def torchrun(count: int, *arguments: str) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(ROOT / "tests" / "support" / "elastic_runner.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def shares(output: str) -> list[float]:
    return [float(share) for share in re.findall(r"share=(\d\.\d{3})", output)]  # lines of ranks run together


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (("fsdp", 2), [("fsdp", 3), ("plain", 1)]),
        (("fsdp", 3), [("fsdp", 1), ("ddp", 2)]),
        (("ddp", 2), [("fsdp", 3)]),
        (("fsdp", 4), [("tp", 4)]),
        (("tp", 4), [("fsdp", 4), ("hsdp", 4)]),
        (("hsdp", 4), [("fsdp", 2)]),
        (("plain", 1), [("fsdp", 4)]),
    ],
    ids=lambda value: "-".join(
        f"{kind}{count}" for kind, count in (value if isinstance(value, list) else [value])
    ),
)
def test_another_cut_is_restored_to_the_bit(
    tmp_path: Path, saved: tuple[str, int], wanted: list[tuple[str, int]]
) -> None:
    torchrun(saved[1], "save", saved[0], str(tmp_path))
    for kind, count in wanted:
        output = torchrun(count, "load", kind, str(tmp_path))
        assert len(shares(output)) == count, output


def test_only_what_a_rank_needs_is_read(tmp_path: Path) -> None:
    torchrun(4, "save", "fsdp", str(tmp_path))
    output = torchrun(2, "load", "fsdp", str(tmp_path), "trained")  # and into a state that is there already
    assert max(shares(output)) < 0.75, output
