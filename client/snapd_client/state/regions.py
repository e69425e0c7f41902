"""Regions: runs of bytes in memory that are copied as one, and the part of the shard that each goes to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Role, TensorRecord
from .replicas import Replicas, share_out
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
    holder: int | None = None  # another rank of the node whose shard has these bytes


@dataclass(slots=True)
class Plan:
    """All regions, in the order of the shard."""

    regions: list[RegionPlan]
    region_of: list[int]  # buffer -> region
    offset_of: list[int]  # buffer -> offset of its first element in the region
    alias_of: list[int]  # buffer -> number of its storage
    storage_offset_of: list[int]  # buffer -> bytes from the lowest captured byte of its storage (down to 64)


def plan_regions(
    walk: Walk, forced_early: set[str], *, rank: int = 0, node_ranks: Sequence[int] = ()
) -> Plan:
    """Group buffers by storage, join those that overlap, choose ranges, sort.

    `node_ranks`: the ranks that share out what they hold alike; none: this rank keeps everything.
    """
    records = [walk.structure.records[number] for number in walk.structure.record_of]
    storages: dict[int, list[int]] = {}
    for index, buffer in enumerate(walk.buffers):
        storages.setdefault(buffer.untyped_storage()._cdata, []).append(index)
    starts = [int(buffer.storage_offset()) * buffer.itemsize for buffer in walk.buffers]
    is_early = _choose_early(walk, records, forced_early)
    regions: list[RegionPlan] = []
    count = len(records)
    alias_of, storage_offset_of = [0] * count, [0] * count
    for alias, members in enumerate(storages.values()):
        lowest = min(map(starts.__getitem__, members)) // 64 * 64
        for index in members:
            alias_of[index] = alias
            storage_offset_of[index] = starts[index] - lowest
        if len(members) == 1:
            regions.append(_lone_region(members[0], records[members[0]], is_early[members[0]]))
            continue
        for cluster in _clusters(members, starts, records):
            regions.append(_joint_region(cluster, starts, records, is_early))
    if node_ranks:
        _share(regions, walk, records, rank, node_ranks)
    regions.sort(key=_order(regions))
    region_of, offset_of = [0] * count, [0] * count
    for number, region in enumerate(regions):
        for index, offset in region.buffers:
            region_of[index], offset_of[index] = number, offset
    return Plan(regions, region_of, offset_of, alias_of, storage_offset_of)


def _clusters(members: list[int], starts: list[int], records: list[TensorRecord]) -> list[list[int]]:
    """Buffers that overlap come together; touching ones do not."""
    clusters: list[list[int]] = []
    end = -1
    for index in sorted(members, key=starts.__getitem__):
        if clusters and starts[index] < end:
            clusters[-1].append(index)
        else:
            clusters.append([index])
        end = max(end, starts[index] + records[index].nbytes)
    return clusters


def _lone_region(index: int, record: TensorRecord, early: bool) -> RegionPlan:
    name = EARLY if early else _range_name(record)
    frozen = record.is_frozen and not early
    return RegionPlan(record.name, record.nbytes, [(index, 0)], name, record.place.group, early, frozen)


def _joint_region(
    cluster: list[int], starts: list[int], records: list[TensorRecord], is_early: list[bool]
) -> RegionPlan:
    start = starts[cluster[0]]
    # the tensor that says what the bytes are for: a parameter before what merely looks at it
    main = records[min(cluster, key=lambda index: (not records[index].is_parameter, index))]
    early = any(is_early[index] for index in cluster)
    group = min({records[index].place.group for index in cluster} - {0}, default=0)
    is_written = any(records[index].is_parameter and not records[index].is_frozen for index in cluster)
    frozen = main.is_frozen and not early and not group and not is_written
    name = PARAMETERS if main.is_frozen and not frozen else _range_name(main)
    return RegionPlan(
        name=main.name,
        nbytes=max(starts[index] + records[index].nbytes for index in cluster) - start,
        buffers=sorted((index, starts[index] - start) for index in cluster),
        range_name=EARLY if early else name,
        group=group,
        is_early=early,
        is_frozen=frozen,
    )


def _share(
    regions: list[RegionPlan], walk: Walk, records: list[TensorRecord], rank: int, node_ranks: Sequence[int]
) -> None:
    """Leave to other ranks of the node what they keep. Whether a region is early here plays no part."""
    replicas = Replicas(walk.structure.parameters)
    ranks_of: dict[str, tuple[int, ...]] = {}
    for region in regions:
        sets = {replicas.ranks(records[index]) for index, _ in region.buffers}
        ranks_of[region.name] = sets.pop() if len(sets) == 1 else ()
    holders = share_out({region.name: region.nbytes for region in regions}, ranks_of, node_ranks)
    for region in regions:
        holder = holders.get(region.name, rank)
        if holder != rank:
            region.holder = holder


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
