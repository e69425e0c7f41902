"""A real job's snapshot in a directory tier, read by the reader that only knows docs/format.md, to the bit."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Callable
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


def extracted(
    parts: dict[str, Any], step: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    """The folder and the state of rank 0 at step 3, out of a tier, after `step` was called before each snapshot."""
    tier = tmp_path / "tier"
    tier.mkdir()
    monkeypatch.setenv("SNAPD_TIER_SHARED", str(tier))
    monkeypatch.setenv("SNAPD_TIER_EVERY_STEPS", "1")
    with Node(prefix="snapd-test-reader") as node:
        for name, value in node.env().items():
            monkeypatch.setenv(name, value)
        snap = Snapshotter(parts, job="reader")
        try:
            snap.restore()
            for number in range(1, 4):
                step()
                snap.step(number, wait="captured")
            snap.wait("durable", timeout=60)
        finally:
            snap.close()
    assert " good: " in read_tier("verify", tier)
    read_tier("extract", tier, "--job", "reader", "--out", tmp_path / "out")
    [folder] = (tmp_path / "out").glob("*/rank-00000")
    assert folder.parent.name.endswith("-000000000000003")
    return folder, json.loads((folder / "state.json").read_text())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("compression", ["always", "off"])
def test_every_tensor_of_a_real_job_is_found_by_the_document_alone(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPD_TIER_COMPRESSION", compression)
    parts, model, optimizer = trained()
    folder, state = extracted(parts, lambda: train(model, optimizer), tmp_path, monkeypatch)
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


CONTAINERS = (
    "list",
    "tuple",
    "set",
    "frozenset",
    "deque",
    "size",
    "bytearray",
    "dict",
    "ordered_dict",
    "default_dict",
)


def nodes_of(state: dict[str, Any]) -> list[Any]:
    """The nodes of the tree, numbered as docs/format.md says."""
    found: list[Any] = []

    def walk(value: Any, *, is_node: bool = True) -> None:
        if value[0] == "scalar":
            scalar = state["scalars"][value[1]]
            if is_node and scalar[0] in (*CONTAINERS, "object"):
                found.append(scalar)
        elif value[0] in CONTAINERS:
            if is_node:
                found.append(value)
            for item in value[-1]:
                walk(item[1] if "dict" in value[0] else item)
        elif value[0] == "object":
            found.append(value)
            if value[2] == "fields":
                walk(value[3])
            elif value[3][0] == "dict":
                for key, item in value[3][-1]:
                    is_sorting = value[2] == "optimizer" and key[1] in ("parameters", "attributes")
                    walk(item, is_node=not is_sorting)

    for key, item in state["state"][-1]:
        walk(item, is_node=key[1] != "rng")
    return found


def test_what_is_one_object_and_long_lists_are_found_by_the_document_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, model, optimizer = trained()
    twice: dict[str, Any] = {"deep": [{"x": 1.5}, ()], "numbers": [1, 2]}
    source = torch.Generator().manual_seed(4)
    parts |= {"one": twice, "source": source, "other": {"two": twice, "in": [twice["numbers"], source]}}
    parts["many"] = {"odd": [float(i) for i in range(100)], "plain": list(range(-5, 95))}
    _, state = extracted(parts, lambda: train(model, optimizer), tmp_path, monkeypatch)
    entries = {key[1]: value for key, value in state["state"][-1][0][1][-1]}
    nodes, scalars = nodes_of(state), state["scalars"]
    (_, two), (_, inner) = entries["other"][-1]
    assert two[0] == "same_as" and nodes[two[1]] is entries["one"]
    numbers, generator = inner[-1]
    held = {key[1]: value for key, value in entries["one"][-1]}["numbers"]
    assert (numbers[0], nodes[numbers[1]]) == ("same_as", scalars[held[1]])
    assert scalars[held[1]][-1] == [["int", 1], ["int", 2]]
    assert (
        nodes[generator[1]] is scalars[entries["source"][1]] and nodes[generator[1]][2] == "torch_generator"
    )
    for (_, scalar), code, first in zip((pair for pair in entries["many"][-1]), "dq", (0.0, -5), strict=True):
        kind, _, how, (_, _, fields) = scalars[scalar[1]]
        packed = {key[1]: value[1] for key, value in fields}
        assert (kind, how, packed["typecode"]) == ("object", "packed", code)
        values = struct.unpack(f"<100{code}", base64.b64decode(packed["raw"]))
        assert values == tuple(first + i for i in range(100))
