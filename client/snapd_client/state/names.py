"""Which parameter is called what, and which fence it lies behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .classes import Vouched
from .modules import BoundModule, Managed, bind, fsdp_params, managed_parameters
from .records import NO_OPTIMIZER, ParameterRecord

FENCE_GROUPS_MAX = 255


def entries(value: object, path: str) -> Iterator[tuple[str, object]]:
    """What the user's mapping holds at any depth of dicts, lists and tuples, each object once."""
    seen: set[int] = set()

    def visit(item: Any, name: str) -> Iterator[tuple[str, object]]:
        if id(item) in seen:
            return
        if isinstance(item, Mapping):
            seen.add(id(item))
            for key, inner in item.items():
                yield from visit(inner, f"{name}.{key}" if name else str(key))
        elif type(item) in (list, tuple):
            seen.add(id(item))
            for index, inner in enumerate(item):
                yield from visit(inner, f"{name}.{index}" if name else str(index))
        else:
            if isinstance(item, nn.Module | torch.optim.Optimizer):
                seen.add(id(item))
            yield name, item

    return visit(value, path)


class Names:
    """Built once, and again when a module has got other parameters than it had."""

    def __init__(self, state: Mapping[str, object], vouched: Vouched) -> None:
        self.vouched = vouched
        self.parameters: list[ParameterRecord] = []
        self.number_of: dict[int, int] = {}  # id of a parameter -> index into `parameters`
        self.tensors: list[nn.Parameter] = []  # keeps the ids valid
        self.modules: dict[int, BoundModule] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.orphans: set[int] = set()
        self._roots: list[tuple[str, nn.Module]] = []
        self.managed: Managed = {}
        self.fsdp_records: list[Any] = []
        found = list(entries(state, ""))
        for path, item in found:
            if isinstance(item, nn.Module):
                self._bind_module(path, item)
        for path, item in found:
            # one that cannot be hooked has no fence
            if isinstance(item, torch.optim.Optimizer) and hasattr(item, "_optimizer_step_pre_hooks"):
                self._bind_optimizer(path, item)
        self._fence_groups = self._join_fences()
        for record in self.parameters:
            if record.optimizer != NO_OPTIMIZER:
                record.fence_group = self._fence_groups[record.optimizer]
        self.by_name = {
            record.name: tensor for record, tensor in zip(self.parameters, self.tensors, strict=True)
        }
        self.by_place = {
            (record.optimizer, record.group, record.index): tensor
            for record, tensor in zip(self.parameters, self.tensors, strict=True)
        }

    def name_of(self, key: object) -> str | None:
        """The name of a parameter; None for anything else."""
        number = self.number_of.get(id(key))
        return None if number is None else self.parameters[number].name

    def fence_group(self, index: int) -> int:
        """What the fence of optimizer number `index` waits for; optimizers that share a parameter share a
        group.
        """
        return self._fence_groups[index]

    def fence_group_of(self, optimizer: torch.optim.Optimizer, path: str, otherwise: int) -> int:
        """The group of an optimizer; that of the one around it if it is not in the user's mapping itself."""
        for index, known in enumerate(self.optimizers):
            if known is optimizer:
                return self._fence_groups[index]
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if id(parameter) not in self.number_of:
                    self.orphans.add(self._number(parameter, f"{path}.params.{index}"))
        return otherwise

    def module_name(self, module: nn.Module) -> str | None:
        """The qualified name of a module below one of the mapping; None for others."""
        return self._module_names.get(id(module))

    def module_of(self, name: str) -> nn.Module | None:
        return next((module for module, known in self._named_modules if known == name), None)

    @functools.cached_property
    def _named_modules(self) -> list[tuple[nn.Module, str]]:
        return [
            (module, f"{path}.{name}" if name else path)
            for path, root in self._roots
            for name, module in root.named_modules()
        ]

    @functools.cached_property
    def _module_names(self) -> dict[int, str]:
        return {id(module): name for module, name in reversed(self._named_modules)}

    def adopt(self, parameter: nn.Parameter, name: str) -> int:
        """Number a parameter that is found inside another object."""
        return self._number(parameter, name)

    def _bind_module(self, path: str, module: nn.Module) -> None:
        self._roots.append((path, module))
        records = fsdp_params(module)
        self.fsdp_records.extend(records)
        self.managed.update(managed_parameters(records))
        bound = bind(module, self.managed)
        self.modules[id(module)] = bound
        for name, parameter in bound.parameters:
            number = self._number(parameter, f"{path}.{name}")
            self.parameters[number].replica_ranks = bound.replica_ranks.get(id(parameter), ())

    def _bind_optimizer(self, path: str, optimizer: torch.optim.Optimizer) -> None:
        index = len(self.optimizers)
        self.optimizers.append(optimizer)
        for group_index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                known = id(parameter) in self.number_of
                number = self._number(parameter, f"{path}.params.{group_index}.{place}")
                record = self.parameters[number]
                if not known:
                    self.orphans.add(number)
                if record.optimizer == NO_OPTIMIZER:
                    record.optimizer, record.group, record.index = index, group_index, place

    def _number(self, parameter: nn.Parameter, name: str) -> int:
        number = self.number_of.get(id(parameter))
        if number is None:
            number = self.number_of[id(parameter)] = len(self.parameters)
            self.parameters.append(ParameterRecord(name))
            self.tensors.append(parameter)
        return number

    def _join_fences(self) -> list[int]:
        """Optimizers that update the same parameter wait for each other's bytes: one group for them all."""
        root = list(range(len(self.optimizers)))
        first_with: dict[int, int] = {}
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    other = first_with.setdefault(id(parameter), index)
                    old, new = root[index], root[other]
                    if old != new:
                        root = [new if value == old else value for value in root]
        return [1 + value % FENCE_GROUPS_MAX for value in root]
