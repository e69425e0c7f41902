"""Saved by some ranks, restored by others: ways to cut the same model, bit for bit, under real torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(400)  # the first test waits for all worlds
Cut = tuple[str, int]  # how, by how many ranks
CASES: list[tuple[Cut, Cut]] = [
    (("fsdp", 2), ("fsdp", 3)),
    (("fsdp", 2), ("plain", 1)),
    (("fsdp", 3), ("fsdp", 1)),
    (("fsdp", 3), ("ddp", 2)),
    (("ddp", 2), ("fsdp", 3)),
    (("fsdp", 4), ("tp", 4)),
    (("tp", 4), ("fsdp", 4)),
    (("tp", 4), ("hsdp", 4)),
    (("hsdp", 4), ("fsdp", 2)),
    (("plain", 1), ("fsdp", 4)),
]
INTO_TRAINED: tuple[Cut, Cut] = (("fsdp", 4), ("fsdp", 2))


def name_of(cut: Cut) -> str:
    return f"{cut[0]}{cut[1]}"


def torchrun(count: int, orders: Iterable[str]) -> tuple[int, str]:
    """Exit status, and what was said."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(ROOT / "tests" / "support" / "elastic_runner.py"), *orders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr[-4000:]


@dataclass
class Restored:
    """`shares`: of each load, by what it was ordered with, the part of the chunks that each rank has read. `said`: by
    the worlds of so many ranks, whether they ended well or not.
    """

    shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    said: dict[int, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """All cases: one world of each number of ranks saves, then one restores."""
    root = tmp_path_factory.mktemp("saved")
    saves: dict[int, list[str]] = defaultdict(list)
    loads: dict[int, list[str]] = defaultdict(list)
    for mode, saved, wanted in [*(("load", *case) for case in CASES), ("trained", *INTO_TRAINED)]:
        folder = root / name_of(saved)
        if not folder.exists():
            folder.mkdir()
            saves[saved[1]].append(f"save:{saved[0]}:{folder}")
        loads[wanted[1]].append(f"{mode}:{wanted[0]}:{folder}")
    result = Restored()
    for count, orders in saves.items():
        code, said = torchrun(count, orders)
        assert code == 0, said
    for count, orders in loads.items():
        _, said = torchrun(count, orders)
        result.said[count] = said
        for order, share in re.findall(r"restored (\S+) rank=\d+ share=(\d\.\d{3});", said):
            result.shares[order].append(float(share))
    return result


@pytest.mark.parametrize(("saved", "wanted"), CASES, ids=name_of)
def test_another_cut_is_restored_to_the_bit(restored: Restored, saved: Cut, wanted: Cut) -> None:
    shares = restored.shares[f"load:{wanted[0]}:{name_of(saved)}"]
    assert len(shares) == wanted[1], restored.said[wanted[1]]


def test_only_what_a_rank_needs_is_read(restored: Restored) -> None:
    saved, wanted = INTO_TRAINED
    shares = restored.shares[f"trained:{wanted[0]}:{name_of(saved)}"]
    assert len(shares) == wanted[1] and max(shares) < 0.75, restored.said[wanted[1]]
