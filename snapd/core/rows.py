"""Rows: which chunks of a group's nodes are coded together, and which nodes hold the parity.

A pure function of the shard records of one snapshot and of the group: every member computes the same plan from the same
records, so no node has to be asked for it.

What the plan keeps to:

- every chunk of every node is in exactly one row; a row has at most one chunk of a node, and its parity lies on `m`
  nodes that have no chunk in it: the loss of any `m` nodes costs a row at most `m` fragments;
- there are as few rows as these rules allow, `rows_min`: parity memory is `m` fragments a row;
- chunks that did not change since the snapshot before are coded together, oldest first, and how they are paired
  depends on nothing else: as long as they stay, their rows keep their identity and their parity nodes, and nothing
  of them is moved or coded again. (Where both cannot be had, since one node has more than all others in proportion,
  the number of rows wins.)
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.errors import InvariantViolated

ROW_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class RowChunk:
    """A data fragment: one chunk of one rank's shard, which lies on `node`. `since`: the snapshot that stored it first;
    None: it is new, or changed. Two chunks are equal whatever their `since`.
    """

    node: str
    rank: int
    index: int
    nbytes: int
    digest: bytes
    since: SnapshotId | None = field(default=None, compare=False)

    @property
    def is_stable(self) -> bool:
        return self.since is not None


@dataclass(frozen=True, slots=True)
class Row:
    """Data fragments in coding order (at most k; an absent one counts as zeros and is neither sent nor stored), and
    the nodes of the parity fragments 0..m-1. `id`: identity of (code, digests and sizes in order): equal rows have
    equal parity. `nbytes`: of each parity fragment, the largest of its chunks.

    Two rows of one plan may have the same id (equal bytes, zeros above all) and other parity nodes.
    """

    number: int
    id: bytes
    chunks: tuple[RowChunk, ...]
    parity_nodes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """A fragment that a row really has. `number`: of a data fragment its position 0..k-1; of a parity fragment (`chunk`
    is None) 0..m-1, as in its name.
    """

    node: str
    number: int
    chunk: RowChunk | None

    def coding_number(self, code: Code) -> int:
        """As the codec counts: data 0..k-1, parity k..k+m-1."""
        return self.number if self.chunk is not None else code.k + self.number


def row_id(code: Code, digests_and_sizes: Iterable[tuple[bytes, int]]) -> bytes:
    """Identity of the parity of these data fragments, in coding order: 16 bytes of BLAKE2b."""
    parts = [digest + nbytes.to_bytes(8, "little") for digest, nbytes in digests_and_sizes]
    head = f"{code} {len(parts)} {' '.join(str(len(part)) for part in parts)}".encode()
    return hashlib.blake2b(head + b"".join(parts), digest_size=ROW_ID_BYTES, person=b"snapd row").digest()


def plan_id(nodes: Sequence[str], rows: Sequence[Row]) -> bytes:
    """Identity of a whole plan: two members that have the same one mean the same rows, chunks and parity nodes."""
    digest = hashlib.blake2b(digest_size=ROW_ID_BYTES, person=b"snapd plan")
    digest.update("\n".join(nodes).encode())
    for row in rows:
        names = " ".join(f"{chunk.node} {chunk.rank} {chunk.index}" for chunk in row.chunks)
        digest.update(row.id + f"\n{names}\n{' '.join(row.parity_nodes)}\n".encode())
    return digest.digest()


def chunks_of(node: str, records: Iterable[ShardRecord]) -> list[RowChunk]:
    """The chunks of the shards that lie on `node`, in the order in which rows take them.

    Unchanged ones first, the oldest before the others, so that what is frozen is paired with what is frozen. Of the
    same age long ones come first: the short ends of ranges then meet each other, and little parity is padding. Last by
    rank and index.
    """
    chunks = [
        RowChunk(node, record.rank, index, chunk.nbytes, chunk.digest, chunk.since)
        for record in records
        for index, chunk in enumerate(record.chunks)
    ]
    chunks.sort(key=_order)
    return chunks


def _order(chunk: RowChunk) -> tuple[int, int, int, int, int, int]:
    since = chunk.since
    if since is None:
        return (1, 0, 0, -chunk.nbytes, chunk.rank, chunk.index)
    return (0, since.generation, since.step, -chunk.nbytes, chunk.rank, chunk.index)


def rows_min(code: Code, counts: Collection[int]) -> int:
    """The fewest rows for nodes with these numbers of chunks, and as many as `plan_rows` makes."""
    return max(max(counts, default=0), -(-sum(counts) // code.k))


def parity_frames_bound(code: Code, counts: Mapping[str, int]) -> dict[str, int]:
    """Frames of parity that each node holds at most: one for each row in which it has no chunk of its own.

    Reached exactly when all rows are full. All nodes together hold `m * rows_min` frames.
    """
    rows = rows_min(code, counts.values())
    return {node: rows - count for node, count in counts.items()}


def plan_rows(code: Code, nodes: Sequence[str], chunks: Mapping[str, Sequence[RowChunk]]) -> tuple[Row, ...]:
    """Cut the chunks of a group into rows.

    In each row the k nodes with most chunks left give one each (ties rotate) and the m others hold parity; a row with
    fewer chunks, when nodes have run out, has parity on those with the least so far. The first parity node pulls and
    codes: the duty goes round.

    Args:
        nodes: the group in its order; part of the plan.
        chunks: of each node, in the order of `chunks_of`; a node that is missing has none.

    Raises:
        InvariantViolated: the group does not fit the code, or a chunk is of another node.
    """
    if len(set(nodes)) != len(nodes) or len(nodes) != code.size:
        raise InvariantViolated("the group does not fit its code", code=str(code), nodes=",".join(nodes))
    if not set(chunks) <= set(nodes) or any(c.node != node for node, own in chunks.items() for c in own):
        raise InvariantViolated("chunks of a node that is not in the group", nodes=",".join(nodes))
    planner = _Planner(code, nodes, [chunks.get(node, ()) for node in nodes])
    for counts in _unchanged_counts(planner.queues):
        planner.add_full_rows(counts)
    planner.add_remaining_rows()
    return tuple(planner.rows)


def _unchanged_counts(queues: Sequence[Sequence[RowChunk]]) -> Iterator[list[int]]:
    """For each age, the oldest first: how many unchanged chunks of that age or older each node has."""
    keys = [[_order(chunk)[1:3] for chunk in queue if chunk.is_stable] for queue in queues]
    if any(own != sorted(own) for own in keys):
        raise InvariantViolated("chunks are not in the order of chunks_of")
    counts = [0] * len(queues)
    for age in sorted({age for own in keys for age in own}):
        for i, own in enumerate(keys):
            while counts[i] < len(own) and own[counts[i]] == age:
                counts[i] += 1
        yield list(counts)


class _Planner:
    """The rows so far, and what each node has left and holds."""

    def __init__(self, code: Code, nodes: Sequence[str], queues: Sequence[Sequence[RowChunk]]) -> None:
        self.rows: list[Row] = []
        self.queues = [sorted(queue, key=lambda chunk: not chunk.is_stable) for queue in queues]
        self._code = code
        self._nodes = nodes
        self._taken = [0] * len(nodes)
        self._rows_min = rows_min(code, [len(queue) for queue in queues])
        self._parity_count = [0] * len(nodes)
        self._duty_count = [0] * len(nodes)

    def add_full_rows(self, counts: Sequence[int]) -> None:
        """Rows of k chunks each from the first `counts[i]` chunks of each node, while k nodes have some left.

        Ends early where leaving out a node that has most of all would cost a row more in the end.
        """
        heap = self._heap([count - taken for count, taken in zip(counts, self._taken, strict=True)])
        while len(heap) >= self._code.k:
            chosen = self._pop(heap)
            rows_after = self._rows_min - len(self.rows) - 1
            if any(self._left(i) > rows_after for i in range(len(self._nodes)) if i not in chosen):
                return
            self._add(chosen)

    def add_remaining_rows(self) -> None:
        """All that is left, whatever its age."""
        # What was never coded before is coded now, at every snapshot: that work is shared out for itself.
        self._duty_count = [0] * len(self._nodes)
        heap = self._heap([self._left(i) for i in range(len(self._nodes))])
        while heap:
            self._add(self._pop(heap))

    def _left(self, i: int) -> int:
        return len(self.queues[i]) - self._taken[i]

    @staticmethod
    def _heap(left: Sequence[int]) -> list[tuple[int, int, int]]:
        heap = [(-count, i, i) for i, count in enumerate(left) if count]
        heapq.heapify(heap)
        return heap

    def _pop(self, heap: list[tuple[int, int, int]]) -> list[int]:
        """The nodes of the next row. Among equals the one that was taken longest ago comes first: ties rotate."""
        taken = [heapq.heappop(heap) for _ in range(min(self._code.k, len(heap)))]
        turn = (len(self.rows) + 1) * len(self._nodes)
        for place, (count, _, i) in enumerate(taken):
            if count < -1:
                heapq.heappush(heap, (count + 1, turn + place, i))
        return sorted(i for _, _, i in taken)

    def _add(self, chosen: Sequence[int]) -> None:
        number, size = len(self.rows), len(self._nodes)
        others = [i for i in range(size) if i not in chosen]
        if len(others) > self._code.m:
            others.sort(key=lambda i: (self._parity_count[i], (i - number) % size))
            del others[self._code.m :]
        if others:
            first = min(others, key=lambda i: (self._duty_count[i], (i - number) % size))
            others.sort(key=lambda i: (i - first) % size)
            self._duty_count[first] += 1
        for i in others:
            self._parity_count[i] += 1
        chunks = tuple(self.queues[i][self._taken[i]] for i in chosen)
        for i in chosen:
            self._taken[i] += 1
        self.rows.append(
            Row(
                number=number,
                id=row_id(self._code, [(chunk.digest, chunk.nbytes) for chunk in chunks]),
                chunks=chunks,
                parity_nodes=tuple(self._nodes[i] for i in others),
                nbytes=max(chunk.nbytes for chunk in chunks),
            )
        )


def fragments_of(row: Row) -> tuple[Fragment, ...]:
    """The fragments that the row has: its chunks in coding order, then its parity. Absent data fragments are none."""
    data = [Fragment(chunk.node, i, chunk) for i, chunk in enumerate(row.chunks)]
    parity = [Fragment(node, j, None) for j, node in enumerate(row.parity_nodes)]
    return (*data, *parity)


def fragments_left(code: Code, row: Row, lost: Collection[str]) -> int:
    """Fragments known without the nodes in `lost`, absent ones (zeros) included: k of them give the row back."""
    absent = code.k - len(row.chunks)
    return absent + sum(fragment.node not in lost for fragment in fragments_of(row))


def rows_of_shard(rows: Iterable[Row], rank: int) -> dict[int, tuple[Row, int]]:
    """Where the chunks of a rank's shard are coded: chunk index -> (row, number of its data fragment)."""
    return {
        chunk.index: (row, number)
        for row in rows
        for number, chunk in enumerate(row.chunks)
        if chunk.rank == rank
    }


