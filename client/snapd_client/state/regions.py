"""Regions: runs of bytes in memory that are copied as one, and the part of the shard that each goes to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from .records import Role, TensorRecord
from .tree import Walk

SMALL_BYTES = 16  # a tensor up to this size that is no parameter (a step counter) is taken early
SMALL_TOTAL_MAX = 256 << 10
BUFFERS_TOTAL_MAX = 1 << 20  # module buffers up to this are taken early, all of them
BUFFER_BYTES_MAX = 64 << 10  # above that, only those up to this size each
FIELD_RANGES_MAX = 32
EARLY, FROZEN, PARAMETERS, OTHER = "early", "frozen", "parameters", "other"


@dataclass(slots=True)
class RegionPlan:
    """`buffers`: (number, offset in the region) of the tensors that lie in it, in order of their numbers."""

    name: str
    nbytes: int
    buffers: list[tuple[int, int]]
    range_name: str
    group: int
    is_early: bool
    is_frozen: bool


@dataclass(slots=True)
class Plan:
    """All regions, in the order of the shard."""

    regions: list[RegionPlan]
    region_of: list[int]  # buffer -> region
    offset_of: list[int]  # buffer -> offset of its first element in the region
    alias_of: list[int]  # buffer -> number of its storage
    storage_offset_of: list[
        int
    ]  # buffer -> bytes from the lowest captured byte of the storage (rounded down to 64)


@dataclass(slots=True)
class _Span:
    buffer: int
    start: int
    end: int


def plan_regions(walk: Walk, forced_early: set[str]) -> Plan:
    """Group buffers by storage, join those that overlap, choose ranges, sort."""
    records = [walk.structure.records[number] for number in walk.structure.record_of]
    storages: dict[int, list[_Span]] = {}
    for index, (buffer, record) in enumerate(zip(walk.buffers, records, strict=True)):
        start = int(buffer.storage_offset()) * buffer.itemsize
        spans = storages.setdefault(buffer.untyped_storage()._cdata, [])
        spans.append(_Span(index, start, start + record.nbytes))
    is_early = _choose_early(walk, records, forced_early)
    regions: list[RegionPlan] = []
    count = len(records)
    alias_of, storage_offset_of = [0] * count, [0] * count
    for alias, spans in enumerate(storages.values()):
        lowest = min(span.start for span in spans) // 64 * 64
        for span in spans:
            alias_of[span.buffer] = alias
            storage_offset_of[span.buffer] = span.start - lowest
        for cluster in _clusters(spans):
            regions.append(_region(walk, cluster, records, is_early))
    regions.sort(key=_order(regions))
    region_of, offset_of = [0] * count, [0] * count
    for number, region in enumerate(regions):
        for index, offset in region.buffers:
            region_of[index], offset_of[index] = number, offset
    return Plan(regions, region_of, offset_of, alias_of, storage_offset_of)


def _clusters(spans: list[_Span]) -> list[list[_Span]]:
    """Spans that overlap come together; touching ones do not."""
    if len(spans) == 1:
        return [spans]
    clusters: list[list[_Span]] = []
    end = -1
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if clusters and span.start < end:
            clusters[-1].append(span)
        else:
            clusters.append([span])
            end = span.end
        end = max(end, span.end)
    return clusters


def _region(
    walk: Walk, cluster: list[_Span], records: list[TensorRecord], is_early: list[bool]
) -> RegionPlan:
    start, end = cluster[0].start, max(span.end for span in cluster)
    # the tensor that says what the bytes are for: a parameter before what merely looks at it
    members = sorted(cluster, key=lambda span: (not records[span.buffer].is_parameter, span.buffer))
    main = records[members[0].buffer]
    early = any(is_early[span.buffer] for span in cluster)
    frozen = main.is_frozen and not early
    groups = {records[span.buffer].place.group for span in cluster} - {0}
    return RegionPlan(
        name=main.name,
        nbytes=end - start,
        buffers=sorted((span.buffer, span.start - start) for span in cluster),
        range_name=EARLY if early else _range_name(main),
        group=min(groups, default=0),
        is_early=early,
        is_frozen=frozen,
    )


def _range_name(record: TensorRecord) -> str:
    if record.is_parameter:
        return FROZEN if record.is_frozen else PARAMETERS
    if record.place.role is Role.OPTIMIZER and record.place.field:
        return record.place.field
    return OTHER


def _order(regions: list[RegionPlan]) -> Callable[[RegionPlan], tuple[int, int]]:
    """Early, frozen, parameters, then the optimizer's fields by size; small fields beyond the bound come
    together.
    """
    totals: dict[str, int] = defaultdict(int)
    for region in regions:
        totals[region.range_name] += region.nbytes
    fixed = [EARLY, FROZEN, PARAMETERS]
    fields = sorted(
        (name for name in totals if name not in fixed and name != OTHER), key=lambda name: -totals[name]
    )
    for region in regions:
        if region.range_name in fields[FIELD_RANGES_MAX:]:
            region.range_name = OTHER
    rank = {name: index for index, name in enumerate([*fixed, *fields[:FIELD_RANGES_MAX], OTHER])}
    return lambda region: (rank[region.range_name], region.buffers[0][0])


def _choose_early(walk: Walk, records: list[TensorRecord], forced: set[str]) -> list[bool]:
    """What is copied before `snap.step` returns: it may change outside the update, or nothing would tell."""
    buffers_total = sum(record.nbytes for record in records if record.place.role is Role.BUFFER)
    small_left = SMALL_TOTAL_MAX
    chosen = []
    for buffer, outer, record in zip(walk.buffers, walk.outers, records, strict=True):
        role = record.place.role
        early = (
            record.is_gathered
            or role is Role.GRADIENT
            or record.name in forced
            or buffer.is_inference()
            or outer.is_inference()
        )
        if role is Role.BUFFER:
            early = early or buffers_total <= BUFFERS_TOTAL_MAX or record.nbytes <= BUFFER_BYTES_MAX
        elif not early and role is not Role.PARAMETER and record.nbytes <= SMALL_BYTES:
            early = small_left >= 64
            small_left -= 64
        chosen.append(early)
    return chosen
