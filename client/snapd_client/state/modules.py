"""Modules: which tensors they hold, by qualified name.

Names are bound to the sharded parameters: FSDP2 shows a module's unsharded parameters while they are gathered
(after an evaluation its root stays so), but its bookkeeping always knows the sharded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class BoundModule:
    """A module's tensors at the time of binding; a tied parameter has several names."""

    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    buffers: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    extra: list[tuple[str, nn.Module]] = field(default_factory=list)
    replica_ranks: dict[int, tuple[int, ...]] = field(default_factory=dict)  # id of a parameter -> ranks


Managed = dict[tuple[int, str], nn.Parameter]


def fsdp_params(root: nn.Module) -> list[Any]:
    """FSDP2's records of the parameters that it manages below `root`."""
    found: list[Any] = []
    for module in root.modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            single = getattr(state, "_fsdp_param_group", None)
            groups = [] if single is None else [single]
        for group in groups:
            found.extend(group.fsdp_params)
    return found


def managed_parameters(records: list[Any]) -> Managed:
    """(id of the owning module, attribute name) -> the sharded parameter."""
    managed: Managed = {}
    for record in records:
        info = record._module_info
        managed[id(info.module), info.param_name] = record.sharded_param
        for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
            managed[id(module), name] = record.sharded_param
    return managed


def bind(root: nn.Module, managed: Managed) -> BoundModule:
    """Walk the module tree once."""
    bound = BoundModule()
    replicas: list[tuple[str, tuple[int, ...], set[str]]] = []
    for prefix, module in root.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            ranks = tuple(torch.distributed.get_process_group_ranks(module.process_group))
            apart = {f"{dot}module.{name}" for name in module.parameters_to_ignore}
            replicas.append((dot, ranks, apart))
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            kept = managed.get((id(module), name), parameter)
            bound.parameters.append((dot + name, kept))
            for start, ranks, apart in replicas:
                if dot.startswith(start) and dot + name not in apart:
                    bound.replica_ranks[id(kept)] = ranks
        for name, buffer in module._buffers.items():
            if buffer is not None:
                bound.buffers.append((dot + name, buffer))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            bound.extra.append((f"{dot}_extra_state", module))
    return bound


def containers(root: nn.Module) -> Iterator[tuple[Callable[[], Any], nn.Module, str]]:
    """Every dictionary that holds the module tree together: (reader, owner, kind)."""
    for module in root.modules():
        yield module._parameters.keys, module, "names"
        yield module._parameters.values, module, "parameters"
        yield module._buffers.keys, module, "names"
        yield module._buffers.values, module, "buffers"
        yield module._modules.values, module, "modules"


def reshard(root: nn.Module) -> None:
    """Let FSDP2 forget gathered copies of parameters that were just written."""
    for module in root.modules():
        give_up = getattr(module, "reshard", None)
        if give_up is not None and hasattr(module, "_get_fsdp_state"):
            give_up()
