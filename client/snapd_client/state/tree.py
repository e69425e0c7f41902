"""The user's state, bound once and walked at each capture.

`StateTree.walk()` runs on the training thread. While the structure stays as it is, it only compares
identities (`program`); else it walks everything again (`structure`). A `Walk` holds strong references to
every tensor that it names and never changes afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from snapd_proto.format_pb2 import EarlyValues, Value
from snapd_proto.format_pb2 import Mapping as MappingValue

from ..errors import CaptureError
from . import rng
from .atoms import is_atom
from .classes import Vouched
from .dynamic import DynamicEncoder, big_tensors
from .encode import is_leaf
from .names import Names
from .optimizers import optimizer_packages
from .producers import Producer
from .program import FIXED
from .records import Place, Role
from .structure import Outline, Structure

_SIGNATURES_KEPT = 8
_data_ptr = torch.Tensor.data_ptr
_size, _stride = torch.Tensor.size, torch.Tensor.stride
_dtype, _device = attrgetter("dtype"), attrgetter("device")


class Walk:
    """What the state is right now; the lists are not changed any more once the walk is returned.

    `buffers[i]` is plain and has storage of its own; `outers[i]` is the outermost tensor around it, whose
    version counter tells of writes; `names[i]` is for messages.
    """

    __slots__ = ("_parts", "buffers", "names", "outers", "pointers", "scalars", "signature", "structure")

    def __init__(
        self,
        structure: Structure,
        buffers: list[torch.Tensor],
        outers: list[torch.Tensor],
        names: list[str],
        signature: object,
        parts: list[bytes],
        pointers: list[int],
    ) -> None:
        self.structure, self.buffers, self.outers, self.names = structure, buffers, outers, names
        self.pointers = pointers
        self.signature, self.scalars, self._parts = signature, list(structure.program.leaves), parts

    def find_reshaped(self) -> set[int]:
        """Buffers that have another shape, or other strides, than when the structure was read. Any thread.

        The next walk is then a full one.
        """
        shapes = self.structure.shapes
        now = describe(self.buffers)
        if now == shapes:
            return set()
        self.structure.is_reshaped = True
        return {
            buffer
            for column, expected in zip(now, shapes, strict=True)
            for buffer, (one, other) in enumerate(zip(column, expected, strict=True))
            if one != other
        }

    def encode_early(self, generation: int, step: int) -> bytes:
        """A serialized EarlyValues. The leaves were written when the walk was made."""
        head = EarlyValues(generation=generation, step=step, wall_time_s=time.time()).SerializeToString()
        return head + b"".join(self._parts)


class StateTree:
    """Names bound to parameters, the optimizers in walk order, and the way to the present state.

    Args:
        state: name -> module, optimizer, scheduler, loader, scaler, generator, tensor, plain value, or dicts
            and lists
            of them. It is read again at each capture, so plain values in it may be replaced.
        gradients: capture `.grad` too.
    Raises:
        CaptureError: something in it can never be captured; names its path and type.
    """

    def __init__(
        self, state: Mapping[str, object], *, gradients: bool = False, rank: int, world_size: int, job: str,
        trust: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if isinstance(state, Mapping) and (odd := [name for name in state if not isinstance(name, str)]):
            raise CaptureError("the names in the state must be texts", name=repr(odd[0])[:80])
        if not isinstance(state, Mapping):
            raise CaptureError(
                "the state must be a mapping from names to objects",
                hint='Snapshotter({"model": model, "optimizer": optimizer}, job=...)',
                type=type(state).__name__,
            )
        self.state, self.gradients = state, gradients
        self.rank, self.world_size, self.job = rank, world_size, job
        self.vouched = Vouched(trust)
        self.forced_early: set[str] = set()
        self.restored_values: dict[str, object] = {}
        self._names = Names(state, self.vouched)
        self.optimizers: list[torch.optim.Optimizer] = list(self._names.optimizers)
        self._structure: Structure | None = None
        self._signed: list[tuple[int, Outline]] = []
        self._signature_count = 0
        self._signature = 0
        self._buffers: list[torch.Tensor] = []
        self._outers: list[torch.Tensor] = []
        self._buffer_names: list[str] = []
        self._wrapped: list[tuple[int, int, Any]] = []  # buffer, slot, getter
        self._pointers: list[int] = []
        self._described: list[
            torch.Tensor
        ] = []  # buffers whose shapes were compared when they lay at _pointers
        self._parts: list[bytes] = []
        self._produced: list[
            list[tuple[str, int]]
        ] = []  # per producer: paths and records of its large tensors

    # --- asked by the hook ------------------------------------------------------------------------
    def trust(self, packages: Sequence[str]) -> None:
        """Allow objects of these packages to be rebuilt from their fields."""
        self.vouched.add(*packages)

    def fence_group(self, index: int) -> int:
        """The fence group of optimizer number `index`. Optimizers that share a parameter have the same."""
        return self._names.fence_group(index)

    def has_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self._names.tensors)

    def force_early(self, name: str) -> None:
        """From the next walk on this tensor is captured before `snap.step` returns."""
        self.forced_early.add(name)
        self._structure = None
        self._signed.clear()

    def vouch_for_optimizers(self) -> None:
        """An optimizer's own package may have its objects rebuilt."""
        for optimizer in self.optimizers:
            self.vouched.add(*optimizer_packages(optimizer))

    # --- walking ----------------------------------------------------------------------------------
    def walk(self) -> Walk:
        """The present state.

        Raises:
            CaptureError: something cannot be captured; names its path and type.
        """
        structure = self._structure
        if structure is not None:
            changed = structure.program.refresh(_may_follow)
            produced = None if changed is None else self._ask_producers(structure)
            if changed is not None and produced is not None:
                self._refresh_buffers(structure, changed[0] + produced)
                if self._has_shapes(structure):
                    self._write_leaves(structure, changed[1])
                    return self._make_walk(structure)
        return self._walk_in_full()

    def _has_shapes(self, structure: Structure) -> bool:
        """Whether the tensors have the shapes that they had.

        Compared when one is another object or lies elsewhere than the last time. That a tensor was given another
        shape over the same memory is found by `Walk.find_reshaped`, off the training thread.
        """
        pointers = list(map(_data_ptr, self._buffers))
        if structure.is_reshaped:
            return False
        if (self._buffers is not self._described or pointers != self._pointers) and (
            describe(self._buffers) != structure.shapes
        ):
            return False
        self._described, self._pointers = self._buffers, pointers
        return True

    def _make_walk(self, structure: Structure) -> Walk:
        return Walk(
            structure,
            self._buffers,
            self._outers,
            self._buffer_names,
            self._signature,
            self._parts,
            self._pointers,
        )

    def _walk_in_full(self) -> Walk:
        self._names = Names(self.state, self.vouched)
        structure = Structure(self._names, gradients=self.gradients)
        out = structure.skeleton.mapping
        out.type = MappingValue.DICT
        out.keys.add().text = "state"
        self._write_root(structure, out.values.add())
        structure.program.watch(lambda: [record.sharded_param for record in self._names.fsdp_records])
        out.keys.add().text = "rng"
        structure.produce(Producer("rng", rng.capture, "rng"), out.values.add())
        self._add_produced(structure)
        structure.seal()
        self._structure = structure
        self._collect_buffers(structure)
        self._pointers = list(map(_data_ptr, self._buffers))
        self._described = self._buffers
        structure.shapes = describe(self._buffers)
        self._parts = [b""] * len(structure.program.leaves)
        self._write_leaves(structure, range(len(structure.program.leaves)))
        self._signature = self._sign(structure)
        return self._make_walk(structure)

    def _write_root(self, structure: Structure, out: Value) -> None:
        """The user's own mapping, of whatever class."""
        state = self.state
        structure.note(state)
        out.mapping.type = MappingValue.DICT
        structure.watch(lambda: list(state))
        first = structure.watch(lambda: list(state.values()))
        for index, (name, value) in enumerate(state.items()):
            out.mapping.keys.add().text = name
            structure.encode(value, out.mapping.values.add(), name, first + index)

    def _sign(self, structure: Structure) -> int:
        """A number that is the same for the same structure, among the few seen last."""
        outline = structure.outline()
        known = next((number for number, other in self._signed if other == outline), None)
        if known is None:
            self._signature_count += 1
            known = self._signature_count
        self._signed = [pair for pair in self._signed if pair[0] != known][-_SIGNATURES_KEPT:]
        self._signed.append((known, outline))
        return known

    # --- buffers ----------------------------------------------------------------------------------
    def _collect_buffers(self, structure: Structure) -> None:
        slots = structure.program.slots
        self._outers = [slots[slot] for slot in structure.outer_of]
        self._buffer_names = [structure.records[number].name for number in structure.record_of]
        self._buffers = []
        self._wrapped = []
        for buffer, (slot, path) in enumerate(zip(structure.outer_of, structure.paths, strict=True)):
            getter = attrgetter(".".join(path)) if path else None
            if structure.records[structure.record_of[buffer]].is_gathered:
                getter = _gathering(getter)
            if getter is not None:
                self._wrapped.append((buffer, slot, getter))
            self._buffers.append(slots[slot] if getter is None else getter(slots[slot]))

    def _refresh_buffers(self, structure: Structure, changed_slots: list[int]) -> None:
        """New lists where something has changed; the old ones belong to earlier walks."""
        slots = structure.program.slots
        if changed_slots:
            self._outers = [slots[slot] for slot in structure.outer_of]
            self._buffers = list(self._buffers)
            changed = set(changed_slots)
            for buffer, slot in enumerate(structure.outer_of):
                if slot in changed:
                    self._buffers[buffer] = slots[slot]
        if self._wrapped:
            buffers = list(self._buffers)
            for buffer, slot, getter in self._wrapped:
                buffers[buffer] = getter(slots[slot])
            self._buffers = buffers

    # --- leaves -----------------------------------------------------------------------------------
    def _add_produced(self, structure: Structure) -> None:
        """Ask the objects that tell their own state, and give their large tensors records of their own."""
        self._produced = []
        for number, producer in structure.producers:
            value = producer.ask()
            structure.program.leaves[number] = value
            known: list[tuple[str, int]] = []
            for path, tensor in self._large(producer, value):
                record = structure.tensor(tensor, path, Place(Role.OTHER))
                structure.dynamic[id(tensor)] = record
                known.append((path, record))
            self._produced.append(known)

    def _large(self, producer: Producer, value: object) -> list[tuple[str, torch.Tensor]]:
        if producer.how == "rng":
            return []
        return [
            pair for pair in big_tensors(value, producer.path) if id(pair[1]) not in self._names.number_of
        ]

    def _ask_producers(self, structure: Structure) -> list[int] | None:
        """Ask again. Returns the slots that have other tensors now; None: the structure is another one."""
        slots: list[int] = []
        structure.dynamic.clear()
        for (number, producer), known in zip(structure.producers, self._produced, strict=True):
            value = producer.ask()
            structure.program.leaves[number] = value
            found = self._large(producer, value)
            if len(found) != len(known):
                return None
            for (path, tensor), (known_path, record) in zip(found, known, strict=True):
                slot = structure.records[record].slot
                if path != known_path or not structure.program.replaces(tensor, slot):
                    return None
                structure.dynamic[id(tensor)] = record
                slots.append(slot)
        return slots

    def _write_leaves(self, structure: Structure, changed: Any) -> None:
        """Serialize the leaves with another value now, and those whose objects may have changed inside."""
        parts = list(self._parts)
        leaves = structure.program.leaves
        for number in (*changed, *structure.rewritten):
            parts[number] = _framed(structure.write_leaf(leaves[number], "a value"))
        for number, producer in structure.producers:
            out = Value()
            DynamicEncoder(structure).encode(leaves[number], out, producer.path)
            parts[number] = _framed(out)
        self._parts = parts


def _may_follow(value: object, old: object) -> bool:
    """Whether a leaf may have this value after that one. Atoms and containers are numbered differently in the
    skeleton.
    """
    return is_leaf(value) and is_atom(value) == is_atom(old)


def describe(buffers: list[torch.Tensor]) -> tuple[list[Any], ...]:
    """What may change while a tensor stays the same object: shape, strides, dtype, device."""
    return tuple(list(map(read, buffers)) for read in (_size, _stride, _dtype, _device))


def _framed(value: Value) -> bytes:
    """The value as a member of EarlyValues.scalars, on the wire."""
    return EarlyValues(scalars=[value]).SerializeToString()


def _gathering(getter: Any) -> Any:
    """Reads a tensor with large holes by its elements."""

    def read(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor if getter is None else getter(tensor)
        return plain.detach().resolve_conj().resolve_neg().contiguous()

    return read


__all__ = ["FIXED", "StateTree", "Walk"]
