"""Which tensors of a shard go into its exported file, under which names and in which form. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from snapd_proto import format_pb2

from snapd.export.dtypes import StoredType, stored_type
from snapd.export.safetensors_file import Entry
from snapd.export.shard_bytes import bad_shard
from snapd.export.shard_view import exported_names, has_bytes, holder_rank, itemsize
from snapd.export.strides import is_row_major


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as it is written: row-major, under its exported name."""

    number: int  # index into ShardLayout.tensors
    name: str
    stored_type: StoredType
    shape: list[int]  # of the manifest
    strides: list[int]
    holder_rank: int  # in whose shard the bytes lie
    shard_offset: int  # of the first element, in the holder's shard
    span_nbytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored_type.itemsize

    @property
    def is_row_major(self) -> bool:
        return is_row_major(self.shape, self.strides)

    @property
    def entry(self) -> Entry:
        shape = self.stored_type.stored_shape(self.shape)
        return Entry(name=self.name, dtype=self.stored_type.name, shape=shape, nbytes=self.nbytes)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What one rank's safetensors file holds."""

    stored: list[StoredTensor]  # in the order of the file
    aliases: dict[str, str]  # exported name -> the name under which the very same bytes are stored
    overlapping: list[list[str]]  # names of tensors that are views of common bytes, each stored on its own
    names: dict[int, str]  # tensor number -> exported name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)


@dataclass(frozen=True)
class _Holder:
    """Another rank's layout, with its tensors by name."""

    layout: format_pb2.ShardLayout
    tensors: Mapping[str, format_pb2.Tensor]

    @staticmethod
    def of(layout: format_pb2.ShardLayout) -> _Holder:
        return _Holder(layout, {tensor.name: tensor for tensor in layout.tensors if has_bytes(tensor)})


def contents_of(
    layout: format_pb2.ShardLayout, layouts: Mapping[int, format_pb2.ShardLayout] | None = None
) -> Contents:
    """Choose names and forms for all tensors of a checked layout.

    Tensors that are the same view of the same bytes are stored once. Elements of larger size come first in
    the file, so that each tensor is aligned to its element; within a size the order is that of the shard.

    Args:
        layouts: of the ranks that keep bytes for this one (replicas of one node share the work), by rank.
    Raises:
        IntegrityError: a tensor's span does not fit its element type, or the rank that should keep its bytes
            does not have it.
    """
    others = {rank: _Holder.of(other) for rank, other in (layouts or {}).items() if rank != layout.rank}
    names = exported_names(layout)
    candidates = [_stored_tensor(layout, number, name, others) for number, name in names.items()]
    aliases: dict[str, str] = {}
    kept: list[StoredTensor] = []
    first_of: dict[tuple[object, object], str] = {}
    for tensor in candidates:
        place = (tensor.holder_rank, tensor.shard_offset, tensor.span_nbytes)
        form = (tuple(tensor.shape), tuple(tensor.strides), layout.tensors[tensor.number].dtype)
        key = (place, form)
        if tensor.span_nbytes and key in first_of:
            aliases[tensor.name] = first_of[key]
        else:
            first_of.setdefault(key, tensor.name)
            kept.append(tensor)
    kept.sort(key=lambda t: (-t.stored_type.itemsize, t.holder_rank, t.shard_offset))
    return Contents(stored=kept, aliases=aliases, overlapping=_overlapping(kept), names=names)


def _stored_tensor(
    layout: format_pb2.ShardLayout,
    number: int,
    name: str,
    others: Mapping[int, _Holder],
) -> StoredTensor:
    tensor = layout.tensors[number]
    form = stored_type(tensor.dtype)
    size = itemsize(tensor)
    if size and size != form.itemsize:
        if form.is_exact:
            what = f"layout: tensor {tensor.name!r}: {size} bytes per element of type {tensor.dtype}"
            raise bad_shard(layout.rank, None, what)
        form = StoredType(name="U8", itemsize=size, is_exact=False)
    rank, shard_offset = _place(layout, tensor, others) if tensor.nbytes else (layout.rank, 0)
    return StoredTensor(
        number=number,
        name=name,
        stored_type=form,
        shape=list(tensor.shape),
        strides=list(tensor.strides),
        holder_rank=rank,
        shard_offset=shard_offset,
        span_nbytes=tensor.nbytes,
    )


def _place(
    layout: format_pb2.ShardLayout, tensor: format_pb2.Tensor, others: Mapping[int, _Holder]
) -> tuple[int, int]:
    """(rank, offset in its shard) of the tensor's first byte. Another rank has it under the same name."""
    rank = holder_rank(layout, tensor)
    if rank == layout.rank:
        return rank, layout.regions[tensor.region].shard_offset + tensor.region_offset
    theirs = others[rank].tensors.get(tensor.name) if rank in others else None
    if theirs is not None:
        region = others[rank].layout.regions[theirs.region]
        if _form(theirs) == _form(tensor) and not region.held_by_rank_plus_one:
            return rank, region.shard_offset + theirs.region_offset
    what = f"layout: the bytes of {tensor.name!r} should lie in the shard of rank {rank}, but do not"
    raise bad_shard(layout.rank, None, what)


def _form(tensor: format_pb2.Tensor) -> tuple[str, list[int], list[int]]:
    return tensor.dtype, list(tensor.shape), list(tensor.strides)


def _overlapping(tensors: Iterable[StoredTensor]) -> list[list[str]]:
    """Groups of tensors whose spans have bytes in common."""
    groups: list[list[str]] = []
    end = (-1, 0)  # (holder rank, shard offset) where the last group ends
    for tensor in sorted(tensors, key=lambda t: (t.holder_rank, t.shard_offset)):
        if not tensor.span_nbytes:
            continue
        start = (tensor.holder_rank, tensor.shard_offset)
        stop = (tensor.holder_rank, tensor.shard_offset + tensor.span_nbytes)
        if start < end and start[0] == end[0]:
            groups[-1].append(tensor.name)
            end = max(end, stop)
        else:
            groups.append([tensor.name])
            end = stop
    return [group for group in groups if len(group) > 1]
