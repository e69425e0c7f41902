"""Objects that say themselves what their state is: asked at each capture, told at each restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CaptureError
from .classes import type_name
from .loaders import LoaderState, is_loader, is_plain_loader
from .optimizers import is_structural


class Producer:
    """Where a leaf's value comes from. `how` says what takes it back (`rebuild`)."""

    __slots__ = ("ask", "how", "path")

    def __init__(self, how: str, ask: Callable[[], object], path: str) -> None:
        self.how, self.ask, self.path = how, ask, path


def tells_its_own_state(optimizer: torch.optim.Optimizer) -> bool:
    """A wrapper without `state` of its own, whose class says what its state is instead."""
    base, cls = torch.optim.Optimizer, type(optimizer)
    overrides = cls.state_dict is not base.state_dict and cls.load_state_dict is not base.load_state_dict
    return overrides and not is_structural(optimizer)


def producer_for(value: Any, path: str) -> Producer | None:
    """How to ask a value for its state; None if it has no such way.

    Raises:
        CaptureError: it is a loader that cannot tell where it is.
    """
    if is_loader(value):
        return Producer("loader", LoaderState(value).capture, path)
    if is_plain_loader(value):
        raise CaptureError(
            f"{path} does not know its position",
            type=type_name(type(value)),
            hint="use torchdata.stateful_dataloader.StatefulDataLoader",
        )
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return Producer("state_dict", value.state_dict, path)
    return None
