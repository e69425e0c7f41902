"""Bringing chunks on a thread: fetched whole, or decoded from the fragments of their rows, straight into their frames.

Blocking; nothing here runs on the event loop. Every chunk is hashed where it lies before it counts. What a source fails
at is told in words, and the next source is tried; a node that does not answer is not asked again in this work.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from snapd.codec.base import Codec
from snapd.core.ids import Place, SnapshotId
from snapd.core.rows import Row
from snapd.errors import NotFoundError, SnapdError, UnavailableError
from snapd.peer.base import BulkStore, ChunkName, FragmentName, Links, Name
from snapd.runtime.coding import timeout_s
from snapd.runtime.pipeline import Buffers, Stopped

REASONS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Need:
    """A chunk that is wanted, and the frame for it, open for writing."""

    index: int
    nbytes: int
    digest: bytes
    place: Place
    view: memoryview


@dataclass(slots=True)
class Findings:
    """What was found out about the sources, by all threads of one work. Only ever added to. `away`: nodes that do not
    answer, and how; `origins`: where the first chunks came from; `is_unreachable`: one of them might have helped.
    """

    away: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    fetched_bytes: int = 0
    decoded_bytes: int = 0
    is_unreachable: bool = False

    def note_origin(self, text: str) -> None:
        if len(self.origins) < REASONS_SHOWN:
            self.origins.append(text)

    def note_away(self, node: str, error: SnapdError) -> None:
        self.away[node] = error.message
        self.is_unreachable = True


@dataclass(frozen=True, slots=True)
class BringBench:
    """What a work uses. `node` and `store`: what lies on this node is read where it is."""

    job: str
    snapshot: SnapshotId
    rank: int
    node: str
    store: BulkStore
    links: Links
    buffers: Buffers
    findings: Findings
    stop: threading.Event

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def chunk(self, rank: int, index: int) -> ChunkName:
        return ChunkName(self.job, self.snapshot.generation, self.snapshot.step, rank, index)

    def fetch(self, node: str, wanted: Sequence[tuple[Name, memoryview]]) -> list[bytes]:
        """From a peer, or from here. Raises what the link raises."""
        if node == self.node:
            return [self._copy(name, view) for name, view in wanted]
        nbytes = sum(view.nbytes for _, view in wanted)
        digests = self.links.to(node).fetch(wanted, timeout_s=timeout_s(nbytes))
        self.findings.fetched_bytes += nbytes
        return digests

    def _copy(self, name: Name, view: memoryview) -> bytes:
        with self.store.read(name) as (source, digest):
            if source.nbytes != view.nbytes:
                raise NotFoundError("it has another size here", kind="chunk", job=self.job)
            view[:] = source
            return digest


# whole chunks


def pull_whole(bench: BringBench, node: str, needs: Sequence[Need]) -> list[tuple[Need, str]]:
    """Fetch chunks from a node that has the shard. Returns those that are still lacking, and why."""
    lacking = list(needs)
    for _ in range(2):  # what arrives wrong is asked for once again
        if not lacking:
            break
        bench.check()
        try:
            bench.fetch(node, [(bench.chunk(bench.rank, need.index), need.view) for need in lacking])
        except UnavailableError as error:
            bench.findings.note_away(node, error)
            return [(need, f"{node} does not answer: {error.message}") for need in lacking]
        except SnapdError as error:
            return [(need, f"{node}: {error.message}") for need in lacking]
        for need in lacking[:REASONS_SHOWN]:
            bench.findings.note_origin(f"chunk {need.index} from {node}")
        lacking = [need for need in lacking if xxhash.xxh3_128_digest(need.view) != need.digest]
        bench.findings.wrong.extend(
            f"peer {node} sent wrong bytes for chunk {need.index} of rank {bench.rank}" for need in lacking
        )
    return [(need, f"{node} sent wrong bytes for chunk {need.index}") for need in lacking]


# rows


@dataclass(slots=True, eq=False)
class RowNeed:
    """A row from which one chunk (data fragment `number`) is decoded. Fragments are numbered from 0 (data), and from -1
    downward (parity). `sources`: (fragment, node) to be tried, in order; `have`: what has arrived and was checked.
    """

    row: Row
    number: int
    need: Need
    sources: list[tuple[int, str]]
    have: dict[int, memoryview] = field(default_factory=dict)
    have_count: int = 0
    from_nodes: dict[int, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def wanted_count(self) -> int:
        """Fragments that are to be fetched in all: absent ones are zeros and known."""
        return len(self.row.chunks)

    @property
    def is_ready(self) -> bool:
        return len(self.have) == self.wanted_count

    def problem(self) -> str:
        """Why it cannot be had, in words."""
        told = "; ".join(dict.fromkeys(self.reasons)) or "no node is known to have the others"
        return (
            f"chunk {self.need.index}: row {self.row.number} has {self.have_count} of the {self.wanted_count}"
            f" fragments that it takes ({told})"
        )


def row_sources(row: Row, number: int, holders: Callable[[int], Iterable[str]]) -> list[tuple[int, str]]:
    """All fragments but the wanted one, with the nodes that may have them; rows begin at different ones, so that
    survivors share the work. `holders`: rank -> nodes with its shard.
    """
    fragments = [i for i in range(len(row.chunks)) if i != number]
    fragments += [-1 - j for j in range(len(row.parity_nodes))]
    first = row.number % max(1, len(fragments))
    found: list[tuple[int, str]] = []
    for fragment in [*fragments[first:], *fragments[:first]]:
        nodes = holders(row.chunks[fragment].rank) if fragment >= 0 else [row.parity_nodes[-1 - fragment]]
        found.extend((fragment, node) for node in nodes)
    return found


def decode_rows(bench: BringBench, codec: Codec, rows: Sequence[RowNeed], piece_bytes: int) -> list[RowNeed]:
    """Fetch what each row takes and decode its chunk into its frame. Returns the rows for which that was not possible;
    their `problem` says why.
    """
    failed: list[RowNeed] = []
    with bench.buffers.lend(sum(row.wanted_count for row in rows), piece_bytes, bench.stop) as pieces:
        spare = {row: [pieces.pop() for _ in range(row.wanted_count)] for row in rows}
        left = list(rows)
        while left:
            _gather(bench, left, spare)
            failed.extend(row for row in left if not row.is_ready)
            left = [row for row in left if row.is_ready]
            left = [row for row in left if not _decode(bench, codec, row, spare[row])]
        for row in rows:
            row.have_count = len(row.have)
            row.have.clear()  # the pieces go back
    return failed


def _gather(bench: BringBench, rows: Sequence[RowNeed], spare: Mapping[RowNeed, list[memoryview]]) -> None:
    """Fetch, node by node, until each row has what it takes or nobody is left to be asked."""
    while True:
        by_node: dict[str, list[tuple[RowNeed, int, memoryview]]] = defaultdict(list)
        for row in rows:
            for fragment, node in _next_sources(bench, row):
                piece = spare[row].pop()
                nbytes = row.row.chunks[fragment].nbytes if fragment >= 0 else row.row.nbytes
                by_node[node].append((row, fragment, piece[:nbytes]))
        if not by_node:
            return
        for node, wanted in sorted(by_node.items()):
            bench.check()
            _fetch_fragments(bench, node, wanted, spare)


def _next_sources(bench: BringBench, row: RowNeed) -> list[tuple[int, str]]:
    """Whom to ask now for what the row still lacks; they are taken off its list."""
    chosen: dict[int, str] = {}
    rest: list[tuple[int, str]] = []
    for fragment, node in row.sources:
        is_enough = len(row.have) + len(chosen) >= row.wanted_count
        if fragment in row.have:
            continue
        if node in bench.findings.away:
            row.reasons.append(f"{node} does not answer: {bench.findings.away[node]}")
        elif is_enough or fragment in chosen:
            rest.append((fragment, node))
        else:
            chosen[fragment] = node
    row.sources = rest
    return list(chosen.items())


def _fetch_fragments(
    bench: BringBench,
    node: str,
    wanted: list[tuple[RowNeed, int, memoryview]],
    spare: Mapping[RowNeed, list[memoryview]],
) -> None:
    """One call for all; if the node lacks one of them, each by itself."""
    try:
        digests = bench.fetch(node, [(_name(bench, row.row, f), view) for row, f, view in wanted])
    except UnavailableError as error:
        bench.findings.note_away(node, error)
        for row, _, view in wanted:
            row.reasons.append(f"{node} does not answer: {error.message}")
            spare[row].append(_whole(view))
        return
    except SnapdError as error:
        if len(wanted) > 1:
            for one in wanted:
                _fetch_fragments(bench, node, [one], spare)
            return
        row, fragment, view = wanted[0]
        row.reasons.append(f"{node} has not {_words(row.row, fragment)}: {error.message}")
        spare[row].append(_whole(view))
        return
    for (row, fragment, view), digest in zip(wanted, digests, strict=True):
        expected = row.row.chunks[fragment].digest if fragment >= 0 else digest
        if xxhash.xxh3_128_digest(view) == expected:
            row.have[fragment] = view
            row.from_nodes[fragment] = node
            continue
        text = f"peer {node} sent wrong bytes for {_words(row.row, fragment)}"
        bench.findings.wrong.append(text)
        row.reasons.append(text)
        spare[row].append(_whole(view))


def _whole(view: memoryview) -> memoryview:
    """The piece of which `view` is the beginning."""
    return memoryview(view.obj)


def _name(bench: BringBench, row: Row, fragment: int) -> Name:
    if fragment < 0:
        return FragmentName(bench.job, row.id, -1 - fragment)
    return bench.chunk(row.chunks[fragment].rank, row.chunks[fragment].index)


def _words(row: Row, fragment: int) -> str:
    if fragment < 0:
        return f"parity {-1 - fragment} of row {row.number}"
    return f"chunk {row.chunks[fragment].index} of rank {row.chunks[fragment].rank}"


def _decode(bench: BringBench, codec: Codec, row: RowNeed, spare: list[memoryview]) -> bool:
    """Decode into the frame. False when what came out is not the chunk: one of the parity fragments, whose hashes only
    their holders know, is not this row's; the first is left out from then on.
    """
    present: dict[int, memoryview | None] = dict.fromkeys(range(len(row.row.chunks), codec.k))
    for fragment, view in row.have.items():
        present[fragment if fragment >= 0 else codec.k - 1 - fragment] = view
    codec.decode(present, {row.number: row.need.view}, row.row.nbytes)
    if xxhash.xxh3_128_digest(row.need.view) == row.need.digest:
        bench.findings.decoded_bytes += row.need.nbytes
        used = ", ".join(f"{_words(row.row, f)} at {row.from_nodes[f]}" for f in sorted(row.have))
        bench.findings.note_origin(f"chunk {row.need.index} decoded from {used}")
        return True
    suspects = sorted((fragment for fragment in row.have if fragment < 0), reverse=True)
    text = f"row {row.row.number} does not decode with {', '.join(_words(row.row, f) for f in suspects)}"
    bench.findings.wrong.append(text)
    row.reasons.append(text)
    for fragment in suspects[:1]:
        spare.append(_whole(row.have.pop(fragment)))
    return False
