"""The layout as a message: everything that a restore needs to know, in another process and another year."""

from __future__ import annotations

from typing import Any

import torch
from snapd_proto import format_pb2 as pb

from ..version import VERSION
from .encode import encode_plain
from .pieces import Pieces
from .placing import box_at
from .records import TensorRecord
from .regions import Plan
from .replicas import Replicas
from .tensors import dtype_names
from .tree import StateTree, Walk

FORMAT_VERSION = 1


def serialize_layout(tree: StateTree, walk: Walk, plan: Plan, pieces: Pieces, capacity: int) -> bytes:
    structure = walk.structure
    message = pb.ShardLayout(
        format_version=FORMAT_VERSION,
        job=tree.job,
        rank=tree.rank,
        world_size=tree.world_size,
        chunk_bytes=pieces.chunk_bytes,
        early_values_offset=pieces.early_values_offset,
        early_values_capacity=capacity,
        skeleton=structure.skeleton,
        client_version=VERSION,
        torch_version=torch.__version__,
    )
    add_region = message.regions.add
    for region, offset in zip(plan.regions, pieces.region_offset, strict=True):
        add_region(
            shard_offset=offset,
            nbytes=region.nbytes,
            when=pb.Region.EARLY if region.is_early else pb.Region.LAZY,
            range_name=region.range_name,
            held_by_rank_plus_one=0 if region.holder is None else region.holder + 1,
        )
    replicas = Replicas(structure.parameters)
    devices: dict[torch.device, str] = {}
    for record in structure.records:
        _add_tensor(message.tensors, record, plan, devices, replicas, tree)
    for parameter in structure.parameters:
        message.parameters.add(
            name=parameter.name, optimizer=parameter.optimizer, group=parameter.group, index=parameter.index
        )
    for name, start, nbytes in pieces.ranges:
        message.ranges.add(name=name, shard_offset=start, nbytes=nbytes)
    return message.SerializeToString()


def _add_tensor(
    tensors: Any,
    record: TensorRecord,
    plan: Plan,
    devices: dict[torch.device, str],
    replicas: Replicas,
    tree: StateTree,
) -> None:
    place = record.place
    device = devices.get(record.device)
    if device is None:
        device = devices[record.device] = str(record.device)
    tensor = tensors.add(
        name=record.name,
        dtype=dtype_names[record.dtype],
        shape=record.shape,
        strides=record.strides,
        nbytes=record.nbytes,
        device=device,
        requires_grad=record.requires_grad,
        is_parameter=record.is_parameter,
        is_frozen=record.is_frozen,
        role=place.role.value,
        field=place.field,
        parameter_name=place.owner,
    )
    buffer = record.buffer
    if buffer >= 0:
        tensor.region = plan.region_of[buffer]
        tensor.region_offset = plan.offset_of[buffer]
        tensor.storage_alias = plan.alias_of[buffer]
        tensor.storage_offset = plan.storage_offset_of[buffer]
        if record.is_gathered:
            tensor.live_strides.extend(record.live_strides)
    elif record.spec is not None:
        _add_distributed(tensor, record)
    else:
        _add_subclass(tensor, record, tree)
    ranks = replicas.ranks(record)
    if ranks:
        tensor.replica_set.ranks.extend(ranks)


def _add_components(tensor: pb.Tensor, record: TensorRecord) -> None:
    tensor.subclass.type_name = record.type_name
    for attribute, number in record.components:
        tensor.subclass.components.add(attribute=attribute, tensor=number)


def _add_subclass(tensor: pb.Tensor, record: TensorRecord, tree: StateTree) -> None:
    _add_components(tensor, record)
    tensor.subclass.context.CopyFrom(
        encode_plain(record.context, tree.vouched, f"{record.name} (its context)")
    )


def _add_distributed(tensor: pb.Tensor, record: TensorRecord) -> None:
    """Of a DTensor `shape` and `strides` are global too; its component has the local ones."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _add_components(tensor, record)
    spec = record.spec
    mesh = spec.mesh
    box = box_at(record.shape, mesh.shape, list(map(str, spec.placements)), mesh.get_coordinate() or ())
    if box is not None and 0 not in box.shape:
        offset = box.offset
    else:
        _, offset = compute_local_shape_and_global_offset(record.shape, mesh, spec.placements)
    tensor.global_shape.extend(record.shape)
    tensor.local_offset.extend(offset)
    distributed = tensor.distributed
    distributed.mesh_shape.extend(mesh.shape)
    distributed.mesh_dim_names.extend(mesh.mesh_dim_names or ())
    distributed.placements.extend(str(placement) for placement in spec.placements)
    distributed.mesh_coordinate.extend(mesh.get_coordinate() or ())
    distributed.mesh_ranks.extend(mesh.mesh.flatten().tolist())
