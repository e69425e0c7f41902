"""Which snapshot is restored, and from where: from what the nodes that answer hold."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

import pytest

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.recovery import (
    Choice,
    HeldRows,
    Inventory,
    RowSet,
    Situation,
    choose_among_nodes,
    gaps,
    missing_row,
)
from snapd.core.reports import Held
from snapd.core.restore import Outcome
from snapd.core.rows import Row, RowChunk, plan_rows

S1, S2, S3 = SnapshotId(1, 1), SnapshotId(1, 2), SnapshotId(1, 3)


def inventory(node: str, *held: tuple[SnapshotId, int], world_size: int = 3, **more: object) -> Inventory:
    shards = tuple(Held(snapshot, rank, world_size, 10) for snapshot, rank in held)
    return Inventory(node=node, held=shards, **more)  # type: ignore[arg-type]


def choose(inventories: list[Inventory], **facts: object) -> Choice:
    facts.setdefault("world_size", 3)
    return choose_among_nodes(Situation(inventories=inventories, **facts))  # type: ignore[arg-type]


# a group that has protected one snapshot: rank i on node i


def group(code: Code, chunk_counts: list[int]) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    nodes = tuple(f"n{i}" for i in range(code.size))
    chunks = {
        node: [RowChunk(node, rank, i, 4096, bytes([rank, i])) for i in range(count)]
        for rank, (node, count) in enumerate(zip(nodes, chunk_counts, strict=True))
    }
    return nodes, plan_rows(code, nodes, chunks)


def row_set(code: Code, nodes: tuple[str, ...], rows: tuple[Row, ...], epoch: int = 1) -> RowSet:
    return RowSet(S1, 0, epoch, nodes, code, rows, nodes)


def survivors(
    code: Code,
    nodes: tuple[str, ...],
    rows: tuple[Row, ...],
    lost: Collection[str],
    without: Collection[tuple[int, str]] = (),
) -> list[Inventory]:
    """What is left of a protected S1; `without`: parity of (row, node) that never came there."""
    found = []
    for rank, node in enumerate(nodes):
        if node in lost:
            continue
        fragments = frozenset(
            (row.id, row.parity_nodes.index(node))
            for row in rows
            if node in row.parity_nodes and (row.number, node) not in without
        )
        held_rows = HeldRows(S1, 0, 1, nodes, code, fragments, frozenset(range(len(nodes))))
        found.append(inventory(node, (S1, rank), world_size=len(nodes), rows=(held_rows,)))
    return found


def test_the_same_fragment_twice_is_one_fragment() -> None:
    """Found by the simulation (seed 1583): of a row that two epochs share, a node has another fragment than the newer
    plan gives it.
    """
    code = Code.parse("2+2")
    nodes, rows = group(code, [2, 2, 2, 2])
    left = survivors(code, nodes, rows, lost=nodes[:1])
    row = next(row for row in rows if any(chunk.node == nodes[0] for chunk in row.chunks))
    assert missing_row(row_set(code, nodes, rows), [row], left) == ""
    held_rows = [
        replace(each, rows=tuple(replace(r, fragments=frozenset({(row.id, 0)})) for r in each.rows))
        for each in left
        if each.node in row.parity_nodes
    ]
    lack = missing_row(row_set(code, nodes, rows), [row], held_rows)
    assert f"row {row.number} of group 0 has only" in lack and "1 of 2 parity fragments" in lack


def subsets(items: Collection[object]) -> Iterator[tuple[object, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


CODES = [
    ("2+1", [3, 3, 3]),
    ("2+1", [7, 1, 2]),
    ("2+2", [4, 4, 4, 4]),
    ("2+2", [5, 0, 1, 2]),
    ("1+1", [3, 2]),
]


@pytest.mark.parametrize(("text", "counts"), CODES)
def test_every_set_of_lost_nodes_is_found_restorable_exactly_when_each_row_has_k(
    text: str, counts: list[int]
) -> None:
    code = Code.parse(text)
    nodes, rows = group(code, counts)
    for lost in subsets(nodes):
        left = survivors(code, nodes, rows, lost)
        choice = choose(left, row_sets=[row_set(code, nodes, rows)], world_size=code.size)
        # a shard of a lost node needs each of its rows; counted here fragment by fragment
        is_whole = True
        for row in rows:
            needed = any(chunk.node in lost for chunk in row.chunks)
            fragments = code.k - len(row.chunks)
            fragments += sum(chunk.node not in lost for chunk in row.chunks)
            fragments += sum(node not in lost for node in row.parity_nodes)
            is_whole = is_whole and (not needed or fragments >= code.k)
        # a rank without chunks cannot be decoded from rows: its record names none
        empty = {node for node, count in zip(nodes, counts, strict=True) if count == 0}
        is_whole = is_whole and not empty & set(lost) and len(lost) < code.size
        assert (choice.decision.outcome is Outcome.FOUND) == is_whole, lost
        if len(lost) <= code.m and not empty & set(lost):
            assert is_whole
        if is_whole:
            assert [source.rank for source in choice.sources] == list(range(code.size))
            for source, node in zip(choice.sources, nodes, strict=True):
                assert source.nodes == (() if node in lost else (node,))
                assert (source.row_set is not None) == (node in lost)


def test_parity_that_never_came_is_not_counted() -> None:
    code = Code(2, 1)
    nodes, rows = group(code, [2, 2, 2])
    for lost in nodes:
        for number in range(len(rows)):
            row = rows[number]
            without = {(row.number, node) for node in row.parity_nodes}
            left = survivors(code, nodes, rows, [lost], without)
            choice = choose(left, row_sets=[row_set(code, nodes, rows)])
            needs = any(chunk.node == lost for chunk in row.chunks)
            assert (choice.decision.outcome is Outcome.FOUND) == (not needs)
            if needs:
                rank = nodes.index(lost)
                assert (
                    f"rank {rank}: no node has its shard any more, and row {number} of group 0 has only 1 of 2 chunks"
                    f" and 0 of 1 parity fragments; lost: {lost}" in choice.decision.reason
                )


def test_three_lost_of_two_plus_two_are_named() -> None:
    code = Code(2, 2)
    nodes, rows = group(code, [2, 2, 2, 2])
    left = survivors(code, nodes, rows, ["n0", "n1", "n2"])
    decision = choose(left, row_sets=[row_set(code, nodes, rows)], world_size=4).decision
    assert decision.outcome is Outcome.UNUSABLE
    assert decision.chosen is None
    assert "rank 0: no node has its shard any more" in decision.reason
    assert "lost: n0, n1, n2" in decision.reason


def test_the_rows_of_an_older_epoch_serve_when_the_newer_ones_are_not_done() -> None:
    code = Code(2, 1)
    nodes, rows = group(code, [2, 2, 2])
    newer = tuple(Row(r.number, bytes([r.number] * 16), r.chunks, r.parity_nodes, r.nbytes) for r in rows)
    left = survivors(code, nodes, rows, ["n1"])
    both = [row_set(code, nodes, newer, epoch=2), row_set(code, nodes, rows, epoch=1)]
    choice = choose(left, row_sets=both)
    assert choice.decision.outcome is Outcome.FOUND
    assert choice.sources[1].row_set == both[1]


def test_data_that_lies_elsewhere_by_now_counts() -> None:
    """Rank 0 was brought to `x`, its own node is gone, and so is another: its chunks still give the rows back."""
    code = Code(2, 1)
    nodes, rows = group(code, [2, 2, 2])
    left = [*survivors(code, nodes, rows, ["n0", "n1"]), inventory("x", (S1, 0))]
    choice = choose(left, row_sets=[row_set(code, nodes, rows)])
    of_rank_1 = [row for row in rows if any(chunk.rank == 1 for chunk in row.chunks)]
    decodable = all(
        sum(chunk.rank in (0, 2) for chunk in row.chunks) + ("n2" in row.parity_nodes) >= 2
        for row in of_rank_1
    )
    assert (choice.decision.outcome is Outcome.FOUND) == decodable
    assert missing_row(row_set(code, nodes, rows), [], left) == ""
    assert choice.sources == () or choice.sources[0].nodes == ("x",)


# choosing, for every subset of what three nodes can hold of two snapshots


def test_the_newest_snapshot_that_every_rank_has_whole_somewhere() -> None:
    parts = list(itertools.product((S1, S2), range(3)))
    for subset in subsets(parts):
        for known in (None, S1, S2):
            nodes = [inventory(f"n{r}", *(p for p in subset if p[1] == r)) for r in range(3)]
            choice = choose(nodes, newest_known=known)
            whole = [s for s in (S1, S2) if all((s, rank) in subset for rank in range(3))]
            decision = choice.decision
            if whole:
                assert (decision.outcome, decision.chosen) == (Outcome.FOUND, whole[-1])
                assert [source.nodes for source in choice.sources] == [("n0",), ("n1",), ("n2",)]
                is_passed_over = whole[-1] == S1 and (known == S2 or any(s == S2 for s, _ in subset))
                assert ("; not " in decision.reason) == is_passed_over
            else:
                assert decision.chosen is None
                # what was complete once is lost, and to begin anew has to be asked for
                assert decision.outcome is (Outcome.ABSENT if known is None else Outcome.UNUSABLE)
            assert gaps(nodes).keys() == {s for s, _ in subset} - set(whole)


@pytest.mark.parametrize("accept_older", [False, True])
@pytest.mark.parametrize("newest_known", [None, S1, S2])
@pytest.mark.parametrize("has_part", [False, True])
def test_a_node_that_does_not_answer_is_waited_for_only_when_it_may_hold_what_lacks(
    accept_older: bool, newest_known: SnapshotId | None, has_part: bool
) -> None:
    nodes = [inventory("a", (S1, 0), (S1, 1), (S1, 2), *([(S2, 0)] if has_part else []))]
    choice = choose(nodes, unreachable=["b"], newest_known=newest_known, accept_older=accept_older)
    may_be_newer = has_part or newest_known == S2
    if may_be_newer and not accept_older:
        assert choice.decision.outcome is Outcome.UNREACHABLE
        assert choice.unreachable == ("b",)
        assert f"b did not answer and may hold what {S2} lacks" in choice.decision.reason
    else:
        assert (choice.decision.outcome, choice.decision.chosen) == (Outcome.FOUND, S1)


@pytest.mark.parametrize("accept_older", [False, True])
def test_absent_and_out_of_reach_are_two_answers(accept_older: bool) -> None:
    assert choose([inventory("a")]).decision.outcome is Outcome.ABSENT
    silent = choose([inventory("a")], unreachable=["b", "c"], accept_older=accept_older).decision
    assert silent.outcome is Outcome.UNREACHABLE
    assert silent.reason == "b, c did not answer, and no other node holds a whole snapshot"


def test_what_was_captured_by_some_ranks_only_and_never_complete_is_absent() -> None:
    decision = choose([inventory("a", (S1, 0)), inventory("b")]).decision
    assert decision.outcome is Outcome.ABSENT
    assert "rank 1: it was captured nowhere that answers" in decision.reason


def test_a_complete_one_whose_nodes_are_all_lost_is_not_absent() -> None:
    decision = choose([inventory("a")], newest_known=S2).decision
    assert decision.outcome is Outcome.UNUSABLE
    assert "it was complete; no node has anything of it any more" in decision.reason


def test_a_bad_snapshot_is_passed_over_and_the_reason_says_so() -> None:
    ranks = [(s, r) for s in (S1, S2) for r in range(3)]
    nodes = [inventory("a", *ranks), inventory("b", problems=((S2, "rank 0 chunk 3: digest"),))]
    decision = choose(nodes).decision
    assert (decision.outcome, decision.chosen) == (Outcome.FOUND, S1)
    assert decision.reason.endswith(f"; not {S2}: rank 0 chunk 3: digest")
    only_bad = choose([inventory("a", problems=((S1, "x"),)), inventory("b", (S1, 0))]).decision
    assert only_bad.outcome is Outcome.UNUSABLE


def test_a_step_that_was_asked_for() -> None:
    nodes = [inventory("a", *[(s, r) for s in (S1, S2, S3, SnapshotId(2, 2)) for r in range(3)])]
    assert choose(nodes, step=1).decision.chosen == S1
    assert choose(nodes, step=2).decision.chosen == SnapshotId(2, 2), "of the newest generation that has it"
    missing = choose(nodes, step=9).decision
    assert missing.outcome is Outcome.ABSENT
    assert missing.reason.startswith("no snapshot of step 9; there is ")


def test_another_world_size_is_an_answer_of_its_own() -> None:
    nodes = [inventory("a", (S1, 0), (S1, 1), world_size=2)]
    decision = choose(nodes).decision
    assert (decision.outcome, decision.chosen) == (Outcome.WORLD_SIZE_DIFFERS, S1)
    assert decision.reason == f"{S1} was captured by 2 ranks, this world has 3"


def test_all_nodes_that_have_a_shard_are_named_as_its_source() -> None:
    nodes = [inventory(name, *[(S1, r) for r in range(3)]) for name in ("b", "a")]
    assert {source.nodes for source in choose(nodes).sources} == {("a", "b")}


def test_long_lists_are_cut() -> None:
    nodes = [inventory("a", (S1, 0), world_size=40)]
    assert (
        "rank 8: it was captured nowhere that answers and 31 more"
        in choose(nodes, world_size=40).decision.reason
    )
