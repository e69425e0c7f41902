"""How large a rank's state will be, before the optimizer has made its part of it.

Used once, to back the arena when the session is opened, so that the first snapshot copies into pages that exist.
An estimate that is too small costs the first snapshot; one that is too large costs memory until the layout is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .state.tree import StateTree

OVERHEAD_BYTES = 4 << 20  # layout, values, generators, partly filled chunks


def _adam(group: dict[str, object]) -> float:
    return 3.0 if group.get("amsgrad") else 2.0


def _sgd(group: dict[str, object]) -> float:
    return 1.0 if group.get("momentum") else 0.0


def _rmsprop(group: dict[str, object]) -> float:
    return 1.0 + bool(group.get("momentum")) + bool(group.get("centered"))


def _lbfgs(group: dict[str, object]) -> float:
    history = group.get("history_size")
    return 2.0 * (history if isinstance(history, int) else 100) + 3.0


# Copies of the parameters that an optimizer keeps, by class name; 2 where it is not known.
_COPIES: dict[str, Callable[[dict[str, object]], float]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _adam,
    "RAdam": _adam,
    "Adamax": _adam,
    "SparseAdam": _adam,
    "SGD": _sgd,
    "RMSprop": _rmsprop,
    "LBFGS": _lbfgs,
    "Adagrad": lambda group: 1.0,
    "Adadelta": lambda group: 2.0,
    "Rprop": lambda group: 2.0,
    "ASGD": lambda group: 1.0,
    "Muon": lambda group: 1.0,
    "Lion": lambda group: 1.0,
    "Adafactor": lambda group: 0.1,
    "AdamW8bit": lambda group: 0.6,
    "AdamW4bit": lambda group: 0.4,
    "AdamWFp8": lambda group: 0.6,
}


def _unknown(group: dict[str, object]) -> float:
    return 2.0


def state_bytes(tree: StateTree) -> int:
    """Bytes of one snapshot of this rank: what is there now, and what the optimizers will add."""
    present = tree.walk()
    nbytes = _unique_bytes(present.buffers)
    for optimizer in tree.optimizers:
        copies = _COPIES.get(type(optimizer).__name__, _unknown)
        for group in optimizer.param_groups:
            fresh = [p for p in group["params"] if p not in optimizer.state]
            nbytes += int(sum(_local_bytes(p) for p in fresh) * copies(group))
    return nbytes + OVERHEAD_BYTES


def _unique_bytes(buffers: list[torch.Tensor]) -> int:
    seen: dict[int, int] = {}
    for buffer in buffers:
        key = buffer.data_ptr()
        seen[key] = max(seen.get(key, 0), buffer.numel() * buffer.element_size())
    return sum(seen.values())


def _local_bytes(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.numel() * local.element_size())
