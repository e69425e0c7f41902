"""`Value`s back to objects that stand for themselves: plain trees, generators, arrays, small tensors.

Nodes are numbered as `encode` did. Nothing is imported, no constructor of a user's class runs.
"""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, deque
from collections import defaultdict as DefaultDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from snapd_proto.format_pb2 import Mapping, Opaque, Sequence, Value

from ..errors import IntegrityError
from . import sources
from .atoms import read_named
from .classes import Vouched, find_class
from .objects import new_instance

_FACTORIES: dict[str, Callable[[], object]] = {
    "builtins:list": list, "builtins:dict": dict, "builtins:set": set, "builtins:tuple": tuple,
    "builtins:int": int, "builtins:float": float, "builtins:str": str,
    "collections:OrderedDict": OrderedDict, "collections:deque": deque,
}  # fmt: skip


def factory(name: str) -> Callable[[], object] | None:
    return _FACTORIES.get(name)


def read_atom(value: Value, kind: str) -> object:
    """A value without parts."""
    if kind == "none":
        return None
    if kind == "big_integer":
        return int.from_bytes(value.big_integer, "little", signed=True)
    if kind == "complex":
        return complex(value.complex.re, value.complex.im)
    if kind == "named":
        return read_named(value.named.type_name, value.named.text)
    if kind in ("boolean", "integer", "real", "text", "raw"):
        return getattr(value, kind)
    raise IntegrityError("a value of the snapshot is of an unknown kind", value_kind=kind)


def named_tuple_class(name: str) -> type:
    cls = find_class(name)
    if cls is None or not issubclass(cls, tuple) or not hasattr(cls, "_fields"):
        raise IntegrityError("a named tuple of the snapshot has no class here", type=name)
    return cls


def new_sequence(sequence: Sequence, items: list[Any]) -> object:
    """An immutable sequence, or a mutable one that nothing refers back to."""
    if sequence.type_name:
        return tuple.__new__(named_tuple_class(sequence.type_name), items)
    if sequence.type == Sequence.TUPLE:
        return tuple(items)
    if sequence.type == Sequence.FROZENSET:
        return frozenset(items)
    if sequence.type == Sequence.SIZE:
        return torch.Size(items)
    if sequence.type == Sequence.BYTEARRAY:
        return bytearray(items[0] if items else b"")
    raise IntegrityError("a sequence of the snapshot is of an unknown type", type=sequence.type)


def empty_mutable(sequence: Sequence) -> list[Any] | set[Any] | deque[Any] | None:
    """The empty container to be filled; None for immutable types."""
    if sequence.type == Sequence.LIST:
        return []
    if sequence.type == Sequence.SET:
        return set()
    if sequence.type == Sequence.DEQUE:
        return deque(maxlen=None if sequence.deque_maxlen < 0 else sequence.deque_maxlen)
    return None


def empty_mapping(mapping: Mapping) -> dict[Any, Any]:
    if mapping.type == Mapping.ORDERED_DICT:
        return OrderedDict()
    if mapping.type == Mapping.DEFAULT_DICT:
        return DefaultDict(factory(mapping.default_factory))
    return {}


def fill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


