"""Trees that objects give as their state: written anew at each capture, but for their large tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from snapd_proto.format_pb2 import Value

from .encode import Encoder
from .tensors import component_names

if TYPE_CHECKING:
    from .structure import Structure

INLINE_BYTES_MAX = 16 << 10  # a generator's state is 5 KB


def big_tensors(tree: Any, path: str) -> list[tuple[str, torch.Tensor]]:
    """Tensors that are captured as such, not by value; in order, each object once."""
    found: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()

    def visit(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            if id(value) not in seen and (value.nbytes > INLINE_BYTES_MAX or component_names(value)):
                seen.add(id(value))
                found.append((name, value))
        elif isinstance(value, Mapping):
            if id(value) not in seen:
                seen.add(id(value))
                for key, item in value.items():
                    visit(item, f"{name}.{key}")
        elif isinstance(value, list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for index, item in enumerate(value):
                visit(item, f"{name}.{index}")

    visit(tree, path)
    return found


class DynamicEncoder(Encoder):
    """Writes such a tree; large tensors refer to the records that the full walk made for them."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure.vouched)
        self._structure = structure

    def on_tensor(self, value: torch.Tensor, out: Value, path: str, at: int) -> None:
        parameter = self._structure.names.number_of.get(id(value))
        record = self._structure.dynamic.get(id(value))
        if parameter is not None:
            out.parameter = parameter
        elif record is not None:
            out.tensor = record
        else:
            super().on_tensor(value, out, path, at)
