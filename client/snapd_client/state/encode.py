"""Objects to `Value`s: containers with their types, order and aliasing.

Nodes are numbered in pre-order while a tree is written (containers, opaque objects, and leaves kept aside
that are not atoms), so that a second occurrence of the same object is written as an alias and cycles end.
`decode` and `rebuild` count alike.
"""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from snapd_proto.format_pb2 import Mapping, Sequence, Value

from ..errors import CaptureError
from . import sources
from .atoms import ATOM_WRITERS, atom_writer, is_atom, write_text
from .classes import Vouched, type_name
from .objects import fields_of, is_skipped
from .program import FIXED

# protobuf refuses messages nested deeper than 100; each container takes two levels
_DEPTH_MAX = 90
PACKED_MIN = 64  # a list of numbers from this length on is written as one run of bytes
_SEQUENCES: dict[type, Sequence.Type.ValueType] = {
    list: Sequence.LIST, tuple: Sequence.TUPLE, set: Sequence.SET, frozenset: Sequence.FROZENSET,
    deque: Sequence.DEQUE, torch.Size: Sequence.SIZE,
}  # fmt: skip
_MAPPINGS: dict[type, Mapping.Type.ValueType] = {
    dict: Mapping.DICT, OrderedDict: Mapping.ORDERED_DICT, defaultdict: Mapping.DEFAULT_DICT,
}  # fmt: skip
Reader = Callable[[], dict[Any, Any]]
_FACTORIES = {list, dict, set, int, float, str, tuple, OrderedDict, deque}
_IMMUTABLE = (tuple, frozenset, torch.Size)


def is_leaf(value: object) -> bool:
    """Whether a value is kept aside as one piece: an atom, or a flat or immutable container of atoms."""
    if is_atom(value):
        return True
    cls = type(value)
    if cls is tuple or cls is torch.Size or cls is frozenset:
        return all(map(is_leaf, value))  # type: ignore[call-overload]
    return False


def is_flat(value: object) -> bool:
    """Whether a value is a mutable container of atoms only: kept aside too, and written anew each time."""
    cls = type(value)
    if cls is list or cls is set or cls is deque:
        return all(map(is_leaf, value))  # type: ignore[call-overload]
    return cls is bytearray


def packed_fields(value: list[Any]) -> dict[str, object] | None:
    """A long list of only floats, or only small integers, as one run of bytes; None if it is not one."""
    kinds = set(map(type, value))
    if kinds == {float}:
        return {"typecode": "d", "raw": array("d", value).tobytes()}
    if kinds == {int}:
        try:
            return {"typecode": "q", "raw": array("q", value).tobytes()}
        except OverflowError:
            return None
    return None


def inner_state(value: object) -> tuple[str, Callable[[Any], dict[str, object]]] | None:
    """How a generator or an array says what it holds; None for anything else."""
    if isinstance(value, np.ndarray):
        return "array", sources.array_fields
    if isinstance(value, torch.Generator):
        return "torch_generator", sources.torch_generator_fields
    if isinstance(value, random.Random):
        return "python_random", sources.python_random_fields
    if isinstance(value, np.random.Generator | np.random.RandomState):
        return "numpy_random", sources.numpy_random_fields
    return None