class Decoder:
    """Reads one tree. `tensor` and `parameter` give the objects for references out of the tree."""

    def __init__(
        self,
        tensor: Callable[[int], object] | None = None,
        parameter: Callable[[int], object] | None = None,
        vouched: Vouched | None = None,
    ) -> None:
        self._tensor, self._parameter, self._vouched = tensor, parameter, vouched
        self._nodes: list[object] = []

    def decode(self, value: Value) -> Any:
        """Raises IntegrityError if the tree is not one that `encode` writes."""
        kind = value.WhichOneof("kind")
        if kind is None:
            raise IntegrityError("an empty value in the snapshot")
        if kind == "sequence":
            return self._sequence(value.sequence)
        if kind == "mapping":
            return self._mapping(value.mapping)
        if kind == "opaque":
            return self._opaque(value.opaque)
        if kind == "alias":
            if value.alias >= len(self._nodes):
                raise IntegrityError("an alias in the snapshot refers to nothing", number=value.alias)
            return self._nodes[value.alias]
        if kind == "tensor" and self._tensor is not None:
            return self._tensor(value.tensor)
        if kind == "parameter" and self._parameter is not None:
            return self._parameter(value.parameter)
        return read_atom(value, kind)

    def _sequence(self, sequence: Sequence) -> object:
        container = empty_mutable(sequence)
        number = len(self._nodes)
        self._nodes.append(container)
        items = [self.decode(item) for item in sequence.items]
        if container is None:
            self._nodes[number] = made = new_sequence(sequence, items)
            return made
        fill(container, items)
        return container

    def _mapping(self, mapping: Mapping) -> dict[Any, Any]:
        made = empty_mapping(mapping)
        self._nodes.append(made)
        if len(mapping.keys) != len(mapping.values):
            raise IntegrityError("a mapping of the snapshot has not as many keys as values")
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            made[Decoder(parameter=self._parameter).decode(key)] = self.decode(value)
        return made

    def _opaque(self, opaque: Opaque) -> object:
        number = len(self._nodes)
        self._nodes.append(None)
        if opaque.how == "fields":
            return self._object(opaque, number)
        fields = self._mapping(opaque.fields.mapping)
        self._nodes[number] = made = new_source(opaque, fields)
        return made

    def _object(self, opaque: Opaque, number: int) -> object:
        """An object of a class that is vouched for, from its fields."""
        cls = find_class(opaque.type_name)
        if cls is None or self._vouched is None or not self._vouched.allows(cls):
            raise IntegrityError(
                "an object of the snapshot cannot be made here", type=opaque.type_name,
                hint="import its module, and vouch for its package with trust=[...]",
            )  # fmt: skip
        self._nodes[number] = made = new_instance(cls)
        for name, value in self._mapping(opaque.fields.mapping).items():
            object.__setattr__(made, name, value)
        return made


def new_source(opaque: Opaque, fields: dict[Any, Any]) -> object:
    """A tensor, array or generator from its fields."""
    try:
        if opaque.how == "tensor":
            return sources.read_tensor(fields)
        if opaque.how == "array":
            return sources.read_array(fields)
        if opaque.how == "packed":
            return array({"d": "d", "q": "q"}[fields["typecode"]], fields["raw"]).tolist()
        if opaque.how == "torch_generator":
            generator = torch.Generator(device=str(fields["device"]))
            sources.set_torch_generator(generator, fields)
            return generator
        if opaque.how == "python_random":
            source = random.Random()
            sources.set_python_random(source, fields)
            return source
        if opaque.how == "numpy_random":
            return sources.new_numpy_random(opaque.type_name, fields)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError("a value of the snapshot is malformed", how=opaque.how) from error
    raise IntegrityError("a value of the snapshot is of an unknown kind", how=opaque.how)


def put_back(live: object, made: object) -> bool:
    """Give `live` the contents of `made`, in place; False if they are not of one kind."""
    if type(live) is not type(made):
        return False
    if isinstance(live, np.ndarray) and isinstance(made, np.ndarray):
        if live.shape != made.shape or live.dtype != made.dtype or not live.flags.writeable:
            return False
        live[...] = made
    elif isinstance(live, torch.Generator) and isinstance(made, torch.Generator):
        if live.device != made.device:
            return False
        live.set_state(made.get_state())
    elif isinstance(live, random.Random) and isinstance(made, random.Random):
        live.setstate(made.getstate())
    elif isinstance(live, np.random.Generator) and isinstance(made, np.random.Generator):
        if type(live.bit_generator) is not type(made.bit_generator):
            return False
        live.bit_generator.state = made.bit_generator.state
    elif isinstance(live, np.random.RandomState) and isinstance(made, np.random.RandomState):
        live.set_state(made.get_state(legacy=False))
    elif isinstance(live, bytearray) and isinstance(made, bytearray):
        live[:] = made
    elif isinstance(live, list | set | deque):
        if isinstance(live, deque) and live.maxlen != made.maxlen:  # type: ignore[attr-defined]
            return False
        fill(live, list(made))  # type: ignore[call-overload]
    else:
        return False
    return True
