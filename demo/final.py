"""The state at the end of a run, written and compared tensor by tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a DTensor, or the tensor itself; bytes of its own, without gradient."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.detach().clone().contiguous()


def _rng_tensors() -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    _kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "rng.python": torch.tensor([version, *words], dtype=torch.int64),
        "rng.python.gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "rng.numpy": torch.from_numpy(keys.astype(np.int64)),
        "rng.numpy.rest": torch.tensor(
            [float(position), float(has_gauss), float(cached)], dtype=torch.float64
        ),
        "rng.torch": torch.get_rng_state(),
    }


def _without_tensors(value: object, path: str, tensors: dict[str, torch.Tensor]) -> object:
    """The value with its tensors moved to `tensors`: repr() would leave out the middle of a long one."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().clone().contiguous()
        return path
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{path}.{at}", tensors) for at, item in enumerate(value)]
    return value


def write_final(path: Path, parts: dict[str, Any]) -> None:
    """Write parameters, optimizer tensors, RNG states (as tensors) and the rest (as JSON) of this rank."""
    tensors = _rng_tensors()  # first: nothing below may draw, but nothing below is trusted either
    names = {parameter: name for name, parameter in parts["model"].named_parameters()}
    for parameter, name in names.items():
        tensors[f"model.{name}"] = _local(parameter)
        for field, value in parts["optimizer"].state[parameter].items():
            tensors[f"optimizer.{name}.{field}"] = _local(value)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in parts["optimizer"].param_groups]
    others = {
        "scheduler": parts["scheduler"].state_dict(),
        "loader": parts["loader"].state_dict(),
        "groups": groups,
    }
    rest = {name: repr(_without_tensors(value, name, tensors)) for name, value in others.items()}
    save_file(tensors, path, metadata={"rest": json.dumps(rest, sort_keys=True)})


def first_difference(wanted: Path, got: Path) -> tuple[str | None, int]:
    """Compare two final states bit by bit.

    Returns:
        A sentence on the first thing that differs (None: nothing does), and how many tensors were compared.
    """
    with safe_open(wanted, "pt") as left, safe_open(got, "pt") as right:
        if set(left.keys()) != set(right.keys()):
            return f"names differ: {sorted(set(left.keys()) ^ set(right.keys()))[:5]}", 0
        count = 0
        for name in sorted(left.keys()):
            a, b = left.get_tensor(name), right.get_tensor(name)
            count += 1
            if a.dtype != b.dtype or a.shape != b.shape:
                return f"{name}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}", count
            if not np.array_equal(a.numpy().reshape(-1).view(np.uint8), b.numpy().reshape(-1).view(np.uint8)):
                at = int((a != b).reshape(-1).nonzero()[0]) if bool((a != b).any()) else 0
                return (
                    f"{name}[{at}]: {a.reshape(-1)[at].item()!r} became {b.reshape(-1)[at].item()!r}",
                    count,
                )
        here, there = json.loads(left.metadata()["rest"]), json.loads(right.metadata()["rest"])
        for key in sorted(here):
            if here[key] != there.get(key):
                return f"{key}: {here[key][:200]} became {str(there.get(key))[:200]}", count
    return None, count
