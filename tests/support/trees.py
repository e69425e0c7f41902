"""Classes and a comparison for tests of typed trees."""

from __future__ import annotations

import enum
import struct
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch


class Point(NamedTuple):
    x: Any
    y: Any


class Shade(enum.Enum):
    LIGHT = 1
    DARK = "dark"


class Thing:
    """A plain object, as optimizers keep them (projectors, schedules)."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Slotted:
    __slots__ = ("first", "second")

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


def same(one: Any, other: Any, path: str) -> None:
    """Equal in type and to the bit, or AssertionError that names the path."""
    assert type(one) is type(other), f"{path}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, path
        assert one.contiguous().view(torch.uint8).tolist() == other.contiguous().view(torch.uint8).tolist(), (
            path
        )
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes(), (
            path
        )
    elif isinstance(one, float):
        assert struct.pack("<d", one) == struct.pack("<d", other), path
    elif isinstance(one, complex):
        assert struct.pack("<dd", one.real, one.imag) == struct.pack("<dd", other.real, other.imag), path
    elif isinstance(one, dict):
        assert list(map(repr, one)) == list(map(repr, other)), path
        for (key, left), right in zip(one.items(), other.values(), strict=True):
            same(left, right, f"{path}.{key}")
        assert getattr(one, "default_factory", None) is getattr(other, "default_factory", None), path
    elif isinstance(one, list | tuple | deque):
        assert len(one) == len(other), path
        assert getattr(one, "maxlen", None) == getattr(other, "maxlen", None), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{path}.{index}")
    elif isinstance(one, Thing | Slotted):
        same(one.first, other.first, f"{path}.first")
        same(one.second, other.second, f"{path}.second")
    elif isinstance(one, np.generic):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), path
    else:
        assert one == other, f"{path}: {one!r} and {other!r}"
