"""What a walk knows about each tensor, parameter and leaf. Plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

NO_OPTIMIZER = 0xFFFFFFFF


class Role(enum.StrEnum):
    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer"
    GRADIENT = "gradient"
    OTHER = "other"


class Place:
    """Where in the tree the walk is: what the tensors found there are for."""

    __slots__ = ("field", "group", "is_frozen", "owner", "role")

    def __init__(
        self, role: Role, *, owner: str = "", field: str = "", group: int = 0, is_frozen: bool = False
    ) -> None:
        self.role, self.owner, self.field, self.group = role, owner, field, group
        self.is_frozen = is_frozen


class TensorRecord:
    """One tensor of the tree, plain or a wrapper. `buffer` is its index in Walk.buffers, -1 for a wrapper."""

    __slots__ = (
        "around", "buffer", "components", "context", "device", "dtype", "is_frozen", "is_gathered", "is_parameter",
        "live_strides", "name", "nbytes", "place", "requires_grad", "shape", "slot", "spec", "strides", "type_name",
    )  # fmt: skip

    def __init__(self, name: str, tensor: torch.Tensor, place: Place) -> None:
        self.name, self.place = name, place
        self.dtype, self.shape, self.strides = tensor.dtype, tensor.shape, tensor.stride()
        self.device = tensor.device
        self.requires_grad = tensor.requires_grad
        self.is_parameter = place.role is Role.PARAMETER
        self.is_frozen = place.is_frozen
        self.is_gathered = False
        self.live_strides: tuple[int, ...] = ()  # of a gathered tensor
        self.nbytes = 0
        self.buffer = -1
        self.slot = -1  # of an outermost tensor: its number in the program
        self.components: list[tuple[str, int]] = []
        self.context: object = None  # of a subclass: what __tensor_flatten__ says beside the attributes
        self.spec: Any = None  # of a DTensor: mesh, placements, global shape
        self.around: Any = None  # of a component: the spec of the DTensor around it
        self.type_name = ""

    def is_like(self, other: TensorRecord) -> bool:
        return (
            self.name == other.name
            and self.dtype == other.dtype
            and self.shape == other.shape
            and self.strides == other.strides
            and self.device == other.device
            and self.type_name == other.type_name
            and self.nbytes == other.nbytes
            and self.place.group == other.place.group
            and self.is_frozen == other.is_frozen
            and self.spec == other.spec
        )


@dataclass(slots=True)
class ParameterRecord:
    """A parameter by name and by place: the key of optimizer state."""

    name: str
    optimizer: int = NO_OPTIMIZER
    group: int = 0
    index: int = 0
    fence_group: int = 0
    replica_ranks: tuple[int, ...] = ()
