"""What a shard contains: its layout, parsed and checked, and where each tensor lies.

Bytes come through `ShardBytes`; everything else here is a pure function of the layout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from google.protobuf.message import DecodeError
from snapd_proto import format_pb2

from snapd.export.shard_bytes import ShardBytes, bad_shard
from snapd.export.strides import span_elements

LAYOUT_BYTES_MAX = 1 << 29
FORMAT_VERSION_MAX = 1


@dataclass(frozen=True)
class ShardView:
    """One rank's part of a snapshot, readable."""

    bytes_of: ShardBytes
    layout: format_pb2.ShardLayout
    early: format_pb2.EarlyValues

    @property
    def record(self) -> format_pb2.ShardRecord:
        return self.bytes_of.record

    @cached_property
    def names(self) -> dict[int, str]:
        return exported_names(self.layout)


def open_shard(bytes_of: ShardBytes) -> ShardView:
    """Read and check the layout and the early values of a shard.

    Raises:
        IntegrityError: their chunks are bad, they cannot be parsed, or they contradict the record.
    """
    layout = read_layout(bytes_of)
    record = bytes_of.record
    early = format_pb2.EarlyValues()
    _parse(
        early,
        bytes_of.read(record.early_values_offset, record.early_values_nbytes),
        record.rank,
        "early values",
    )
    if (early.generation, early.step) != (record.generation, record.step):
        what = f"early values are of generation {early.generation} step {early.step}, the record of another"
        raise bad_shard(record.rank, None, what)
    return ShardView(bytes_of, layout, early)


def read_layout(bytes_of: ShardBytes) -> format_pb2.ShardLayout:
    """The shard's layout, checked. Raises IntegrityError as `open_shard` does."""
    record = bytes_of.record
    if record.layout_nbytes > LAYOUT_BYTES_MAX:
        raise bad_shard(
            record.rank, None, f"layout of {record.layout_nbytes} bytes; at most {LAYOUT_BYTES_MAX}"
        )
    layout = format_pb2.ShardLayout()
    _parse(layout, bytes_of.read(0, record.layout_nbytes), record.rank, "layout")
    check_layout(layout, record)
    return layout


def _parse(
    message: format_pb2.ShardLayout | format_pb2.EarlyValues, data: bytes, rank: int, what: str
) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise bad_shard(rank, None, f"{what} cannot be parsed: {error}") from error


def check_layout(layout: format_pb2.ShardLayout, record: format_pb2.ShardRecord) -> None:
    """Refuse a layout that points outside itself or belongs to another shard.

    Raises:
        IntegrityError: names the tensor and the value.
    """
    rank = record.rank
    if layout.format_version > FORMAT_VERSION_MAX:
        what = f"layout of format {layout.format_version}; this snapd reads up to {FORMAT_VERSION_MAX}"
        raise bad_shard(rank, None, what)
    if layout.chunk_bytes != record.chunk_bytes or layout.rank != rank:
        what = f"layout is of rank {layout.rank} with chunks of {layout.chunk_bytes} bytes, the record is not"
        raise bad_shard(rank, None, what)
    for index, tensor in enumerate(layout.tensors):
        problem = _tensor_problem(layout, index, tensor)
        if problem:
            raise bad_shard(rank, None, f"layout: tensor {tensor.name!r}: {problem}")


def _tensor_problem(layout: format_pb2.ShardLayout, index: int, tensor: format_pb2.Tensor) -> str:
    if not has_bytes(tensor):
        for component in tensor.subclass.components:
            # A component stands behind nothing that contains it: no cycles.
            if component.tensor >= len(layout.tensors) or component.tensor == index:
                return f"component {component.attribute!r} is tensor {component.tensor}"
        return ""
    if len(tensor.shape) != len(tensor.strides):
        return f"{len(tensor.shape)} sizes and {len(tensor.strides)} strides"
    if any(stride < 0 for stride in tensor.strides):
        return f"negative stride in {list(tensor.strides)}"
    elements = span_elements(tensor.shape, tensor.strides)
    if elements == 0:
        return "" if tensor.nbytes == 0 else f"no elements but {tensor.nbytes} bytes"
    if tensor.nbytes == 0 or tensor.nbytes % elements:
        return f"{tensor.nbytes} bytes for a span of {elements} elements"
    if tensor.region >= len(layout.regions):
        return f"region {tensor.region} of {len(layout.regions)}"
    region = layout.regions[tensor.region]
    if tensor.region_offset + tensor.nbytes > region.nbytes:
        return f"ends at byte {tensor.region_offset + tensor.nbytes} of a region of {region.nbytes}"
    return ""


