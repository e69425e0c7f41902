"""The full walk: from the user's objects to a skeleton, records, leaves and a program for the next captures.

The skeleton holds what stays; what may change at every step is a leaf, kept aside. Which objects are walked
how:

- modules by qualified names; optimizers by `state`, `param_groups` and instance attributes (`optimizers`);
- loaders and anything with `state_dict()` and `load_state_dict()` by the values that it gives (`producers`);
- inside optimizers, other objects by class and fields, if their package is vouched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from snapd_proto.format_pb2 import Mapping, Value
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import CaptureError
from . import modules
from .atoms import atom_writer, write_text
from .classes import package_of, type_name
from .encode import Encoder, inner_state, is_flat, is_leaf
from .names import Names
from .objects import chosen_fields, fields_of, is_skipped
from .optimizers import write_optimizer
from .producers import Producer, producer_for, tells_its_own_state
from .program import FIXED, Program
from .records import NO_OPTIMIZER, ParameterRecord, Place, Role, TensorRecord
from .tensors import check_plain, component, component_names, span_nbytes, subclass_context

GATHER_RATIO = (
    4  # a strided tensor whose holes are more than this is captured by its elements, not by its span
)


class Structure(Encoder):
    """One full walk. Afterwards its lists are read only, except `program`, which follows the objects."""

    def __init__(self, names: Names, *, gradients: bool) -> None:
        super().__init__(names.vouched)
        self.names = names
        self.gradients = gradients
        self.program = Program()
        self.skeleton = Value()
        self.records: list[TensorRecord] = []
        self.parameters: list[ParameterRecord] = names.parameters
        self.producers: list[tuple[int, Producer]] = []  # leaf number, who makes its value
        self.rewritten: list[int] = []  # leaves whose value may change without being another object
        self.place = Place(Role.OTHER)
        self.is_entry = True  # in the user's mapping, not inside an optimizer
        self._number_of: dict[int, int] = {}  # id of a tensor -> record
        self._taken: set[str] = set()
        self.shapes: tuple[list[Any], ...] = ()  # of the buffers: sizes, strides, dtypes
        self.is_reshaped = False  # set by any thread that finds one with another shape
        self.dynamic: dict[int, int] = {}  # id of a large tensor that a producer gave last -> record
        self.outer_of: list[int] = []  # buffer -> slot
        self.paths: list[tuple[str, ...]] = []  # buffer -> attributes from its slot's tensor
        self.record_of: list[int] = []  # buffer -> record

    # --- leaves -----------------------------------------------------------------------------------
    def on_leaf(self, value: Any, out: Value, at: int, writer: Callable[[Any, Value], None]) -> None:
        out.scalar = self.program.add_leaf(value, at)

    def keep_aside(self, value: object, out: Value, at: int) -> int:
        """A leaf that is not an atom: numbered among the nodes."""
        self.note(value)
        number = self.program.add_leaf(value, at)
        out.scalar = number
        return number

    def produce(self, producer: Producer, out: Value) -> None:
        """A leaf whose value is asked for at each capture. It is no node of its own."""
        number = self.program.add_leaf(producer, FIXED)
        out.scalar = number
        self.producers.append((number, producer))

    def on_sequence(self, value: Any, out: Value, path: str, at: int) -> None:
        if is_leaf(value):
            self.keep_aside(value, out, at)
        elif is_flat(value):
            self.rewritten.append(self.keep_aside(value, out, FIXED))
        else:
            super().on_sequence(value, out, path, at)

    def watch(self, source: Callable[[], Iterable[object]]) -> int:
        return self.program.watch(source)

    def key(self, key: object, out: Value, path: str) -> None:
        if type(key) is str:
            write_text(key, out)
        elif isinstance(key, torch.Tensor):
            number = self.names.number_of.get(id(key))
            if number is None:
                raise CaptureError(f"{path} has a tensor as key that is no parameter of the state")
            out.parameter = number
        elif type(key) is int and key in self.names.number_of:
            # a side table of an optimizer keyed by id(parameter); the id means nothing in another process
            out.named.type_name, out.named.text = "snapd:parameter_id", str(self.names.number_of[key])
        elif isinstance(key, nn.Module) and (name := self.names.module_name(key)) is not None:
            out.named.type_name, out.named.text = "snapd:module", name
        else:
            super().key(key, out, path)

    def key_text(self, key: object) -> str:
        if isinstance(key, nn.Module):
            return self.names.module_name(key) or super().key_text(key)
        number = self.names.number_of.get(key if type(key) is int else id(key))
        return super().key_text(key) if number is None else self.parameters[number].name

    # --- objects ----------------------------------------------------------------------------------
    def on_object(self, value: object, out: Value, path: str, at: int) -> None:
        if isinstance(value, torch.optim.Optimizer) and not (self.is_entry and tells_its_own_state(value)):
            write_optimizer(self, value, out, path)
        elif self.is_entry and isinstance(value, nn.Module):
            self._write_module(value, out, path)
        elif inner_state(value) is not None:
            self.rewritten.append(self.keep_aside(value, out, FIXED))
        elif chosen_fields(value) is not None:
            self._write_fields(value, out, path)
        elif self.is_entry and (producer := producer_for(value, path)) is not None:
            self.note(value)
            out.opaque.type_name, out.opaque.how = type_name(type(value)), producer.how
            self.produce(producer, out.opaque.fields)
        elif is_skipped(value):
            self.skip(value, out, path, at)
        else:
            self._write_fields(value, out, path)

    def skip(self, value: object, out: Value, path: str, at: int) -> None:
        """A function, lock, module, ...: the restored object keeps the one that it has."""
        if self.is_entry:
            raise CaptureError(f"{path} cannot be captured", type=type_name(type(value)))
        out.named.type_name, out.named.text = "snapd:skipped", type_name(type(value))
        if at != FIXED:
            self.program.free(at)

    def _write_fields(self, value: object, out: Value, path: str) -> None:
        cls = type(value)
        if not self.vouched.allows(cls):
            own = "give it state_dict() and load_state_dict(), or " if self.is_entry else ""
            raise CaptureError(
                f"{path} is of a class that nobody has vouched for",
                type=type_name(cls),
                hint=f"{own}pass trust=[{package_of(cls)!r}] if its objects may be rebuilt from their fields",
            )
        fields = fields_of(value)
        if fields is None:
            raise CaptureError(
                f"{path} cannot be captured: its class keeps state that its fields do not show",
                type=type_name(cls),
            )
        self.note(value)
        self.note(fields)
        out.opaque.type_name, out.opaque.how = type_name(cls), "fields"
        out.opaque.fields.mapping.type = Mapping.DICT
        is_own = fields is getattr(value, "__dict__", None)
        self.pairs(fields, out.opaque.fields, path, None if is_own else lambda: fields_of(value) or {})

    # --- modules ----------------------------------------------------------------------------------
    def _write_module(self, root: nn.Module, out: Value, path: str) -> None:
        self.note(root)
        bound = self.names.modules[id(root)]
        out.opaque.type_name, out.opaque.how = type_name(type(root)), "module"
        mapping = out.opaque.fields.mapping
        mapping.type = Mapping.DICT
        places = self._watch_module(root)
        for name, parameter in bound.parameters:
            record = self.parameters[self.names.number_of[id(parameter)]]
            is_frozen = not parameter.requires_grad and record.optimizer == NO_OPTIMIZER
            place = Place(Role.PARAMETER, owner=record.name, group=record.fence_group, is_frozen=is_frozen)
            mapping.keys.add().text = name
            mapping.values.add().tensor = self.tensor(parameter, f"{path}.{name}", place)
            if self.gradients and parameter.grad is not None:
                place = Place(Role.GRADIENT, owner=record.name)
                gradient = self.tensor(parameter.grad, f"{path}.{name}.grad", place)
                mapping.keys.add().text = f"{name}.grad"
                mapping.values.add().tensor = gradient
                self.see(gradient, places.get(id(parameter), FIXED))
        for name, buffer in bound.buffers:
            number = self.tensor(buffer, f"{path}.{name}", Place(Role.BUFFER))
            mapping.keys.add().text = name
            mapping.values.add().tensor = number
            self.see(number, places.get(id(buffer), FIXED))
        for name, module in bound.extra:
            mapping.keys.add().text = name
            self.produce(
                Producer("extra_state", module.get_extra_state, f"{path}.{name}"), mapping.values.add()
            )

    def _watch_module(self, root: nn.Module) -> dict[int, int]:
        """Notes all containers of the module tree; positions of buffers by id, of gradients by their
        parameter's.
        """
        managed = self.names.managed
        places: dict[int, int] = {}
        for source, owner, kind in modules.containers(root):
            first = self.program.watch(source)
            if kind == "parameters":
                for index, name in enumerate(owner._parameters):
                    if (id(owner), name) in managed:
                        self.program.free_of_any(first + index)
            elif kind == "buffers":
                for index, buffer in enumerate(owner._buffers.values()):
                    places[id(buffer)] = first + index
        if self.gradients:
            unique = list({id(p): p for _, p in self.names.modules[id(root)].parameters}.values())
            first = self.program.watch(lambda: [p.grad for p in unique])
            places.update((id(p), first + index) for index, p in enumerate(unique))
        return places

    # --- tensors ----------------------------------------------------------------------------------
    def on_tensor(self, value: torch.Tensor, out: Value, path: str, at: int) -> None:
        known = self.names.number_of.get(id(value))
        if known is not None:
            out.parameter = known
            return
        if type(value) is not torch.Tensor and isinstance(value, nn.Parameter):
            self._write_parameter(value, out, path)
            return
        number = self.tensor(value, path, self.place)
        out.tensor = number
        self.see(number, at)

    def _write_parameter(self, value: nn.Parameter, out: Value, path: str) -> None:
        """A parameter that is in no module of the mapping, nor in an optimizer of it: an object's own.

        Later occurrences are references to the parameter, not aliases of this node.
        """
        number = self.names.adopt(value, path)
        self.note(_Unnamed())
        out.opaque.type_name, out.opaque.how = type_name(type(value)), "parameter"
        fields = out.opaque.fields.mapping
        fields.type = Mapping.DICT
        fields.keys.add().text = "number"
        fields.values.add().parameter = number
        fields.keys.add().text = "tensor"
        fields.values.add().tensor = self.tensor(value, path, self.place)

    def see(self, number: int, at: int) -> None:
        """Record `number` was found at a position of the program."""
        record = self.records[number]
        if record.slot >= 0:
            self.program.see_slot(record.slot, at)

    def outline(self) -> Outline:
        """What makes two structures the same; holds no tensors."""
        return Outline(self.skeleton, self.records, self.outer_of)

    def seal(self) -> None:
        """The walk is done: forget what was only needed to follow aliases, so that replaced tensors can be
        freed.
        """
        self._kept.clear()
        self._numbers.clear()
        self._number_of.clear()

    def tensor(self, value: torch.Tensor, path: str, place: Place) -> int:
        """The record of an outermost tensor; made at its first occurrence."""
        known = self._number_of.get(id(value))
        if known is not None:
            return known
        self._kept.append(value)
        slot = self.program.add_slot(value)
        number = self._record(value, path, place, slot)
        self.records[number].slot = slot
        self._number_of[id(value)] = number
        return number

    def _record(
        self,
        value: torch.Tensor,
        path: str,
        place: Place,
        slot: int,
        attributes: tuple[str, ...] = (),
        around: Any = None,
    ) -> int:
        if torch.nn.parameter.is_lazy(value):
            raise CaptureError(f"{path} is not initialised yet (a lazy module): run one forward pass first")
        record = TensorRecord(self._unique(path), value, place)
        record.around = around
        number = len(self.records)
        self.records.append(record)
        names = component_names(value)
        if names:
            record.type_name = type_name(type(value))
            if isinstance(value, DTensor):
                record.spec = value._spec
            else:
                record.context = subclass_context(value)
            for name in names:
                inner = component(value, name)
                within = record.spec or around
                part = self._record(inner, f"{path}.{name}", place, slot, (*attributes, name), within)
                record.components.append((name, part))
            return number
        check_plain(value, path)
        record.nbytes = value.nbytes
        if not value.is_contiguous() or value.is_conj() or value.is_neg():
            _measure(record, value)
        record.buffer = len(self.record_of)
        self.outer_of.append(slot)
        self.paths.append(attributes)
        self.record_of.append(number)
        return number

    def _unique(self, path: str) -> str:
        if not path.isascii():
            path = path.encode("utf-8", "backslashreplace").decode()
        name, turn = path, 2
        while name in self._taken:
            name, turn = f"{path}#{turn}", turn + 1
        self._taken.add(name)
        return name

    def write_leaf(self, value: object, path: str) -> Value:
        """The present value of a leaf."""
        out = Value()
        writer = atom_writer(type(value))
        if writer is not None:
            writer(value, out)
        else:
            Encoder(self.vouched).encode(value, out, path)
        return out


class Outline:
    """Equal for walks that the same layout fits."""

    __slots__ = ("_outer_of", "_records", "_skeleton")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, skeleton: Value, records: list[TensorRecord], outer_of: list[int]) -> None:
        self._skeleton, self._records, self._outer_of = skeleton, records, outer_of

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Outline)
            and self._outer_of == other._outer_of
            and len(self._records) == len(other._records)
            and all(one.is_like(two) for one, two in zip(self._records, other._records, strict=True))
            and self._skeleton == other._skeleton
        )


def _measure(record: TensorRecord, value: torch.Tensor) -> None:
    """How many bytes a strided tensor takes in the shard: its span, or its elements where the holes are large."""
    span = span_nbytes(record.shape, record.strides, value.itemsize)
    if span > GATHER_RATIO * record.nbytes or value.is_conj() or value.is_neg():
        record.is_gathered = True
        record.live_strides = record.strides
        record.strides = torch.empty(record.shape, device="meta").stride()
    else:
        record.nbytes = span


class _Unnamed:
    """Stands for a node that no alias refers to."""
