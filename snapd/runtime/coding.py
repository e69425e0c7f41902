"""Coding a few rows on a thread: pull their chunks, check them, encode, push the parity, keep our fragment.

Blocking; nothing here runs on the event loop but the commit of a fragment. What fails is told row by row, with the peer
that it failed at, and the other rows of the batch go on.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import xxhash

from snapd.codec.base import Codec
from snapd.core.ids import SnapshotId
from snapd.core.rows import Row, RowChunk
from snapd.errors import IntegrityError, NotFoundError, SnapdError
from snapd.memory.parity import Filled, Reservation
from snapd.peer.base import ChunkName, FragmentName, Links, Name, Pushed
from snapd.runtime.bulk_store import FragmentCommits, discard_fragment
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.loop_caller import LoopCaller, Ticket
from snapd.runtime.pipeline import Buffers, Stopped

TIMEOUT_BASE_S = 20.0
SLOWEST_BYTES_PER_S = 1 << 20


@dataclass(frozen=True, slots=True)
class RowTask:
    """A row to be coded. `lacking`: numbers of the fragments that are not yet where they belong."""

    row: Row
    lacking: frozenset[int]

    @property
    def peers(self) -> frozenset[str]:
        """Whom it takes."""
        nodes = {chunk.node for chunk in self.row.chunks}
        return frozenset(nodes | {self.row.parity_nodes[number] for number in self.lacking if number})


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that has to be tried again. `peer`: whose fault it was; "" for ours."""

    row: Row
    peer: str
    error: SnapdError