class Encoder:
    """Writes plain trees: everything by value, small tensors included. Subclasses keep leaves and tensors
    aside.
    """

    def __init__(self, vouched: Vouched) -> None:
        self.vouched = vouched
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # so that no id is used twice while we write
        self._count = 0
        self._depth = 0

    def encode(self, value: Any, out: Value, path: str, at: int = FIXED) -> None:
        """Write `value` into `out`. `at` is its position in the program, where it has one.

        Raises:
            CaptureError: names the path and the type of what cannot be captured.
        """
        writer = ATOM_WRITERS.get(type(value))
        if writer is not None:
            self.on_leaf(value, out, at, writer)
            return
        number = self._numbers.get(id(value))
        if number is not None:
            out.alias = number
            return
        self._depth += 2
        if self._depth > _DEPTH_MAX:
            raise CaptureError(
                f"{path} is nested too deeply", type=type_name(type(value)), levels=_DEPTH_MAX // 2
            )
        self._encode_compound(value, out, path, at)
        self._depth -= 2

    def _encode_compound(self, value: Any, out: Value, path: str, at: int) -> None:
        cls = type(value)
        if isinstance(value, torch.Tensor):
            self.on_tensor(value, out, path, at)
        elif cls in _SEQUENCES or cls is bytearray:
            self.on_sequence(value, out, path, at)
        elif cls in _MAPPINGS:
            self.on_mapping(value, out, path)
        elif isinstance(value, tuple) and hasattr(cls, "_fields"):
            self.note(value)
            out.sequence.type, out.sequence.type_name = Sequence.TUPLE, type_name(cls)
            self._items(value, out, path, FIXED)
        else:
            writer = atom_writer(cls)
            if writer is not None:
                self.on_leaf(value, out, at, writer)
            else:
                self.on_object(value, out, path, at)

    # --- what subclasses change -------------------------------------------------------------------
    def on_leaf(self, value: Any, out: Value, at: int, writer: Callable[[Any, Value], None]) -> None:
        writer(value, out)

    def on_tensor(self, value: torch.Tensor, out: Value, path: str, at: int) -> None:
        self.opaque(value, out, "tensor", sources.tensor_fields(value), path)

    def watch(self, source: Callable[[], Iterable[object]]) -> int:
        """Note a container for the next capture; the position of its first object, or FIXED."""
        return FIXED

    def on_object(self, value: object, out: Value, path: str, at: int) -> None:
        """What is neither atom, tensor nor container."""
        inner = inner_state(value)
        fields = fields_of(value) if inner is None and self.vouched.allows(type(value)) else None
        if inner is not None:
            self.opaque(value, out, inner[0], inner[1](value), path)
        elif isinstance(value, type):
            out.named.type_name, out.named.text = "snapd:class", type_name(value)
        elif fields is not None and not is_skipped(value):
            self.opaque(value, out, "fields", fields, path)
        else:
            raise CaptureError(
                f"{path} cannot be captured",
                type=type_name(type(value)),
                hint="give the object state_dict() and load_state_dict(), or leave it out",
            )

    # --- containers -------------------------------------------------------------------------------
    def on_sequence(self, value: Any, out: Value, path: str, at: int) -> None:
        packed = packed_fields(value) if type(value) is list and len(value) >= PACKED_MIN else None
        if packed is not None:
            self.opaque(value, out, "packed", packed, path)
            return
        self.note(value)
        sequence = out.sequence
        if type(value) is bytearray:
            sequence.type = Sequence.BYTEARRAY
            sequence.items.add().raw = bytes(value)
            return
        sequence.type = _SEQUENCES[type(value)]
        if isinstance(value, deque):
            sequence.deque_maxlen = -1 if value.maxlen is None else value.maxlen
        first = FIXED if isinstance(value, _IMMUTABLE) else self.watch(value.copy)
        if isinstance(value, set):
            first = FIXED  # a copy of a set may iterate in another order than the set
        self._items(value, out, path, first)

    def _items(self, value: Iterable[object], out: Value, path: str, first: int) -> None:
        add = out.sequence.items.add
        for index, item in enumerate(value):
            self.encode(item, add(), f"{path}.{index}", first if first == FIXED else first + index)

    def on_mapping(self, value: Any, out: Value, path: str) -> None:
        self.note(value)
        mapping = out.mapping
        mapping.type = _MAPPINGS[type(value)]
        if isinstance(value, defaultdict) and value.default_factory in _FACTORIES:
            mapping.default_factory = type_name(value.default_factory)
        self.pairs(value, out, path)

    def pairs(self, value: dict[Any, Any], out: Value, path: str, read: Reader | None = None) -> None:
        """The keys and values of `value` into `out.mapping`, both watched.

        `read` makes `value` anew where it is not the container itself.
        """
        self.watch(value.keys if read is None else lambda: list(read()))
        first = self.watch(value.values if read is None else lambda: list(read().values()))
        mapping = out.mapping
        add_key, add_value = mapping.keys.add, mapping.values.add
        for index, (key, item) in enumerate(value.items()):
            self.key(key, add_key(), path)
            name = key if type(key) is str else self.key_text(key)
            self.encode(item, add_value(), f"{path}.{name}", first if first == FIXED else first + index)

    def key(self, key: object, out: Value, path: str) -> None:
        """A key is written in place, never kept aside."""
        if type(key) is str:
            write_text(key, out)
        else:
            Encoder(self.vouched).encode(key, out, f"{path} (a key)")

    def key_text(self, key: object) -> str:
        return str(key) if isinstance(key, int | float | bool | tuple) else type(key).__name__

    # --- objects ----------------------------------------------------------------------------------
    def opaque(self, value: object, out: Value, how: str, fields: dict[str, object], path: str) -> None:
        """An object by class, way and fields. `fields` is ours, made for this call."""
        self.note(value)
        out.opaque.type_name, out.opaque.how = type_name(type(value)), how
        self.on_mapping(fields, out.opaque.fields, path)

    def knows(self, value: object) -> bool:
        """Whether the object was written already; `encode` would write an alias."""
        return id(value) in self._numbers

    def note(self, value: object) -> None:
        self._numbers[id(value)] = self._count
        self._kept.append(value)
        self._count += 1


def encode_plain(value: object, vouched: Vouched, path: str) -> Value:
    """A tree by value."""
    out = Value()
    Encoder(vouched).encode(value, out, path)
    return out
