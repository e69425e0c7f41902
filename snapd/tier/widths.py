"""Of which width the elements in each chunk of a shard are, for the byte filter. Pure functions of a layout."""

from __future__ import annotations

from snapd_proto import format_pb2

from snapd.core.geometry import frames_for

MIXED = 1
FILTERED_WIDTHS = (2, 4, 8)
# Components are what the bytes are made of: a complex64 is two float32.
_COMPLEX_HALVES = {"complex32": 2, "complex64": 4, "complex128": 8}


def element_nbytes(tensor: format_pb2.Tensor) -> int:
    """Bytes of one element of a plain tensor; MIXED where a filter would not help, or the layout does not say."""
    if tensor.dtype in _COMPLEX_HALVES:
        return _COMPLEX_HALVES[tensor.dtype]
    elements = 1
    for size, stride in zip(tensor.shape, tensor.strides, strict=False):
        if size == 0:
            return MIXED
        elements += (size - 1) * max(stride, 0)
    width, rest = divmod(tensor.nbytes, elements)
    return width if not rest and width in FILTERED_WIDTHS else MIXED


def element_widths(layout: format_pb2.ShardLayout, chunk_count: int) -> tuple[int, ...]:
    """For each chunk of the shard the width of the elements that most of its bytes belong to; MIXED (1) where that is
    the layout, the early values, or bytes, and for chunks that the layout does not know.

    Tensors that begin anywhere else than at a multiple of their width count as mixed: planes would mix significances.
    """
    chunk_bytes = layout.chunk_bytes
    held: list[dict[int, int]] = [{} for _ in range(chunk_count)]
    if chunk_bytes <= 0:
        return (MIXED,) * chunk_count
    for start, nbytes, width in _runs(layout):
        end = start + nbytes
        for index in range(start // chunk_bytes, min(chunk_count, frames_for(end, chunk_bytes))):
            count = min(end, (index + 1) * chunk_bytes) - max(start, index * chunk_bytes)
            held[index][width] = held[index].get(width, 0) + count
    return tuple(
        max(widths, key=lambda width: (widths[width], -width)) if widths else MIXED for widths in held
    )


def _runs(layout: format_pb2.ShardLayout) -> list[tuple[int, int, int]]:
    """(offset in the shard, bytes, width) of what the shard itself holds; of views of one storage the first counts."""
    runs: dict[int, tuple[int, int, int]] = {}
    for tensor in layout.tensors:
        is_wrapper = tensor.HasField("subclass") or tensor.HasField("distributed")
        if is_wrapper or tensor.device.startswith("meta") or tensor.nbytes == 0:
            continue
        if tensor.region >= len(layout.regions) or layout.regions[tensor.region].held_by_rank_plus_one:
            continue
        start = layout.regions[tensor.region].shard_offset + tensor.region_offset
        width = element_nbytes(tensor)
        if start % width:
            width = MIXED
        if start not in runs or runs[start][1] < tensor.nbytes:
            runs[start] = (start, tensor.nbytes, width)
    values_end = layout.early_values_offset + layout.early_values_capacity
    return [(0, values_end, MIXED), *runs.values()]