@dataclass(slots=True)
class BatchResult:
    """What came of a batch. `placed`: (row number, fragment number) of each fragment that is where it belongs now."""

    placed: list[tuple[int, int]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    pulled_bytes: int = 0
    pushed_bytes: int = 0
    encoded_bytes: int = 0
    rows_coded: int = 0
    wrong: list[str] = field(default_factory=list)
    suspects: set[tuple[str, int]] = field(default_factory=set)
    """(node, rank) of shards of which a chunk arrived wrong twice."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a batch works with. `stop` is set when its target was given up."""

    job: Job
    snapshot: SnapshotId
    codec: Codec
    links: Links
    buffers: Buffers
    caller: LoopCaller
    commits: FragmentCommits
    stop: threading.Event

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped


def timeout_s(nbytes: int) -> float:
    """How long a transfer may take before its peer counts as stalled."""
    return TIMEOUT_BASE_S + nbytes / SLOWEST_BYTES_PER_S


def pieces_per_row(row: Row) -> int:
    """Buffers for its chunks and its parity, at most: our own fragment is encoded into its frame if it has none yet."""
    return len(row.chunks) + len(row.parity_nodes)


def code_batch(bench: Bench, tasks: Sequence[RowTask], piece_bytes: int) -> BatchResult:
    """Code the rows of a batch.

    Raises:
        Stopped: the target was given up; what was placed by then stays.
    """
    result = BatchResult()
    count = sum(pieces_per_row(task.row) - (0 in task.lacking) for task in tasks)
    with ExitStack() as undo:
        pieces = undo.enter_context(bench.buffers.lend(count, piece_bytes, bench.stop))
        own, pushes = OwnFragments(bench, undo), Pushes(bench)
        views = {
            task.row.number: [pieces.pop()[: chunk.nbytes] for chunk in task.row.chunks] for task in tasks
        }
        parity = {
            task.row.number: [
                pieces.pop()[: task.row.nbytes] for _ in task.row.parity_nodes[0 in task.lacking :]
            ]
            for task in tasks
        }
        failed = _pull(bench, tasks, views, result)
        for task in tasks:
            if task.row.number not in failed:
                bench.check()
                _code(bench, task, views[task.row.number], parity[task.row.number], own, pushes, result)
        with own.being_committed(result):
            pushes.send(result)
    return result


# pulling


def _pull(
    bench: Bench, tasks: Sequence[RowTask], views: dict[int, list[memoryview]], result: BatchResult
) -> set[int]:
    """Fetch all chunks, node by node. Returns the numbers of rows that lack one."""
    by_node: dict[str, list[tuple[Row, RowChunk, memoryview]]] = defaultdict(list)
    for task in tasks:
        for chunk, view in zip(task.row.chunks, views[task.row.number], strict=True):
            by_node[chunk.node].append((task.row, chunk, view))
    nodes = sorted(by_node)
    first = tasks[0].row.number % len(nodes)  # threads do not all begin at the same peer
    failed: set[int] = set()
    for node in [*nodes[first:], *nodes[:first]]:
        bench.check()
        wanted = [entry for entry in by_node[node] if entry[0].number not in failed]
        for row, error in _pull_from(bench, node, wanted, result):
            if row.number not in failed:
                failed.add(row.number)
                result.failures.append(Failure(row, node, error))
    return failed


def fetch_row(bench: Bench, row: Row, views: list[memoryview]) -> None:
    """Fetch and check all chunks of one row. Raises what the first that fails gives."""
    result = BatchResult()
    _pull(bench, [RowTask(row, frozenset())], {row.number: views}, result)
    if result.failures:
        raise result.failures[0].error


def _pull_from(
    bench: Bench, node: str, wanted: list[tuple[Row, RowChunk, memoryview]], result: BatchResult
) -> list[tuple[Row, SnapdError]]:
    """Fetch from one peer, what arrives wrong once again. Returns the rows that failed."""
    for attempt in range(2):
        if not wanted:
            return []
        try:
            link = bench.links.to(node)
            names = [(_name(bench, chunk), view) for _, chunk, view in wanted]
            nbytes = sum(chunk.nbytes for _, chunk, _ in wanted)
            link.fetch(names, timeout_s=timeout_s(nbytes))
        except SnapdError as error:
            return [(row, error) for row, *_ in wanted]
        result.pulled_bytes += nbytes
        wanted = [entry for entry in wanted if xxhash.xxh3_128_digest(entry[2]) != entry[1].digest]
        for _, chunk, _ in wanted:
            result.wrong.append(
                f"peer {node} sent wrong bytes for chunk {chunk.index} of rank {chunk.rank}"
                + (" again" if attempt else "")
            )
    result.suspects.update((node, chunk.rank) for _, chunk, _ in wanted)
    return [
        (
            row,
            IntegrityError(
                f"wrong bytes for chunk {chunk.index} of rank {chunk.rank}, twice",
                kind="wrong_bytes",
                job=bench.job.name,
                peer=node,
            ),
        )
        for row, chunk, _ in wanted
    ]


def _name(bench: Bench, chunk: RowChunk) -> Name:
    return ChunkName(bench.job.name, bench.snapshot.generation, bench.snapshot.step, chunk.rank, chunk.index)


# coding


def _code(
    bench: Bench,
    task: RowTask,
    chunks: list[memoryview],
    fragments: list[memoryview],
    own: OwnFragments,
    pushes: Pushes,
    result: BatchResult,
) -> None:
    """Encode a row, our own fragment straight into its frame, and note the others for where they belong."""
    row, ours = task.row, None
    if 0 in task.lacking:
        try:
            ours = own.reserve(row)
        except SnapdError as error:
            result.failures.append(Failure(row, "", error))
            return
        fragments = [ours.view, *fragments]
    data: list[memoryview | None] = [*chunks]
    data.extend([None] * (bench.codec.k - len(data)))
    bench.codec.encode(data, fragments)
    if ours is not None:
        own.add(row, ours)
    result.rows_coded += 1
    result.encoded_bytes += sum(chunk.nbytes for chunk in chunks)
    for number in sorted(task.lacking - {0}):
        pushes.add(row, number, fragments[number])


class OwnFragments:
    """Our own fragments of a batch: committed together, and with what peers push meanwhile, because a transaction and a
    visit to the loop cost more than the row that they are for.
    """

    def __init__(self, bench: Bench, undo: ExitStack) -> None:
        self._bench, self._undo = bench, undo
        self._rows: list[Row] = []
        self._filled: list[Filled] = []

    def reserve(self, row: Row) -> Reservation:
        """A frame to encode into; what is not committed is free again when `undo` closes."""
        parity = self._bench.job.parity
        reservation = parity.reserve(row.id, 0, row.nbytes)
        self._undo.callback(parity.cancel, reservation)  # nothing after a commit
        return reservation

    def add(self, row: Row, encoded: Reservation) -> None:
        self._rows.append(row)
        self._filled.append((encoded, xxhash.xxh3_128_digest(encoded.view)))

    @contextmanager
    def being_committed(self, result: BatchResult) -> Iterator[None]:
        """All that were added, while the body runs. Nothing is left under way, whatever the body raises: until then the
        frames belong to the commit.
        """
        self._bench.check()
        tickets = self._bench.commits.begin_all([(self._bench.job, filled) for filled in self._filled])
        try:
            yield
        finally:
            for row, ticket in zip(self._rows, tickets, strict=True):
                self._conclude(row, ticket, result)

    def _conclude(self, row: Row, ticket: Ticket[tuple[Job, Filled]], result: BatchResult) -> None:
        try:
            ticket.wait()
        except SnapdError as error:
            result.failures.append(Failure(row, "", error))
        else:
            result.placed.append((row.number, 0))


class Pushes:
    """The fragments of a batch that belong to others: all of one peer in one call, so that neither end waits for the
    other at each.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._by_node: dict[str, list[tuple[Row, Pushed]]] = defaultdict(list)

    def add(self, row: Row, number: int, view: memoryview) -> None:
        name = FragmentName(self._bench.job.name, row.id, number)
        pushed = Pushed(name, view, xxhash.xxh3_128_digest(view))
        self._by_node[row.parity_nodes[number]].append((row, pushed))

    def send(self, result: BatchResult) -> None:
        """All that were added."""
        for node, entries in sorted(self._by_node.items()):
            self._bench.check()
            refusals = self._send_to(node, [pushed for _, pushed in entries])
            for (row, pushed), refusal in zip(entries, refusals, strict=True):
                if refusal is not None:
                    result.failures.append(Failure(row, node, refusal))
                else:
                    result.placed.append((row.number, pushed.name.number))
                    result.pushed_bytes += pushed.data.nbytes

    def _send_to(self, node: str, pushed: Sequence[Pushed]) -> Sequence[SnapdError | None]:
        for _ in pushed:
            point("daemon.protect.push.before")
        nbytes = sum(one.data.nbytes for one in pushed)
        try:
            refusals = self._bench.links.to(node).push(pushed, timeout_s=timeout_s(nbytes))
        except SnapdError as error:
            return [error] * len(pushed)
        for _ in pushed:
            point("daemon.protect.push.after")
        return refusals


def check_fragments(bench: Bench, keys: Sequence[tuple[bytes, int]]) -> None:
    """Hash fragments that an earlier process left; forget the bad ones, saying so."""
    for row_id, number in keys:
        bench.check()
        try:
            with bench.job.parity.read(row_id, number):
                continue
        except NotFoundError:
            continue
        except IntegrityError as error:
            bench.caller.call(
                discard_fragment, bench.job, FragmentName(bench.job.name, row_id, number), error
            )