def has_bytes(tensor: format_pb2.Tensor) -> bool:
    """Whether the tensor has bytes of its own: it is no wrapper, and not on the meta device."""
    is_wrapper = tensor.HasField("subclass") or tensor.HasField("distributed")
    return not is_wrapper and not tensor.device.startswith("meta")


def itemsize(tensor: format_pb2.Tensor) -> int:
    """Bytes of one element, from the span; 0 for a tensor without elements."""
    elements = span_elements(tensor.shape, tensor.strides)
    return tensor.nbytes // elements if elements else 0


def is_part(tensor: format_pb2.Tensor) -> bool:
    """Whether the tensor says that it is part of a larger one."""
    return bool(tensor.global_shape) and list(tensor.global_shape) != list(tensor.shape)


def wrappers(layout: format_pb2.ShardLayout) -> dict[int, tuple[int, str]]:
    """Number of a component -> number of the wrapper that it belongs to, and the attribute that it is there."""
    return {
        component.tensor: (number, component.attribute)
        for number, tensor in enumerate(layout.tensors)
        for component in tensor.subclass.components
    }


def exported_names(layout: format_pb2.ShardLayout) -> dict[int, str]:
    """Tensor number -> the name under which it is exported, for tensors with bytes of their own.

    A plain tensor keeps its name. A component is called `NAME:ATTRIBUTE` after its wrapper; the local tensor
    of a DTensor, the one component that it has, goes by the DTensor's own name.
    """
    wrapper_of = wrappers(layout)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for number, tensor in enumerate(layout.tensors):
        if not has_bytes(tensor):
            continue
        name = name_by_wrapper(layout, number, wrapper_of)
        if name in taken:
            name = tensor.name if tensor.name not in taken else f"{name}#{number}"
        taken.add(name)
        names[number] = name
    return names


def name_by_wrapper(
    layout: format_pb2.ShardLayout, number: int, wrapper_of: Mapping[int, tuple[int, str]]
) -> str:
    """The name of a tensor by what it is a component of; wrappers inside wrappers too."""
    suffixes: list[str] = []
    seen = {number}
    while number in wrapper_of:
        wrapper, attribute = wrapper_of[number]
        if wrapper in seen:
            raise bad_shard(
                layout.rank, None, f"layout: tensor {layout.tensors[number].name!r} contains itself"
            )
        seen.add(wrapper)
        if not layout.tensors[wrapper].HasField("distributed"):
            suffixes.append(attribute)
        number = wrapper
    return ":".join([layout.tensors[number].name, *reversed(suffixes)])


def holder_rank(layout: format_pb2.ShardLayout, tensor: format_pb2.Tensor) -> int:
    """The rank in whose shard the tensor's bytes lie: replicas share the work."""
    held_by = layout.regions[tensor.region].held_by_rank_plus_one
    return held_by - 1 if held_by else layout.rank


def chunk_span(layout: format_pb2.ShardLayout, tensor: format_pb2.Tensor) -> range:
    """Numbers of the chunks, in the shard of `holder_rank`, that hold the tensor's bytes."""
    if not has_bytes(tensor) or tensor.nbytes == 0:
        return range(0)
    first = layout.regions[tensor.region].shard_offset + tensor.region_offset
    return range(first // layout.chunk_bytes, (first + tensor.nbytes - 1) // layout.chunk_bytes + 1)


def contents_of_chunk(
    layout: format_pb2.ShardLayout, record: format_pb2.ShardRecord, index: int
) -> list[str]:
    """Names of all of which bytes lie in a chunk: tensors, and what is not a tensor in angle brackets."""
    found: list[str] = list(_other_contents(record, index))
    names = exported_names(layout)
    for number, tensor in enumerate(layout.tensors):
        is_here = number in names and tensor.nbytes and holder_rank(layout, tensor) == record.rank
        if is_here and index in chunk_span(layout, tensor):
            found.append(names[number])
    return found


def _other_contents(record: format_pb2.ShardRecord, index: int) -> Iterator[str]:
    chunk_bytes = record.chunk_bytes
    if index * chunk_bytes < record.layout_nbytes:
        yield "<layout>"
    start, end = record.early_values_offset, record.early_values_offset + record.early_values_nbytes
    if start < end and start // chunk_bytes <= index <= (end - 1) // chunk_bytes:
        yield "<early values>"
