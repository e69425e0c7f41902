"""A real job's snapshot in a directory tier, read by the reader that only knows docs/format.md, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from snapd_client import Snapshotter

from demo.node import Node

ROOT = Path(__file__).parents[2]


def read_tier(*arguments: object) -> str:
    command = [sys.executable, "-I", str(ROOT / "tools" / "read_snapshot.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def elements(path: Path) -> bytes:
    data = path.read_bytes()
    return data[10 + int.from_bytes(data[8:10], "little") :] if path.suffix == ".npy" else data


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def trained() -> tuple[dict[str, Any], torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 50)
    )
    model.append(torch.nn.Linear(50, 40).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = {"model": model, "optimizer": optimizer, "note": {"epoch": 7, "best": 0.25, "name": "ä"}}
    return parts, model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = model[3](model[:3](torch.randn(16, 300)).bfloat16()).float().square().mean()  # type: ignore[index]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("compression", ["always", "off"])
def test_every_tensor_of_a_real_job_is_found_by_the_document_alone(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = tmp_path / "tier"
    tier.mkdir()
    monkeypatch.setenv("SNAPD_TIER_SHARED", str(tier))
    monkeypatch.setenv("SNAPD_TIER_EVERY_STEPS", "1")
    monkeypatch.setenv("SNAPD_TIER_COMPRESSION", compression)
    parts, model, optimizer = trained()
    with Node(prefix="snapd-test-reader") as node:
        for name, value in node.env().items():
            monkeypatch.setenv(name, value)
        snap = Snapshotter(parts, job="reader")
        try:
            snap.restore()
            for step in range(1, 4):
                train(model, optimizer)
                snap.step(step, wait="captured")
            snap.wait("durable", timeout=60)
        finally:
            snap.close()
    assert " good: " in read_tier("verify", tier)
    read_tier("extract", tier, "--job", "reader", "--out", tmp_path / "out")
    [folder] = (tmp_path / "out").glob("*/rank-00000")
    assert folder.parent.name.endswith("-000000000000003")
    state = json.loads((folder / "state.json").read_text())
    found = {
        (tensor["role"], tensor["parameter"] or tensor["name"], tensor["field"]): elements(
            folder / tensor["file"]
        )
        for tensor in state["tensors"]
    }
    count = 0
    for name, parameter in model.named_parameters():
        matching = [key for key in found if key[0] == "parameter" and key[1].endswith(name)]
        assert [found[key] for key in matching] == [raw(parameter)], (name, sorted(found))
        for field in ("exp_avg", "exp_avg_sq"):
            matching = [key for key in found if key[1].endswith(name) and key[2] == field]
            assert [found[key] for key in matching] == [raw(optimizer.state[parameter][field])], (name, field)
            count += 1
    assert count == 16
    for name, buffer in model.named_buffers():
        assert raw(buffer) in [found[key] for key in found if key[1].endswith(name)], name
    text = json.dumps(state["state"]) + json.dumps(state["scalars"])
    assert '["int", 7]' in text and '["text", "\\u00e4"]' in text and '"0.25"' in text
