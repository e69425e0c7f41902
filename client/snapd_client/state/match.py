"""A snapshot's tree laid beside the live one: what goes where, and what does not fit.

Matching changes nothing. It returns builders: functions that, once all bytes have arrived, put the values
back, in place where a live object of the same kind is there (others may hold references to it), and return
the object.
"""

from __future__ import annotations

import fnmatch
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

import torch
from snapd_proto import format_pb2 as pb
from torch import nn

from ..errors import IntegrityError
from .boxes import Part
from .classes import Vouched, find_class, type_name
from .decode import Decoder, empty_mapping, empty_mutable, factory, fill, new_sequence, put_back, read_atom
from .destinations import Destinations
from .names import Names
from .objects import new_instance
from .records import NO_OPTIMIZER

Builder = Callable[[], Any]
ABSENT = object()
_MUTABLE = {pb.Sequence.LIST: list, pb.Sequence.SET: set, pb.Sequence.DEQUE: deque}
_DICTS = {pb.Mapping.DICT: dict, pb.Mapping.ORDERED_DICT: OrderedDict, pb.Mapping.DEFAULT_DICT: defaultdict}


class Differences:
    """Names that do not fit, and which of them the user lets pass."""

    def __init__(self, allowed: AbstractSequence[str]) -> None:
        self._allowed = list(allowed)
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.reshaped: list[str] = []
        self.report: list[str] = []

    def allows(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed)

    def note(self, kind: str, name: str, why: str = "") -> None:
        """`kind` is the list that the name belongs to: missing (not here), extra (only here) or reshaped."""
        text = f"{name} ({why})" if why else name
        if self.allows(name):
            self.report.append(f"{kind}: {text}")
        else:
            getattr(self, kind).append(text)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.reshaped)


