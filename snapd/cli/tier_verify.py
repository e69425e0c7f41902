"""`snapd verify --from URL`: what a tier holds, checked without a daemon.

Without `--deep` only manifests are read and packs are looked for: each commit record, each shard manifest, and that
every pack that they name is there and long enough. With `--deep` every chunk is read and hashed, once each, and so are
the packs' own headers and indexes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from snapd_proto import format_pb2

from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json, progress_bar
from snapd.cli.tier_source import TierSource, opened_tier
from snapd.core.ids import checked_job_name
from snapd.core.stored import StoredChunk, StoredShard
from snapd.errors import IntegrityError, NotFoundError
from snapd.export.shard_view import contents_of_chunk, read_layout
from snapd.tier.pack_index import index_problem
from snapd.tier.reading import Broken, Opened, TierReader
from snapd.tier.shard_bytes import BatchReader, StoredShardBytes, record_of
from snapd.tier.streaming import Fault, Miss
from snapd.units import format_size

NAMES_SHOWN_MAX = 8


@dataclass(frozen=True, kw_only=True)
class BadStored:
    """A chunk in a tier that cannot be used: whose it is, the object and why, and what lies in it."""

    rank: int
    chunk: int
    what: str
    contents: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Verdict:
    """What verifying one stored snapshot gave. `nbytes`: hashed for it; what an earlier one had checked is not read
    again.
    """

    job: str
    generation: int
    step: int
    nbytes: int = 0
    problem: str = ""  # of its manifests
    is_deleted: bool = False  # while it was verified: nothing is known of it, and nothing is wrong
    note: str = ""
    bad: list[BadStored] = field(default_factory=list)
    bad_indexes: list[str] = field(
        default_factory=list
    )  # packs whose chunks can be read, but only by manifests

    @property
    def is_good(self) -> bool:
        return not self.problem and not self.bad and not self.bad_indexes


@dataclass
class _Checked:
    """Chunks that were read already, by where they lie: what is wrong with each, or nothing."""

    results: dict[tuple[str, int], str] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)  # the same of packs' own indexes, by name


def verify_stored(
    url: str, job: str, *, step: int | None, generation: int | None, is_deep: bool, as_json: bool
) -> ExitCode:
    """Verify what fits; print it; return the exit code.

    Raises:
        NotFoundError: nothing fits. SnapdError: the store cannot be asked.
    """
    with opened_tier(url) as source:
        verdicts: list[Verdict] = []
        for name in [checked_job_name(job)] if job else source.jobs():
            reader = source.reader(name)
            found = [
                reader.open(candidate, None)
                for candidate in reader.candidates()
                if step in (None, candidate.id.step) and generation in (None, candidate.id.generation)
            ]
            verdicts += _verify_job(source, reader, found, is_deep=is_deep, show_progress=not as_json)
    if not verdicts:
        raise NotFoundError(f"no such snapshot in {url}", kind="snapshot", hint="snapd ls --from shows them")
    if as_json:
        print_json([_json(verdict, is_deep=is_deep) for verdict in verdicts])
    else:
        for verdict in verdicts:
            print("\n".join(_lines(verdict, is_deep=is_deep)))
    return ExitCode.DONE if all(verdict.is_good for verdict in verdicts) else ExitCode.UNUSABLE


def _verify_job(
    source: TierSource,
    reader: TierReader,
    found: Iterable[Opened | Broken],
    *,
    is_deep: bool,
    show_progress: bool,
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    packs = reader.packs()
    checked = _Checked()
    for one in found:
        if isinstance(one, Broken) and one.is_void:
            continue
        verdict = Verdict(job=reader.job, generation=one.id.generation, step=one.id.step)
        verdicts.append(verdict)
        if isinstance(one, Broken):
            verdict.problem = one.reason
            continue
        verdict.note = one.passed_over
        if is_deep:
            with progress_bar(is_wanted=show_progress) as bar:
                task = bar.add_task(f"verifying {reader.job} step {one.id.step}", total=one.record.nbytes)
                _read_all(reader, one, verdict, checked, functools.partial(bar.advance, task))
            _read_indexes(reader, one, verdict, checked)
        else:
            _look_for_packs(reader, one, verdict, packs)
        if not verdict.is_good and reader.was_deleted(one.id):
            verdict.bad, verdict.bad_indexes, verdict.is_deleted = [], [], True
    return verdicts


def _look_for_packs(reader: TierReader, opened: Opened, verdict: Verdict, packs: dict[str, int]) -> None:
    for rank, shard in sorted(opened.shards.items()):
        for index, chunk in enumerate(shard.chunks):
            nbytes, end = packs.get(chunk.pack), chunk.offset + chunk.stored_nbytes
            key = reader.keys.pack(chunk.pack)
            if nbytes is None:
                what = f"{key} is not there"
            elif end > nbytes:
                what = f"{key} ends at byte {nbytes}, the chunk at {end}"
            else:
                continue
            verdict.bad.append(BadStored(rank=rank, chunk=index, what=what))


def _read_indexes(reader: TierReader, opened: Opened, verdict: Verdict, checked: _Checked) -> None:
    lying: dict[str, list[StoredChunk]] = {name: [] for name in opened.record.packs}
    for shard in opened.shards.values():
        for chunk in shard.chunks:
            lying[chunk.pack].append(chunk)
    fresh = [name for name in lying if name not in checked.indexes]
    problems = reader.pool.map(
        lambda name: index_problem(reader.store, reader.keys, name, lying[name]), fresh
    )
    checked.indexes.update(zip(fresh, problems, strict=True))
    verdict.bad_indexes = [problem for name in lying if (problem := checked.indexes[name])]


def _read_all(
    reader: TierReader, opened: Opened, verdict: Verdict, checked: _Checked, progress: Callable[[int], None]
) -> None:
    for rank, shard in sorted(opened.shards.items()):
        fresh = [i for i, chunk in enumerate(shard.chunks) if chunk.spot not in checked.results]
        fresh = list({shard.chunks[i].spot: i for i in reversed(fresh)}.values())
        known = sum(chunk.nbytes for chunk in shard.chunks) - sum(shard.chunks[i].nbytes for i in fresh)
        progress(known)
        misses = _hash(reader, shard, fresh, progress)
        verdict.nbytes += sum(shard.chunks[i].nbytes for i in fresh)
        checked.results.update({shard.chunks[i].spot: "" for i in fresh})
        checked.results.update({shard.chunks[miss.index].spot: miss.what for miss in misses})
        bad = [(i, what) for i, chunk in enumerate(shard.chunks) if (what := checked.results[chunk.spot])]
        if bad:
            layout = _layout(reader, shard)
            record = record_of(shard)
            verdict.bad += [
                BadStored(rank=rank, chunk=i, what=what, contents=_contents(layout, record, i))
                for i, what in bad
            ]


def _hash(
    reader: TierReader, shard: StoredShard, indexes: list[int], progress: Callable[[int], None]
) -> list[Miss]:
    """Read chunks into memory that each thread uses again and again."""
    local = threading.local()

    def place(index: int) -> memoryview:
        nbytes = shard.chunks[index].nbytes
        if getattr(local, "scratch", None) is None or len(local.scratch) < nbytes:
            local.scratch = bytearray(max(nbytes, shard.chunk_bytes))
        return memoryview(local.scratch)[:nbytes]

    misses = reader.read(shard, indexes, place, done=lambda _, view: progress(view.nbytes))
    for miss in misses:
        if miss.fault is Fault.AWAY and miss.error is not None:
            raise miss.error
    return misses


def _layout(reader: TierReader, shard: StoredShard) -> format_pb2.ShardLayout | None:
    try:
        with BatchReader(reader) as batches:
            return read_layout(StoredShardBytes(batches, shard))
    except IntegrityError:
        return None


def _contents(
    layout: format_pb2.ShardLayout | None, record: format_pb2.ShardRecord, index: int
) -> tuple[str, ...]:
    return tuple(contents_of_chunk(layout, record, index)) if layout is not None else ()


def _lines(verdict: Verdict, *, is_deep: bool) -> list[str]:
    head = f"{verdict.job} generation {verdict.generation} step {verdict.step}: "
    if verdict.is_deleted:
        return [f"{head}was deleted while it was verified (retention, or by hand)"]
    if verdict.problem:
        return [f"{head}unusable: {verdict.problem}"]
    how = f"{format_size(verdict.nbytes)} hashed" if is_deep else "manifests and sizes of packs"
    result = "all good" if verdict.is_good else f"{len(verdict.bad)} bad chunk{'s' * (len(verdict.bad) != 1)}"
    lines = [f"{head}{how}, {result}"]
    if verdict.note:
        lines.append(f"  passed over: {verdict.note}")
    lines += [f"  {text}; its chunks are found by manifests alone" for text in verdict.bad_indexes]
    for bad in verdict.bad:
        names = ", ".join(bad.contents[:NAMES_SHOWN_MAX])
        more = f" and {len(bad.contents) - NAMES_SHOWN_MAX} more" * (len(bad.contents) > NAMES_SHOWN_MAX)
        inside = f"; in it: {names}{more}" if names else ""
        lines.append(f"  rank {bad.rank} chunk {bad.chunk}: {bad.what}{inside}")
    return lines


def _json(verdict: Verdict, *, is_deep: bool) -> dict[str, object]:
    return {
        "job": verdict.job,
        "generation": verdict.generation,
        "step": verdict.step,
        "is_deep": is_deep,
        "nbytes": verdict.nbytes,
        "problem": verdict.problem or None,
        "is_deleted": verdict.is_deleted,
        "passed_over": verdict.note or None,
        "bad_pack_indexes": verdict.bad_indexes,
        "bad_chunks": [
            {"rank": bad.rank, "chunk": bad.chunk, "what": bad.what, "contents": list(bad.contents)}
            for bad in verdict.bad
        ],
    }