@dataclass(slots=True)
class NodeBytes:
    """What a plan costs one node. `parity_frames` counts frames, whatever is in them; equal fragments once."""

    parity_frames: int = 0
    parity_nbytes: int = 0
    received_nbytes: int = 0
    sent_nbytes: int = 0


def expected_bytes(
    nodes: Sequence[str], rows: Iterable[Row], *, held: Collection[bytes] = ()
) -> dict[str, NodeBytes]:
    """Memory and bulk bytes of each node for a plan, counted row by row.

    A row whose id is in `held` has its parity in place and moves nothing. Of the others each chunk goes to the first
    parity node, and from there a parity fragment to each of the rest: `k + m - 1` transfers a full row.
    """
    result = {node: NodeBytes() for node in nodes}
    seen: set[tuple[bytes, int, str]] = set()
    for row in rows:
        missing = [j for j, node in enumerate(row.parity_nodes) if (row.id, j, node) not in seen]
        for j in missing:
            seen.add((row.id, j, row.parity_nodes[j]))
            result[row.parity_nodes[j]].parity_frames += 1
            result[row.parity_nodes[j]].parity_nbytes += row.nbytes
        if row.id in held or not missing:
            continue
        first = result[row.parity_nodes[0]]
        for chunk in row.chunks:
            result[chunk.node].sent_nbytes += chunk.nbytes
            first.received_nbytes += chunk.nbytes
        for node in row.parity_nodes[1:]:
            first.sent_nbytes += row.nbytes
            result[node].received_nbytes += row.nbytes
    return result
