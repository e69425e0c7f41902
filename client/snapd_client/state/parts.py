"""How modules, optimizers, loaders and objects with `state_dict()` are matched and put back."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from collections.abc import MutableMapping
from typing import Any

import torch
from snapd_proto import format_pb2 as pb
from torch import nn

from . import modules
from .classes import find_class, type_name
from .loaders import is_loader, restore_loader
from .match import ABSENT, Builder, Matcher
from .optimizers import SKIPPED_ATTRIBUTES, group_difference
from .resharding import Elastic, saved_states

_ENTRY_KINDS = ("module", "optimizer", "loader", "state_dict")


class Parts:
    """Registers its ways with a matcher. `late` runs after everything else is back, in order."""

    def __init__(
        self, matcher: Matcher, elastic: Elastic | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self._matcher = matcher
        self._elastic, self._rank, self._world_size = elastic, rank, world_size
        self._differences = matcher.differences
        self.late: list[Builder] = []
        self.values: dict[str, object] = {}
        matcher.ways.update(
            module=self._module,
            optimizer=self._optimizer,
            parameter=self._parameter,
            loader=self._loader,
            state_dict=self._state_dict,
        )

    # --- the user's mapping -----------------------------------------------------------------------
    def entries(self, value: pb.Value, live: AbstractMapping[str, object]) -> Builder:
        """The user's own mapping: every name must be there on both sides."""
        self._matcher.take_node()
        mapping = value.mapping
        builders: list[tuple[str, Builder]] = []
        saved_names = {key.text for key in mapping.keys}
        for key, saved in zip(mapping.keys, mapping.values, strict=True):
            name = key.text
            if name not in live:
                self._differences.note("missing", name)
                self._matcher.leave(saved)
                continue
            builders.append((name, self._entry(saved, live[name], name)))
        for name in live:
            if name not in saved_names:
                self._differences.note("extra", name)

        def build() -> None:
            for name, builder in builders:
                made = builder()
                if made is not live[name]:
                    self.values[name] = made
                    if isinstance(live, MutableMapping):
                        live[name] = made

        return build

    def _entry(self, saved: pb.Value, live: object, path: str) -> Builder:
        kind = saved.WhichOneof("kind")
        if kind == "mapping" and isinstance(live, AbstractMapping):
            here = set(map(str, live))
            there = {str(self._matcher.key(key)) for key in saved.mapping.keys}
            if _holds_objects(saved):
                for name in sorted(there - here):
                    self._differences.note("missing", f"{path}.{name}")
                for name in sorted(here - there):
                    self._differences.note("extra", f"{path}.{name}")
        elif kind == "sequence" and _holds_objects(saved) and isinstance(live, list | tuple):
            if len(live) != len(saved.sequence.items):
                why = f"{len(saved.sequence.items)} objects in the snapshot, {len(live)} here"
                self._differences.note("reshaped", path, why)
        elif kind == "tensor" and isinstance(live, torch.Tensor):
            why = self._matcher.destinations.difference(saved.tensor, live)
            if why:
                self._differences.note("reshaped", path, why)
        return self._matcher.match(saved, live, path)

    # --- modules ----------------------------------------------------------------------------------
    def _module(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        matcher = self._matcher
        node = matcher.take_node()
        if not isinstance(live, nn.Module):
            self._differences.note(
                "reshaped", path, f"{opaque.type_name} in the snapshot, {_kind(live)} here"
            )
            matcher.leave_parts(opaque)
            return lambda: live
        bound = matcher.names.modules[id(live)]
        tensors: dict[str, torch.Tensor] = {**dict(bound.parameters), **dict(bound.buffers)}
        extra = dict(bound.extra)
        seen: set[str] = set()
        loaded: list[tuple[nn.Module, int]] = []
        gradients: list[tuple[torch.Tensor, Builder]] = []
        first_name: dict[int, str] = {}
        has_gradients = False
        for key, saved in zip(opaque.fields.mapping.keys, opaque.fields.mapping.values, strict=True):
            name, full = key.text, f"{path}.{key.text}"
            if saved.WhichOneof("kind") == "scalar":
                seen.add(name)
                if name in extra:
                    loaded.append((extra[name], saved.scalar))
                else:
                    self._differences.note("missing", full)
                continue
            number = saved.tensor
            if matcher.layout.tensors[number].role == "gradient":
                has_gradients = True
                owner = tensors.get(name.removesuffix(".grad"))
                if owner is not None:
                    gradients.append((owner, matcher.tensor(number, owner.grad)))
                else:
                    matcher.destinations.drop(number)
                continue
            seen.add(name)
            self._one(number, tensors.get(name), full, first_name)
        for name in (*tensors, *extra):
            if name not in seen:
                self._differences.note("extra", f"{path}.{name}")

        def build() -> nn.Module:
            matcher.set_node(node, live)
            for owner, builder in gradients:
                owner.grad = builder()
            if has_gradients:
                having = {id(owner) for owner, _ in gradients}
                for parameter in live.parameters():
                    if id(parameter) not in having:
                        parameter.grad = None
            for module, scalar in loaded:
                module.set_extra_state(matcher.decode(scalar))
            modules.reshard(live)
            return live

        return build

    def _one(self, number: int, live: torch.Tensor | None, full: str, first_name: dict[int, str]) -> None:
        """One parameter or buffer of a module. Tied ones come once under each name."""
        destinations = self._matcher.destinations
        if live is None:
            self._differences.note("missing", full)
            if destinations.live(number) is None and number not in first_name:
                destinations.drop(number)
            return
        why = destinations.difference(number, live)
        if not why and not destinations.claim(number, live):
            tied = first_name.get(number)
            why = (
                f"tied to {tied} in the snapshot, not here"
                if tied
                else "tied to another tensor here, not in the snapshot"
            )
        if why:
            self._differences.note("reshaped", full, why)
            if number not in first_name:
                destinations.drop(number)
        first_name.setdefault(number, full)

    # --- optimizers -------------------------------------------------------------------------------
    def _optimizer(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        matcher = self._matcher
        parts = _fields(opaque.fields.mapping)
        node = matcher.take_node()
        if live is ABSENT:
            return self._new_optimizer(opaque, parts, path, node)
        if not isinstance(live, torch.optim.Optimizer) or type_name(type(live)) != opaque.type_name:
            self._differences.note(
                "reshaped", path, f"{opaque.type_name} in the snapshot, {_kind(live)} here"
            )
            matcher.leave_parts(opaque)
            return lambda: live
        self._adopt(parts["param_groups"].sequence, live)
        self._orphans(parts["parameters"].mapping, path)
        self._compare_groups(parts["param_groups"].sequence, live, path)
        groups = self._groups(parts["param_groups"], live.param_groups, f"{path}.param_groups")
        state = self._state(parts["state"], live, path)
        attributes = matcher.pairs(parts["attributes"].mapping, vars(live), path)

        def build() -> torch.optim.Optimizer:
            matcher.set_node(node, live)
            groups()
            state()
            for name, builder in attributes:
                vars(live)[name] = builder()
            return live

        return build

    def _groups(self, value: pb.Value, live: list[dict[str, Any]], path: str) -> Builder:
        """Groups keep their dictionaries and their lists of parameters; all else in them is put back."""
        matcher = self._matcher
        node = matcher.take_node()
        builders: list[Builder] = []
        for index, saved in enumerate(value.sequence.items):
            if index >= len(live):
                matcher.leave(saved)
            elif saved.WhichOneof("kind") == "mapping":
                builders.append(self._group(saved.mapping, live[index], f"{path}.{index}"))

        def build() -> list[dict[str, Any]]:
            matcher.set_node(node, live)
            for builder in builders:
                builder()
            return live

        return build

    def _group(self, mapping: pb.Mapping, live: dict[str, Any], path: str) -> Builder:
        matcher = self._matcher
        node = matcher.take_node()
        members = live["params"]
        pairs: list[tuple[Any, Builder]] = []
        for key, saved in zip(mapping.keys, mapping.values, strict=True):
            name = matcher.key(key)
            if name == "params" and saved.WhichOneof("kind") == "sequence":
                # an attribute may be the same list (LBFGS)
                matcher.set_node(matcher.take_node(), members)
                pairs.append((name, lambda: members))
            else:
                pairs.append((name, matcher.match(saved, live.get(name, ABSENT), f"{path}.{name}")))

        def build() -> dict[str, Any]:
            matcher.set_node(node, live)
            items = [(name, builder()) for name, builder in pairs]
            live.clear()
            live.update(items)
            return live

        return build

    def _state(self, value: pb.Value, live: torch.optim.Optimizer, path: str) -> Builder:
        """`optimizer.state` is a defaultdict of the class's own making: kept, emptied and filled."""
        matcher = self._matcher
        node = matcher.take_node()
        state: Any = live.state
        pairs = matcher.pairs(value.mapping, dict(state), f"{path}.state")

        def build() -> None:
            matcher.set_node(node, state)
            items = [(key, builder()) for key, builder in pairs]
            left = [(key, item) for key, item in state.items() if self._is_only_here(key)]
            state.clear()
            state.update(items + left)

        return build

    def _is_only_here(self, key: object) -> bool:
        """State of a parameter that the snapshot does not have stays, where allow_partial let it pass."""
        name = self._matcher.names.name_of(key)
        return name is not None and all(saved.name != name for saved in self._matcher.layout.parameters)

    def _parameter(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        """An object's own parameter."""
        matcher = self._matcher
        matcher.take_node()
        fields = _fields(opaque.fields.mapping)
        number, tensor = fields["number"].parameter, fields["tensor"].tensor
        known = matcher.live_parameter(number)
        if known is None and isinstance(live, nn.Parameter) and matcher.destinations.claim(tensor, live):
            matcher.adopt(number, live)
        elif known is None or not matcher.destinations.claim(tensor, known):
            matcher.parameter_tensors[number] = tensor
        return lambda: matcher.parameter(number)

    def _adopt(self, sequence: pb.Sequence, live: torch.optim.Optimizer) -> None:
        """Parameters of an optimizer inside another object are known by their places in it."""
        for saved, group in zip(sequence.items, live.param_groups, strict=False):
            if saved.WhichOneof("kind") == "mapping":
                members = _fields(saved.mapping)["params"].sequence.items
                for item, parameter in zip(members, group["params"], strict=False):
                    if item.WhichOneof("kind") == "parameter":
                        self._matcher.adopt(item.parameter, parameter)

    def _orphans(self, mapping: pb.Mapping, path: str) -> None:
        """Parameters that came with the optimizer because no module has them."""
        matcher = self._matcher
        for key, saved in zip(mapping.keys, mapping.values, strict=True):
            live = matcher.live_parameter(key.parameter)
            name = matcher.layout.parameters[key.parameter].name
            if live is None:
                matcher.parameter_tensors[key.parameter] = saved.tensor
                continue
            why = matcher.destinations.difference(saved.tensor, live)
            if not why and not matcher.destinations.claim(saved.tensor, live):
                why = "shared with another tensor here"
            if why:
                self._differences.note("reshaped", name, why)

    def _compare_groups(self, sequence: pb.Sequence, live: torch.optim.Optimizer, path: str) -> None:
        """Which parameters are in which group, in which order: sums over them depend on it."""
        if len(sequence.items) != len(live.param_groups):
            why = f"{len(sequence.items)} groups in the snapshot, {len(live.param_groups)} here"
            self._differences.note("reshaped", f"{path}.param_groups", why)
            return
        for index, (saved, group) in enumerate(zip(sequence.items, live.param_groups, strict=True)):
            if saved.WhichOneof("kind") == "alias":
                continue  # the groups of an optimizer around this one, compared there
            fields = _fields(saved.mapping)
            members = fields["params"].sequence.items if "params" in fields else []
            numbers = [item.parameter for item in members if item.WhichOneof("kind") == "parameter"]
            there = [self._matcher.live_parameter(number) for number in numbers]
            if [id(parameter) for parameter in there] != [id(parameter) for parameter in group["params"]]:
                why = group_difference(there, live.param_groups, index)
                self._differences.note("reshaped", f"{path}.param_groups.{index}.params", why)

    def _new_optimizer(self, opaque: pb.Opaque, parts: dict[str, pb.Value], path: str, node: int) -> Builder:
        """An optimizer inside another's state that does not exist yet."""
        matcher = self._matcher
        cls = find_class(opaque.type_name)
        if cls is None or not issubclass(cls, torch.optim.Optimizer) or not matcher.vouched.allows(cls):
            self._differences.note(
                "missing", path, f"{opaque.type_name} is not imported here, or nobody vouches for it"
            )
            matcher.leave_parts(opaque)
            return lambda: None
        self._orphans(parts["parameters"].mapping, path)
        groups = matcher.match(parts["param_groups"], ABSENT, f"{path}.param_groups")
        state_node = matcher.take_node()
        state = matcher.pairs_made(parts["state"].mapping, f"{path}.state")
        attributes = matcher.pairs(parts["attributes"].mapping, {}, path)

        def build() -> torch.optim.Optimizer:
            made: Any = cls.__new__(cls)
            matcher.set_node(node, made)
            kept: Any = torch.optim.SGD([torch.zeros(1)], lr=0.0).state.copy()
            matcher.set_node(state_node, kept)
            torch.optim.Optimizer.__setstate__(
                made, {"defaults": {}, "state": kept, "param_groups": groups()}
            )
            kept.update((key(), builder()) for key, builder in state)
            for name, builder in attributes:
                if name not in SKIPPED_ATTRIBUTES or name == "defaults":
                    vars(made)[name] = builder()
            return made  # type: ignore[no-any-return]

        return build

    # --- objects that tell their own state --------------------------------------------------------
    def _loader(self, opaque: pb.Opaque, live: object, path: str) -> Builder:
        node = self._matcher.take_node()
        if not is_loader(live):
            self._differences.note(
                "reshaped", path, f"{opaque.type_name} in the snapshot, {_kind(live)} here"
            )
            return lambda: live
        if self._elastic is None or self._elastic.world_size == self._world_size:
            return self._later(node, opaque, live, lambda state: restore_loader(live, state))
        return self._resharded(node, opaque, live, path, self._elastic)

    def _resharded(self, node: int, opaque: pb.Opaque, live: object, path: str, elastic: Elastic) -> Builder:
        """A position in the data, for another number of ranks: only as the user says."""
        how = elastic.reshard.get(path)
        if how is None:
            why = (
                f"the position in the data of {elastic.world_size} ranks, {self._world_size} here:"
                f' pass reshard={{{path!r}: "keep" or a function}}, or allow_partial={[path]!r} to begin anew'
            )
            self._differences.note("reshaped", path, why)
            self._matcher.set_node(node, live)
            return lambda: live
        if not callable(how):
            return self._later(node, opaque, live, lambda state: restore_loader(live, state))

        def load(state: dict[str, Any]) -> None:
            states = [one["state"] for one in saved_states(elastic, path, self._matcher.vouched)]
            mine = how(states, self._rank, self._world_size)
            restore_loader(live, {**state, "state": mine})

        return self._later(node, opaque, live, load)

    def _state_dict(self, opaque: pb.Opaque, live: Any, path: str) -> Builder:
        node = self._matcher.take_node()
        if type_name(type(live)) != opaque.type_name or not hasattr(live, "load_state_dict"):
            self._differences.note(
                "reshaped", path, f"{opaque.type_name} in the snapshot, {_kind(live)} here"
            )
            return lambda: live
        return self._later(node, opaque, live, lambda state: live.load_state_dict(state))

    def _later(self, node: int, opaque: pb.Opaque, live: object, load: Any) -> Builder:
        number = opaque.fields.scalar

        def build() -> object:
            self._matcher.set_node(node, live)
            self.late.append(lambda: load(self._matcher.decode(number)))
            return live

        return build


def _holds_objects(value: pb.Value) -> bool:
    """Whether a container of the user's mapping holds modules, optimizers or the like."""
    items = value.mapping.values if value.WhichOneof("kind") == "mapping" else value.sequence.items
    return any(
        item.WhichOneof("kind") == "tensor"
        or (item.WhichOneof("kind") == "opaque" and item.opaque.how in _ENTRY_KINDS)
        or (item.WhichOneof("kind") in ("mapping", "sequence") and _holds_objects(item))
        for item in items
    )


def _kind(live: object) -> str:
    return "nothing" if live is ABSENT else type_name(type(live))


def _fields(mapping: pb.Mapping) -> dict[str, pb.Value]:
    """A mapping with text as keys."""
    return {key.text: item for key, item in zip(mapping.keys, mapping.values, strict=True)}
