"""DTensors of a snapshot and of the live state: whether they are cut alike, and how one is made anew."""

from __future__ import annotations

import re

import torch
from snapd_proto import format_pb2 as pb
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..errors import IntegrityError


def spec_difference(saved: pb.Distributed, live: DTensor) -> str:
    """How the live tensor is distributed otherwise than the saved one; empty if alike."""
    mesh = live.device_mesh
    if list(saved.mesh_shape) != list(mesh.shape):
        return f"mesh {list(saved.mesh_shape)} in the snapshot, {list(mesh.shape)} here"
    placements = [str(placement) for placement in live.placements]
    if list(saved.placements) != placements:
        return f"placements {list(saved.placements)} in the snapshot, {placements} here"
    if list(saved.mesh_coordinate) != list(mesh.get_coordinate() or ()):
        return f"mesh coordinate {list(saved.mesh_coordinate)} in the snapshot, {mesh.get_coordinate()} here"
    return ""


def read_placement(text: str) -> Placement:
    """The inverse of `str(placement)` for the placements that torch documents."""
    if text == "R":
        return Replicate()
    if match := re.fullmatch(r"S\((-?\d+)\)", text):
        return Shard(int(match[1]))
    if match := re.fullmatch(r"P\((\w+)\)", text):
        return Partial(match[1])
    raise IntegrityError("a placement of the snapshot is not known here", placement=text)


def new_dtensor(saved: pb.Tensor, local: torch.Tensor, owner: torch.Tensor | None) -> DTensor:
    """A DTensor around `local`, on the mesh of the parameter that it belongs to."""
    if not isinstance(owner, DTensor):
        raise IntegrityError(
            "distributed state of a parameter that is not distributed here", tensor=saved.name
        )
    placements = [str(placement) for placement in owner.placements]
    chosen = (
        owner.placements if placements == list(saved.distributed.placements)
        else tuple(map(read_placement, saved.distributed.placements))
    )  # fmt: skip
    return DTensor.from_local(
        local,
        owner.device_mesh,
        chosen,
        run_check=False,
        shape=torch.Size(saved.shape),
        stride=tuple(saved.strides),
    )
