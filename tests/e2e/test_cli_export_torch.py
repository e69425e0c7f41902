"""Exports for programs that know torch and not snapd: loaded by torch alone, on other ranks than there were."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.daemon_process import ROOT, DaemonProcess, daemon_folders
from tests.support.waiting import wait_for

RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, Path]]:
    """What two ranks of FSDP2 had, in a directory tier; nothing of it is in memory any more."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "tier").mkdir()
    with daemon_folders(SNAPD_TIER_SHARED=str(folder / "tier"), SNAPD_TIER_EVERY_STEPS="1") as daemon:
        daemon.start()
        script = str(ROOT / "tests/support/export_trainer.py")
        subprocess.run([*RUN, "2", script, str(folder)], env=daemon.env, check=True, capture_output=True)
        wait_for(lambda: any(e["step"] == 3 for e in daemon.events("snapshot.durable")), "step 3 is durable")
        daemon.kill()
        yield daemon, folder


def export(daemon: DaemonProcess, folder: Path, form: str) -> Path:
    target = folder / form
    command = [
        "-m",
        "snapd",
        "export",
        "--format",
        form,
        "--to",
        str(target),
        "--from",
        str(folder / "tier"),
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, *command], env=daemon.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3
    assert not list(folder.glob(f".{form}*"))  # nothing is left beside it
    return target


@pytest.mark.parametrize("ranks", [3, 1])
def test_torch_distributed_checkpoint_loads_it_on_any_number_of_ranks(
    exported: tuple[DaemonProcess, Path], ranks: int
) -> None:
    daemon, folder = exported
    target = folder / "dcp"
    if not target.exists():
        export(daemon, folder, "dcp")
    script = str(ROOT / "tests/support/dcp_loader.py")
    command = [*RUN, str(ranks), script, str(target), str(folder)]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["differing"] == []
    assert told["count"] > 20
    assert told["lr"] == [1e-3]


def test_torch_load_reads_it_without_running_code(exported: tuple[DaemonProcess, Path]) -> None:
    daemon, folder = exported
    state = torch.load(export(daemon, folder, "torch") / "state.pt", weights_only=True, mmap=True)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 48))
    model.load_state_dict(state["model"])
    parts = [torch.load(folder / f"reference-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(model[0].weight, torch.cat([part["model.0.weight"] for part in parts]))
    fields = state["optimizer"]["state"]["0.weight"]
    name = "optimizer.state.model.0.weight.max_exp_avg_sq"
    assert torch.equal(fields["max_exp_avg_sq"], torch.cat([part[name] for part in parts]))
    assert torch.equal(state["odd"]["transposed"], parts[0]["odd.transposed"])
    assert torch.equal(state["ranks"]["1"]["odd.table"], parts[1]["odd.table"])
    assert state["plain"][("tuple", 1)] == b"\x00\xff"
    assert (state["snapd"]["step"], state["snapd"]["world_size"]) == (3, 2)