class Matcher:
    """One pass over a snapshot's skeleton. Kinds of objects register their own ways in `ways`."""

    def __init__(
        self,
        layout: pb.ShardLayout,
        early: pb.EarlyValues,
        names: Names,
        differences: Differences,
        vouched: Vouched,
        others: AbstractMapping[int, pb.ShardLayout] | None = None,
        fills: AbstractMapping[int, AbstractSequence[Part]] | None = None,
    ) -> None:
        self.layout, self.early = layout, early
        self.names, self.differences, self.vouched = names, differences, vouched
        self.destinations = Destinations(layout, vouched, others, fills)
        self.ways: dict[str, Callable[[pb.Opaque, object, str], Builder]] = {"fields": self._fields}
        self.parameter_tensors: dict[int, int] = {}  # a parameter that has no live counterpart -> its tensor
        self._made_parameters: dict[int, nn.Parameter] = {}
        self._claimed: set[int] = set()
        self._objects: list[object] = []
        self._parameters = [self._live_parameter(saved) for saved in layout.parameters]

    # --- parameters -------------------------------------------------------------------------------
    def _live_parameter(self, saved: pb.ParameterName) -> nn.Parameter | None:
        """By qualified name, else by its place in the optimizer."""
        by_name = self.names.by_name.get(saved.name)
        if by_name is not None:
            return by_name
        if saved.optimizer == NO_OPTIMIZER:
            return None
        return self.names.by_place.get((saved.optimizer, saved.group, saved.index))

    def live_parameter(self, number: int) -> nn.Parameter | None:
        if number >= len(self._parameters):
            raise IntegrityError("a parameter's number is out of range", number=number)
        return self._parameters[number]

    def adopt(self, number: int, live: nn.Parameter) -> None:
        """A live parameter that no name leads to, found where the saved one was."""
        if self.live_parameter(number) is None and self.layout.parameters[number].optimizer == NO_OPTIMIZER:
            self._parameters[number] = live

    def parameter(self, number: int) -> nn.Parameter:
        """The live parameter, or a new one with the restored bytes."""
        live = self.live_parameter(number)
        if live is None:
            live = self._made_parameters.get(number)
        if live is None:
            tensor = self.parameter_tensors.get(number)
            if tensor is None:
                raise IntegrityError("a parameter has no bytes", name=self.layout.parameters[number].name)
            grad = self.layout.tensors[tensor].requires_grad
            live = nn.Parameter(self.destinations.tensor(tensor), requires_grad=grad)
            self._made_parameters[number] = live
        return live

    # --- values -----------------------------------------------------------------------------------
    def match(self, value: pb.Value, live: object, path: str) -> Builder:
        """The builder for `value`; `live` is its counterpart, or ABSENT."""
        kind = value.WhichOneof("kind")
        if kind == "scalar":
            return self._scalar(value.scalar, live)
        if kind == "sequence":
            return self._sequence(value.sequence, live, path)
        if kind == "mapping":
            return self._mapping(value.mapping, live, path)
        if kind == "opaque":
            return self._opaque(value.opaque, live, path)
        if kind == "alias":
            number = value.alias
            return lambda: self._objects[number]
        if kind == "tensor":
            return self.tensor(value.tensor, live)
        if kind == "parameter":
            number = value.parameter
            return lambda: self.parameter(number)
        if kind == "named" and value.named.type_name == "snapd:skipped":
            if live is ABSENT:
                self.differences.note(
                    "missing", path, f"{value.named.text}, which no snapshot can hold, is not here"
                )
            return lambda: live
        made = self.key(value) if kind == "named" else read_atom(value, kind or "nothing")
        return lambda: made

    def tensor(self, number: int, live: object) -> Builder:
        """The saved tensor, into `live` if it is one that it fits."""
        if number >= len(self.layout.tensors):
            raise IntegrityError("a tensor's number is out of range", number=number)
        if isinstance(live, torch.Tensor):
            self.destinations.claim(number, live)
        return lambda: self.destinations.tensor(number)

    def decode(self, number: int) -> Any:
        """A leaf's value, with references to tensors and parameters followed. After `allocate` only."""
        return Decoder(self.destinations.tensor, self.parameter, self.vouched).decode(self._leaf(number))

    def _leaf(self, number: int) -> pb.Value:
        if number >= len(self.early.scalars):
            raise IntegrityError("the snapshot's values and its layout do not belong together", number=number)
        return self.early.scalars[number]

    def _scalar(self, number: int, live: object) -> Builder:
        kind = self._leaf(number).WhichOneof("kind")
        node = self._number() if kind in ("sequence", "mapping", "opaque") else None
        target = self._take(live) if node is not None else ABSENT

        def build() -> Any:
            made = self.decode(number)
            if target is not ABSENT and put_back(target, made):
                made = target
            if node is not None:
                self._objects[node] = made
            return made

        return build

    def key(self, value: pb.Value) -> Any:
        """A dictionary's key as it is here; ABSENT for a parameter that is not."""
        kind = value.WhichOneof("kind")
        if kind == "parameter":
            live = self.live_parameter(value.parameter)
            return ABSENT if live is None else live
        if kind == "named" and value.named.type_name == "snapd:parameter_id":
            live = self.live_parameter(int(value.named.text))
            return ABSENT if live is None else id(live)
        if kind == "named" and value.named.type_name == "snapd:module":
            module = self.names.module_of(value.named.text)
            return ABSENT if module is None else module
        return Decoder(parameter=self.parameter, vouched=self.vouched).decode(value)

    # --- containers -------------------------------------------------------------------------------
    def _number(self) -> int:
        self._objects.append(None)
        return len(self._objects) - 1

    def _take(self, live: object) -> object:
        """A live object is put back into once only; a second counterpart gets an object of its own."""
        if live is ABSENT or id(live) in self._claimed:
            return ABSENT
        self._claimed.add(id(live))
        return live

    def _sequence(self, sequence: pb.Sequence, live: object, path: str) -> Builder:
        node = self._number()
        kind = _MUTABLE.get(sequence.type)
        target = self._take(live) if kind is not None and type(live) is kind else ABSENT
        if isinstance(target, deque) and target.maxlen != (
            None if sequence.deque_maxlen < 0 else sequence.deque_maxlen
        ):
            target = ABSENT
        counterparts = list(live) if isinstance(live, list | tuple | deque) else []
        builders = [
            self.match(item, counterparts[i] if i < len(counterparts) else ABSENT, f"{path}.{i}")
            for i, item in enumerate(sequence.items)
        ]

        def build() -> Any:
            made: Any = empty_mutable(sequence) if target is ABSENT else target
            self._objects[node] = made
            items = [builder() for builder in builders]
            if made is None:
                made = self._objects[node] = new_sequence(sequence, items)
            else:
                fill(made, items)
            return made

        return build

    def _mapping(self, mapping: pb.Mapping, live: object, path: str) -> Builder:
        node = self._number()
        target = self._take(live) if type(live) is _DICTS.get(mapping.type) else ABSENT
        known: AbstractMapping[Any, Any] = live if isinstance(live, AbstractMapping) else {}
        if (
            target is ABSENT
            and mapping.type == pb.Mapping.DEFAULT_DICT
            and factory(mapping.default_factory) is None
        ):
            self.differences.note(
                "missing", path, "a defaultdict whose factory no snapshot can hold is not here"
            )
        pairs = self.pairs(mapping, known, path)

        def build() -> Any:
            made: Any = empty_mapping(mapping) if target is ABSENT else target
            self._objects[node] = made
            items = [(key, builder()) for key, builder in pairs]
            made.clear()
            made.update(items)
            return made

        return build

    def pairs(
        self, mapping: pb.Mapping, known: AbstractMapping[Any, Any], path: str
    ) -> list[tuple[Any, Builder]]:
        """Keys as they are here, with builders for their values. Keys that are not here any more are left
        out.
        """
        if len(mapping.keys) != len(mapping.values):
            raise IntegrityError("a mapping of the snapshot has not as many keys as values", path=path)
        pairs = []
        for saved_key, saved in zip(mapping.keys, mapping.values, strict=True):
            key = self.key(saved_key)
            if key is ABSENT:
                self.leave(saved)
                continue
            pairs.append((key, self.match(saved, known.get(key, ABSENT), f"{path}.{self._text(key)}")))
        return pairs

    def pairs_made(self, mapping: pb.Mapping, path: str) -> list[tuple[Builder, Builder]]:
        """As `pairs`, for keys that may be parameters still to be made."""

        def key_builder(saved: pb.Value) -> Builder:
            return lambda: (
                self.parameter(saved.parameter)
                if saved.WhichOneof("kind") == "parameter"
                else self.key(saved)
            )

        return [
            (key_builder(key), self.match(value, ABSENT, path))
            for key, value in zip(mapping.keys, mapping.values, strict=True)
        ]

    def _text(self, key: object) -> str:
        return self.names.name_of(key) or str(key)

    def leave(self, value: pb.Value) -> None:
        """A part of the snapshot that is not restored: its nodes count, its tensors need no place."""
        kind = value.WhichOneof("kind")
        if kind == "tensor":
            self.destinations.drop(value.tensor)
        elif kind == "scalar":
            if self._leaf(value.scalar).WhichOneof("kind") in ("sequence", "mapping", "opaque"):
                self._number()
        elif kind == "sequence":
            self._number()
            for item in value.sequence.items:
                self.leave(item)
        elif kind == "mapping":
            self._number()
            for item in value.mapping.values:
                self.leave(item)
        elif kind == "opaque":
            self._number()
            if value.opaque.how == "fields":
                self.leave(value.opaque.fields)
            elif value.opaque.how == "parameter":
                for item in value.opaque.fields.mapping.values:
                    self.leave(item)
            elif value.opaque.fields.WhichOneof("kind") == "mapping":
                self.leave_parts(value.opaque)

    def leave_parts(self, opaque: pb.Opaque) -> None:
        """The parts of a module or optimizer, whose own mapping is no node."""
        for name, item in zip(opaque.fields.mapping.keys, opaque.fields.mapping.values, strict=True):
            if opaque.how == "optimizer" and name.text in ("attributes", "parameters"):
                for part in item.mapping.values:
                    self.leave(part)
            elif item.WhichOneof("kind") == "tensor" or opaque.how == "optimizer":
                self.leave(item)

    # --- objects ----------------------------------------------------------------------------------
    def _opaque(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        way = self.ways.get(opaque.how)
        if way is None:
            raise IntegrityError("an object of the snapshot is of an unknown kind", path=path, how=opaque.how)
        return way(opaque, live, path)

    def take_node(self) -> int:
        return self._number()

    def set_node(self, node: int, value: object) -> None:
        self._objects[node] = value

    def _fields(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        """An object by class and fields."""
        node = self._number()
        fields_node = self._number()
        target = live if live is not ABSENT and type_name(type(live)) == opaque.type_name else ABSENT
        target = self._take(target)
        cls = find_class(opaque.type_name)
        if target is ABSENT and (cls is None or not self.vouched.allows(cls)):
            self.differences.note(
                "missing", path, f"{opaque.type_name} is not imported here, or nobody vouches for it"
            )
        known = {} if target is ABSENT else {
            name.text: getattr(target, name.text, ABSENT) for name in opaque.fields.mapping.keys
        }  # fmt: skip
        pairs = self.pairs(opaque.fields.mapping, known, path)

        def build() -> Any:
            made = target
            if made is ABSENT:
                assert cls is not None
                made = new_instance(cls)
            self._objects[node] = made
            self._objects[fields_node] = getattr(made, "__dict__", None)
            for name, builder in pairs:
                object.__setattr__(made, name, builder())
            return made

        return build
