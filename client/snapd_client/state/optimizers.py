"""Optimizers by structure: what `load_state_dict` of torch would cast, stringify or lose is kept as it is.

Three parts: `param_groups` whole, `state` whole (keyed by parameter, and by whatever else), and the instance
attributes. Left out of the attributes: `defaults` (configuration; copied into the groups already), hooks,
caches of torch's own, and what `objects.is_skipped` names (functions, locks, modules, process groups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from snapd_proto.format_pb2 import Mapping, Sequence, Value

from ..errors import CaptureError
from .classes import package_of, type_name
from .program import FIXED
from .records import Place, Role

if TYPE_CHECKING:
    from .structure import Structure

SKIPPED_ATTRIBUTES = frozenset(
    {
        "state", "param_groups", "defaults",
        "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
        "_zero_grad_profile_name", "_hook_for_profile", "profile_hook_step",
        "_warned_capturable_if_run_uncaptured",
        "_opt_called",  # set by LRScheduler's wrapper to tell whether step() came first
        "step",  # LRScheduler puts a counting wrapper here
        "grad_scale", "found_inf",  # lent by GradScaler for the time of one step
    }
)  # fmt: skip


def optimizer_packages(optimizer: torch.optim.Optimizer) -> set[str]:
    """Top-level packages of an optimizer's class and of those that it derives from."""
    return {package_of(cls) for cls in type(optimizer).__mro__} - {"builtins", "typing", "abc"}


def is_structural(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the object keeps its state where an optimizer does; wrappers that never ran its `__init__` do not."""
    return isinstance(getattr(optimizer, "state", None), dict) and isinstance(optimizer.param_groups, list)


def write_optimizer(walk: Structure, optimizer: torch.optim.Optimizer, out: Value, path: str) -> None:
    """Raises CaptureError if the object keeps its state where it cannot be found."""
    if not is_structural(optimizer):
        raise CaptureError(
            f"{path} is an optimizer without `state` and `param_groups` of its own",
            type=type_name(type(optimizer)),
        )
    walk.vouched.add(*optimizer_packages(optimizer))
    walk.note(optimizer)
    outer_place, outer_entry = walk.place, walk.is_entry
    walk.is_entry = False
    walk.place = Place(Role.OPTIMIZER, group=walk.names.fence_group_of(optimizer, path, outer_place.group))
    out.opaque.type_name, out.opaque.how = type_name(type(optimizer)), "optimizer"
    mapping = out.opaque.fields.mapping
    mapping.type = Mapping.DICT
    _write_orphans(walk, optimizer, _part(mapping, "parameters"), path)
    _write_groups(walk, optimizer, _part(mapping, "param_groups"), path)
    _write_state(walk, optimizer, _part(mapping, "state"), path)
    _write_attributes(walk, optimizer, _part(mapping, "attributes"), path)
    walk.place, walk.is_entry = outer_place, outer_entry


def _part(mapping: Mapping, name: str) -> Value:
    mapping.keys.add().text = name
    return mapping.values.add()


def _write_orphans(walk: Structure, optimizer: torch.optim.Optimizer, out: Value, path: str) -> None:
    """Parameters that no module of the mapping has: their bytes come with the optimizer."""
    out.mapping.type = Mapping.DICT
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number = walk.names.number_of[id(parameter)]
            record = walk.parameters[number]
            if number in walk.names.orphans:
                place = Place(Role.PARAMETER, owner=record.name, group=record.fence_group)
                out.mapping.keys.add().parameter = number
                out.mapping.values.add().tensor = walk.tensor(parameter, record.name, place)


def _write_groups(walk: Structure, optimizer: torch.optim.Optimizer, out: Value, path: str) -> None:
    groups = optimizer.param_groups
    walk.note(groups)
    out.sequence.type = Sequence.LIST
    walk.watch(groups.copy)
    for index, group in enumerate(groups):
        walk.encode(group, out.sequence.items.add(), f"{path}.param_groups.{index}")


def _write_state(walk: Structure, optimizer: torch.optim.Optimizer, out: Value, path: str) -> None:
    state: dict[Any, Any] = optimizer.state
    walk.note(state)
    out.mapping.type = Mapping.DICT
    walk.watch(state.keys)
    first = walk.watch(state.values)
    place, number_of = walk.place, walk.names.number_of
    keys, values = out.mapping.keys, out.mapping.values
    for index, (key, value) in enumerate(state.items()):
        walk.key(key, keys.add(), path)
        number = number_of.get(id(key))
        owner = "" if number is None else walk.parameters[number].name
        prefix = f"{path}.state.{owner or walk.key_text(key)}"
        if type(value) is dict and not walk.knows(value):
            _write_fields(walk, value, values.add(), prefix, owner)
        else:
            walk.place = Place(
                Role.OPTIMIZER, owner=owner, field=str(key) if not owner else "", group=place.group
            )
            walk.encode(value, values.add(), prefix, first + index if first != FIXED else FIXED)
    walk.place = place


def _write_fields(walk: Structure, fields: dict[Any, Any], out: Value, prefix: str, owner: str) -> None:
    """One parameter's state: each field's tensors belong to a range of their own."""
    walk.note(fields)
    out.mapping.type = Mapping.DICT
    walk.watch(fields.keys)
    first = walk.watch(fields.values)
    group = walk.place.group
    keys, values = out.mapping.keys, out.mapping.values
    for index, (key, value) in enumerate(fields.items()):
        walk.key(key, keys.add(), prefix)
        name = key if type(key) is str else walk.key_text(key)
        walk.place = Place(Role.OPTIMIZER, owner=owner, field=name, group=group)
        if isinstance(value, torch.Tensor):
            walk.on_tensor(value, values.add(), f"{prefix}.{name}", first + index)
        else:
            walk.encode(value, values.add(), f"{prefix}.{name}", first + index)


def _write_attributes(walk: Structure, optimizer: torch.optim.Optimizer, out: Value, path: str) -> None:
    attributes = vars(optimizer)
    out.mapping.type = Mapping.DICT
    walk.watch(attributes.keys)
    first = walk.watch(attributes.values)
    for index, (name, value) in enumerate(attributes.items()):
        if name in SKIPPED_ATTRIBUTES:
            if name not in ("state", "param_groups"):
                walk.program.free_of_any(first + index)
            continue
        out.mapping.keys.add().text = name
        walk.encode(value, out.mapping.values.add(), f"{path}.{name}", first + index)


def group_difference(saved: list[torch.nn.Parameter | None], groups: list[dict[str, Any]], index: int) -> str:
    """How the parameters of a saved group differ from those of the live one, and what to do about it.

    Args:
        saved: their live counterparts; None: not here.
    """
    here = [{id(parameter) for parameter in group["params"]} for group in groups]
    wanted = {id(parameter) for parameter in saved}
    if wanted == here[index]:
        return "the same parameters in another order: give them in the order in which they were saved"
    if wanted in here:
        return (
            f"they are group {here.index(wanted)} here: give the groups in the order in which they were saved;"
            " schedulers go by it"
        )
    return f"{len(saved)} in the snapshot, {len(here[index])} others here"
