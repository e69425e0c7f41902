"""What a real trainer had is what the exported files hold, read without snapd: bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from tests.support.daemon_process import ROOT, daemon_folders


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def test_two_ranks_of_fsdp2_export_what_they_had(tmp_path: Path) -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = str(ROOT / "tests/support/export_trainer.py")
        subprocess.run(
            [sys.executable, *trainer, script, str(tmp_path)], env=daemon.env, check=True, capture_output=True
        )
        command = [sys.executable, "-m", "snapd", "restore", "--to", str(tmp_path / "out"), "--json"]
        done = subprocess.run(command, env=daemon.env, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["ranks"] == [0, 1]
    differing = []
    for rank in range(2):
        rest = json.loads((tmp_path / "out" / f"rank-{rank:05d}.json").read_text())
        reference = torch.load(tmp_path / f"reference-{rank}.pt", weights_only=True)
        with safe_open(tmp_path / "out" / rest["tensors_file"], framework="pt") as file:
            for name, expected in reference.items():
                found = file.get_tensor(name)
                if expected.dtype is torch.complex128:  # held as bytes: safetensors has no such type
                    assert rest["tensors"][name]["dtype"] == "complex128"
                    found = found.view(torch.complex128).reshape(expected.shape)
                same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
                if not same or _raw(found) != _raw(expected):
                    differing.append((rank, name))
        assert set(file_names(rest)) >= set(reference)
        _check_rest(rest, rank)
    assert differing == []


def file_names(rest: dict[str, object]) -> list[str]:
    """Names under which the JSON says that tensors are stored."""
    names = []
    for tensor in rest["tensors"].values():  # type: ignore[attr-defined]
        for part in (tensor, *tensor.get("components", {}).values()):
            if "stored" in part:
                names.append(part["stored"]["name"])
    return names


def _check_rest(rest: dict[str, object], rank: int) -> None:
    """The values that are not tensors, and the layout of what is."""
    plain = rest["tree"]["state"]["plain"]  # type: ignore[index]
    items = {json.dumps(key): value for key, value in plain["items"]}
    shared = items['"a"']
    assert shared["items"] == [1, [2.5, None]] and items['"b"'] == {"$same_as": shared["$id"]}
    assert items['"nan"']["value"] == "nan" and items['"step"'] == 2
    assert items['"queue"'] == {"$type": "deque", "maxlen": 4, "items": [1, 2]}
    key = json.dumps({"$type": "tuple", "items": ["tuple", 1]})
    assert items[key] == {"$type": "bytes", "base64": "AP8="}
    weight = rest["tensors"]["model.0.weight"]  # type: ignore[index]
    assert weight["distributed"]["placements"] == ["S(0)"] and weight["local_offset"] == [32 * rank, 0]
    # The column is captured by its elements: its span is almost the whole table.
    assert {"odd.table", "odd.transposed"} in [set(group) for group in rest["overlapping"]]  # type: ignore[attr-defined]
    groups = rest["tree"]["state"]["optimizer"]["fields"]["param_groups"]  # type: ignore[index]
    assert groups[0]["lr"] == 1e-3 and groups[0]["amsgrad"] is True
    assert set(rest["tree"]["rng"]) >= {"python", "torch", "numpy"}  # type: ignore[index]
