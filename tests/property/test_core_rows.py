"""Row plans: every chunk once, any m nodes may go, as few rows as possible, and what is frozen stays where it is."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.rows import (
    Row,
    RowChunk,
    chunks_of,
    expected_bytes,
    fragments_left,
    fragments_of,
    parity_frames_bound,
    plan_id,
    plan_rows,
    row_id,
    rows_min,
    rows_of_shard,
)
from snapd.errors import InvariantViolated

SIZE = 1 << 20
CODES = st.sampled_from([Code(6, 2), Code(4, 2), Code(2, 2), Code(3, 2), Code(2, 1), Code(1, 1), Code(3, 3)])


def record(
    rank: int, sizes: list[int], ages: list[int | None], seed: int = 0, *, world_size: int = 64
) -> ShardRecord:
    """A shard of step 100 whose chunks are of the steps in `ages` (None: new, with other bytes for each seed)."""
    chunks = []
    for index, (nbytes, age) in enumerate(zip(sizes, ages, strict=True)):
        digest = random.Random(f"{rank} {index} {age if age is not None else ('new', seed)}").randbytes(16)
        since = SnapshotId(1, age) if age is not None else None
        chunks.append(Chunk(nbytes, digest, Place(0, index), since))
    return ShardRecord(
        job="j",
        id=SnapshotId(1, 100),
        rank=rank,
        world_size=world_size,
        chunk_bytes=SIZE,
        layout_nbytes=1,
        early_values_offset=0,
        early_values_nbytes=0,
        chunks=tuple(chunks),
        parent=None,
        captured_wall_time_s=0.0,
        digest=bytes(16),
    )


@st.composite
def shards(draw: st.DrawFn, rank: int) -> ShardRecord:
    count = draw(st.one_of(st.integers(0, 12), st.integers(20, 60)))
    sizes = draw(st.lists(st.sampled_from([SIZE, SIZE, SIZE, 17, 70_000]), min_size=count, max_size=count))
    frozen = draw(st.integers(0, count))
    others = draw(
        st.lists(
            st.sampled_from([None, None, None, 3, 50, 99]), min_size=count - frozen, max_size=count - frozen
        )
    )
    return record(rank, sizes, [1] * frozen + others)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Code, list[str], dict[str, list[RowChunk]]]:
    """One or two ranks a node; nodes without chunks; one node with all."""
    code = draw(CODES)
    nodes = draw(st.permutations([f"n{i}" for i in range(code.size)]))
    ranks = draw(st.sampled_from([1, 2]))
    single = draw(st.sampled_from([None, None, None, nodes[0]]))
    chunks = {}
    for i, node in enumerate(nodes):
        if single is not None and node != single:
            continue
        records = [draw(shards(rank)) for rank in range(i * ranks, (i + 1) * ranks)]
        chunks[node] = chunks_of(node, records)
    return code, nodes, chunks


def names(row: Row) -> list[tuple[int, int]]:
    return [(chunk.rank, chunk.index) for chunk in row.chunks]


@given(groups())
def test_every_plan_keeps_the_rules(group: tuple[Code, list[str], dict[str, list[RowChunk]]]) -> None:
    code, nodes, chunks = group
    rows = plan_rows(code, nodes, chunks)
    planned = Counter(chunk for row in rows for chunk in row.chunks)
    assert planned == Counter(chunk for own in chunks.values() for chunk in own)
    assert set(planned.values()) <= {1}
    assert [row.number for row in rows] == list(range(len(rows)))
    for row in rows:
        held_by = [fragment.node for fragment in fragments_of(row)]
        assert len(set(held_by)) == len(held_by)
        assert 1 <= len(row.chunks) <= code.k and len(row.parity_nodes) == code.m
        assert row.nbytes == max(chunk.nbytes for chunk in row.chunks)
        assert row.id == row_id(code, [(chunk.digest, chunk.nbytes) for chunk in row.chunks])
        positions = [nodes.index(chunk.node) for chunk in row.chunks]
        assert positions == sorted(positions)


@given(groups())
def test_any_m_nodes_may_be_lost(group: tuple[Code, list[str], dict[str, list[RowChunk]]]) -> None:
    code, nodes, chunks = group
    rows = plan_rows(code, nodes, chunks)
    for lost in itertools.combinations(nodes, code.m):
        assert all(fragments_left(code, row, lost) >= code.k for row in rows)
    full = [row for row in rows if len(row.chunks) == code.k]
    if full:  # the promise is not larger than that
        lost = [chunk.node for chunk in full[0].chunks][: code.k]
        assert fragments_left(code, full[0], [*lost, *full[0].parity_nodes][: code.m + 1]) == code.k - 1


@given(groups())
def test_parity_is_no_more_than_it_must_be(group: tuple[Code, list[str], dict[str, list[RowChunk]]]) -> None:
    code, nodes, chunks = group
    rows = plan_rows(code, nodes, chunks)
    counts = {node: len(chunks.get(node, ())) for node in nodes}
    assert len(rows) == rows_min(code, counts.values())
    bound = parity_frames_bound(code, counts)
    spent = expected_bytes(nodes, rows)
    for node in nodes:
        assert spent[node].parity_frames <= bound[node]
    assert sum(cost.parity_frames for cost in spent.values()) <= len(rows) * code.m
    assert sum(c.sent_nbytes for c in spent.values()) == sum(c.received_nbytes for c in spent.values())
    if len(rows) * code.k == sum(counts.values()):
        of_rows = Counter(node for row in rows for node in row.parity_nodes)
        assert all(of_rows[node] == bound[node] for node in nodes)


@given(groups(), st.randoms(use_true_random=False))
def test_the_plan_depends_on_its_arguments_alone(
    group: tuple[Code, list[str], dict[str, list[RowChunk]]], lots: random.Random
) -> None:
    code, nodes, chunks = group
    shuffled = dict(lots.sample(sorted(chunks.items()), len(chunks)))
    rows = plan_rows(code, nodes, chunks)
    assert plan_rows(code, nodes, shuffled) == rows
    assert plan_id(nodes, plan_rows(code, nodes, shuffled)) == plan_id(nodes, rows)
    if rows:
        assert plan_id(nodes, rows[:-1]) != plan_id(nodes, rows)
        assert plan_id(list(reversed(nodes)), rows) != plan_id(nodes, rows)


@given(CODES, st.integers(1, 40), st.data())
def test_rows_of_frozen_chunks_stay(code: Code, frozen: int, data: st.DataObject) -> None:
    """New chunks come and go beside frozen ones, whose rows and parity nodes stay, to the last full row."""
    nodes = [f"n{i}" for i in range(code.size)]
    full = frozen * code.size // code.k
    plans = []
    for seed in (1, 2):
        young = data.draw(st.lists(st.integers(0, 5), min_size=code.size, max_size=code.size))
        new = data.draw(st.lists(st.integers(0, 30), min_size=code.size, max_size=code.size))
        extra = [a + b for a, b in zip(young, new, strict=True)]
        # Else a node has so much that leaving it out of a row would cost memory, which comes first.
        assume(full + max(extra) + 1 <= rows_min(code, [frozen + more for more in extra]))
        chunks = {}
        for rank, node in enumerate(nodes):
            ages = [1] * frozen + [98] * young[rank] + [None] * new[rank]
            chunks[node] = chunks_of(node, [record(rank, [SIZE] * len(ages), ages, seed)])
        plans.append(plan_rows(code, nodes, chunks)[:full])
    assert plans[0] == plans[1]
    assert len(plans[0]) == full and all(len(row.chunks) == code.k for row in plans[0])


def test_of_frozen_and_trained_halves_only_the_trained_one_is_coded_again() -> None:
    code, nodes = Code(6, 2), [f"n{i}" for i in range(8)]

    def plan(seed: int) -> tuple[Row, ...]:
        ages = [1] * 120 + [None] * 123
        chunks = {
            node: chunks_of(node, [record(rank, [SIZE] * 243, ages, seed)]) for rank, node in enumerate(nodes)
        }
        return plan_rows(code, nodes, chunks)

    before, after = plan(1), plan(2)
    held = {row.id for row in before}
    kept = [row for row in after if row.id in held]
    assert len(kept) == 160 == 8 * 120 // 6
    assert all(before[row.number] == row for row in kept)
    moved = expected_bytes(nodes, after, held=held)
    assert sum(cost.sent_nbytes for cost in moved.values()) == (len(after) - 160) * (6 + 1) * SIZE
    received = [cost.received_nbytes for cost in moved.values()]
    assert max(received) - min(received) <= 8 * SIZE  # the work on what changed is shared out


@pytest.mark.parametrize("code", [Code(6, 2), Code(2, 2), Code(2, 1), Code(1, 1), Code(12, 4)], ids=str)
@pytest.mark.parametrize("frozen", [0, 100])
def test_memory_and_network_keep_the_formula(code: Code, frozen: int) -> None:
    """256 chunks a rank, the size that snapd aims for, and five ranges with a short end."""
    nodes = [f"n{i}" for i in range(code.size)]
    lots = random.Random(7)
    chunks = {}
    for rank, node in enumerate(nodes):
        sizes = [SIZE if index % 51 else lots.randint(1, SIZE) for index in range(256)]
        ages = [1 if index < frozen else None for index in range(256)]
        chunks[node] = chunks_of(node, [record(rank, sizes, ages)])
    data = sum(chunk.nbytes for own in chunks.values() for chunk in own)
    spent = expected_bytes(nodes, plan_rows(code, nodes, chunks)).values()
    assert sum(cost.parity_nbytes for cost in spent) <= 1.03 * data * code.m / code.k
    assert sum(cost.parity_frames for cost in spent) * SIZE <= 1.03 * data * code.m / code.k
    assert sum(cost.sent_nbytes for cost in spent) <= 1.05 * data * (code.k + code.m - 1) / code.k
    frames = [cost.parity_frames for cost in spent]
    assert max(frames) - min(frames) <= 1
    received = [cost.received_nbytes for cost in spent]
    assert max(received) <= 1.1 * min(received)


def test_a_node_with_three_times_the_others() -> None:
    """It is in every row, so its chunks set the number of rows; what is frozen elsewhere must not add any."""
    code, nodes = Code(6, 2), [f"n{i}" for i in range(8)]
    chunks = {
        node: chunks_of(node, [record(rank, [SIZE] * count, ages)])
        for rank, node in enumerate(nodes)
        for count, ages in [(300, [None] * 300) if rank == 3 else (100, [1] * 100)]
    }
    rows = plan_rows(code, nodes, chunks)
    assert len(rows) == 300
    assert all("n3" in {chunk.node for chunk in row.chunks} for row in rows)
    frames = [cost.parity_frames for node, cost in expected_bytes(nodes, rows).items() if node != "n3"]
    assert max(frames) - min(frames) <= 1


def test_shards_find_their_rows() -> None:
    code, nodes = Code(2, 1), ["a", "b", "c"]
    chunks = {
        node: chunks_of(node, [record(2 * i + half, [SIZE, SIZE, 5], [None] * 3) for half in (0, 1)])
        for i, node in enumerate(nodes)
    }
    rows = plan_rows(code, nodes, chunks)
    for rank in range(6):
        found = rows_of_shard(rows, rank)
        assert sorted(found) == [0, 1, 2]
        assert all(names(row)[number] == (rank, index) for index, (row, number) in found.items())
    assert rows_of_shard(rows, 6) == {}


def test_fragments_are_numbered_as_the_codec_counts() -> None:
    code, nodes = Code(3, 2), ["a", "b", "c", "d", "e"]
    rows = plan_rows(code, nodes, {"b": chunks_of("b", [record(0, [SIZE], [None])])})
    assert [(f.node, f.number, f.coding_number(code)) for f in fragments_of(rows[0])] == [
        ("b", 0, 0),
        ("a", 0, 3),
        ("c", 1, 4),
    ]


def test_an_identity_is_of_code_digests_sizes_and_order() -> None:
    one, two = (bytes(16), 100), (b"x" * 16, 100)
    ids = [
        row_id(Code(2, 1), [one, two]),
        row_id(Code(2, 1), [two, one]),
        row_id(Code(2, 2), [one, two]),
        row_id(Code(2, 1), [one]),
        row_id(Code(2, 1), [one, (two[0], 101)]),
        row_id(Code(2, 1), []),
    ]
    assert len(set(ids)) == len(ids)
    assert {len(identity) for identity in ids} == {16}
    assert row_id(Code(2, 1), [one, two]).hex() == "a4b33cfdb809494c1af87b5fa9a7a0db"


def test_what_does_not_fit_together_is_refused() -> None:
    chunk = RowChunk("z", 0, 0, 5, bytes(16))
    with pytest.raises(InvariantViolated, match="does not fit its code"):
        plan_rows(Code(2, 1), ["a", "b"], {})
    with pytest.raises(InvariantViolated, match="does not fit its code"):
        plan_rows(Code(2, 1), ["a", "b", "b"], {})
    with pytest.raises(InvariantViolated, match="not in the group"):
        plan_rows(Code(2, 1), ["a", "b", "c"], {"z": [chunk]})
    with pytest.raises(InvariantViolated, match="not in the group"):
        plan_rows(Code(2, 1), ["a", "b", "c"], {"a": [chunk]})
    unordered = [RowChunk("a", 0, i, 5, bytes(16), SnapshotId(1, 9 - i)) for i in range(2)]
    with pytest.raises(InvariantViolated, match="not in the order"):
        plan_rows(Code(2, 1), ["a", "b", "c"], {"a": unordered})
