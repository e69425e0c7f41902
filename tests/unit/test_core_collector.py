"""The collector: what follows from what the nodes report."""

from __future__ import annotations

import itertools

import pytest

from snapd.core.ids import SnapshotId
from tests.support.collector_reports import (
    TABLE,
    Reporting,
    all_take,
    collector,
    done,
    held,
    settle,
    snap,
    table_of,
    world,
)

# reports


def test_a_report_that_a_newer_one_overtook_is_ignored() -> None:
    core, (a, b, _) = collector(), world()
    late, newest = a.has(held(1, 0, world_size=3)), a.has(held(2, 0, world_size=3))
    assert core.take(newest)
    assert not core.take(late)
    assert not core.take(newest)
    assert core.take(b.has())
    assert core.reports["a"].held == held(2, 0, world_size=3)


def test_a_restarted_daemon_counts_its_serials_anew() -> None:
    core, (a, *_) = collector(), world()
    for _ in range(5):
        core.take(a.has(held(1, 0, world_size=3)))
    a.serial = 0
    assert core.take(a(instance=2, held=()))
    assert core.reports["a"].held == ()


def test_numbers_grow_with_changes_and_only_then() -> None:
    core, nodes = collector(), world()
    first = settle(core, TABLE).number
    assert settle(core, TABLE).number == first
    all_take(core, nodes, 1)
    settle(core, TABLE)
    second = settle(core, TABLE).number
    assert second > first
    core.take(nodes[0](newest_step_seen=17))
    assert settle(core, TABLE).number == second
    core.take(nodes[0](generation=2))
    assert settle(core, TABLE).number == second + 1


# complete, for every subset of what three nodes can hold of two snapshots


PARTS = list(itertools.product((0, 1, 2), (1, 2)))  # (rank, step)


@pytest.mark.parametrize("is_capturing", [True, False])
def test_every_subset_of_shards_leads_to_the_newest_complete_one(is_capturing: bool) -> None:
    for size in range(len(PARTS) + 1):
        for subset in itertools.combinations(PARTS, size):
            core, nodes = collector(), world()
            for rank, node in enumerate(nodes):
                mine = [held(step, rank, world_size=3) for r, step in subset if r == rank]
                newest = max((step for r, step in subset if r == rank), default=0)
                core.take(node.has(*mine, passed={rank: newest}, is_capturing=is_capturing, keep_complete=1))
            orders = settle(core, TABLE)
            whole = [step for step in (1, 2) if all((rank, step) in subset for rank in range(3))]
            assert orders.complete == (snap(whole[-1]) if whole else None), subset
            assert orders.target == orders.complete
            dropped = {snapshot.step for snapshot, _ in orders.drop}
            present = {step for _, step in subset}
            expected = set()
            if is_capturing:
                for step in present - set(whole[-1:]):
                    is_older = bool(whole) and step < whole[-1]
                    never = any(
                        (rank, step) not in subset
                        and max((s for r, s in subset if r == rank), default=0) >= step
                        for rank in range(3)
                    )
                    if is_older or never:
                        expected.add(step)
            assert dropped == expected, subset


def test_the_newest_complete_one_is_remembered_when_its_holders_fall_silent() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 4)
    settle(core, TABLE)
    core.forget("b")
    orders = settle(core, TABLE)
    assert orders.complete == snap(4)
    assert orders.drop == ()
    core.take(nodes[0].has(held(3, 0, world_size=3), held(4, 0, world_size=3)))
    core.take(nodes[2].has(held(3, 2, world_size=3), held(4, 2, world_size=3)))
    core.take(nodes[1].has(held(3, 1, world_size=3)))
    orders = settle(core, TABLE)
    assert orders.complete == snap(4)
    assert snap(3) not in dict(orders.drop), "the newest one that is whole stays, whatever was complete once"


def test_a_snapshot_that_is_proved_bad_is_complete_no_more_and_all_hear_of_it() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2)
    assert settle(core, TABLE).complete == snap(2)
    core.take(nodes[1].has(held(1, 1, world_size=3), problems=((snap(2), "rank 1 chunk 0: digest"),)))
    orders = settle(core, TABLE)
    assert orders.complete == snap(1)
    assert orders.target == snap(1)
    assert orders.problems == ((snap(2), "rank 1 chunk 0: digest"),)


def test_an_older_snapshot_never_becomes_the_newest_complete_one_afterwards() -> None:
    core, nodes = collector(complete=snap(7)), world()
    all_take(core, nodes, 5)
    orders = settle(core, TABLE)
    assert orders.complete == snap(7)
    assert orders.target == snap(5), "what is whole is protected, even so"


# protection


@pytest.mark.parametrize(
    "parts", list(itertools.product(("none", "old epoch", "other plan", "done"), repeat=3))
)
def test_protected_means_all_parts_under_the_tables_epoch_with_one_plan(parts: tuple[str, ...]) -> None:
    core, nodes = collector(), world()
    for rank, (node, part) in enumerate(zip(nodes, parts, strict=True)):
        core.take(
            node.has(
                held(1, rank, world_size=3),
                epoch=1 if part == "old epoch" else 2,
                done={"none": (), "other plan": done(1, plan=b"other")}.get(part, done(1)),
            )
        )
    orders = settle(core, table_of(["a", "b", "c"], epoch=2))
    is_protected = set(parts) == {"done"} or set(parts) == {"other plan"}
    assert orders.protected == (snap(1) if is_protected else None)
    assert orders.target == (None if is_protected else snap(1))
    missing = core.missing_parts(snap(1), core.holders()[snap(1)], table_of(["a", "b", "c"], epoch=2))
    absent = [name for name, part in zip("abc", parts, strict=True) if part in ("none", "old epoch")]
    if absent:
        assert missing == "waiting for " + ", ".join(absent)
    else:
        assert ("planned different rows" in missing) == (not is_protected)


def test_every_group_that_holds_a_shard_has_to_be_done() -> None:
    table = table_of(["a", "b"], ["c", "d"], ["e", "f"])
    core, nodes = collector(), world(4)
    all_take(core, nodes, 1)
    for name in "ef":
        core.take(Reporting(name, [], world_size=0)(is_capturing=False))
    orders = settle(core, table)
    assert (orders.target, orders.target_groups) == (snap(1), (0, 1))
    for node in nodes[:3]:
        core.take(node(done=done(1)))
    assert settle(core, table).protected is None
    core.take(nodes[3](done=done(1)))
    orders = settle(core, table)
    assert (orders.protected, orders.target, orders.target_groups) == (snap(1), None, ())


def test_plans_may_differ_between_groups() -> None:
    table = table_of(["a", "b"], ["c", "d"])
    core, nodes = collector(), world(4)
    all_take(core, nodes, 1, done=done(1, plan=b"one"))
    for node in nodes[2:]:
        core.take(node(done=done(1, plan=b"two")))
    assert settle(core, table).protected == snap(1)


def test_a_target_is_finished_before_a_newer_one_is_taken_up_and_then_the_newest_is() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1)
    assert settle(core, TABLE).target == snap(1)
    for step in (2, 3, 4):
        all_take(core, nodes, 1, step)
        orders = settle(core, TABLE)
        assert (orders.complete, orders.target) == (snap(step), snap(1))
        assert snap(1) not in dict(orders.drop)
    all_take(core, nodes, 1, 4, done=done(1))
    orders = settle(core, TABLE)
    assert (orders.protected, orders.target) == (snap(1), snap(4))


def test_a_target_of_an_older_generation_gives_way() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 5)
    assert settle(core, TABLE).target == snap(5)
    for rank, node in enumerate(nodes):
        both = (*held(5, rank, world_size=3), *held(6, rank, world_size=3, generation=2))
        core.take(node(held=both, generation=2, closed_below=2))
    assert settle(core, TABLE).target == snap(6, 2)


def test_another_epoch_makes_the_newest_complete_one_the_target_again() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    assert settle(core, TABLE).protected == snap(1)
    orders = settle(core, table_of(["a", "b", "c"], epoch=2))
    assert (orders.protected, orders.target) == (snap(1), snap(1)), "protected once, and to be protected anew"
    all_take(core, nodes, 1, done=done(1), epoch=2)
    orders = settle(core, table_of(["a", "b", "c"], epoch=2))
    assert (orders.protected, orders.target) == (snap(1), None)


def test_a_node_in_no_group_with_a_code_is_said_and_stops_the_target() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1)
    orders = settle(core, table_of(["a", "b"], ["c"]))
    assert orders.target is None
    assert orders.reason == "rank 2's node c is in no group that could protect it"


def test_without_a_table_nothing_new_is_begun_and_what_is_protected_stays_so() -> None:
    core, nodes = collector(protected=snap(1)), world()
    all_take(core, nodes, 1, 2)
    orders = settle(core, None)
    assert (orders.complete, orders.protected, orders.target) == (snap(2), snap(1), None)
    assert orders.reason == "no group table"
    assert snap(1) not in dict(orders.drop)


def test_a_bad_protected_snapshot_is_protected_no_more() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    assert settle(core, TABLE).protected == snap(1)
    core.take(nodes[0](problems=((snap(1), "bad"),)))
    orders = settle(core, TABLE)
    assert (orders.protected, orders.complete) == (None, None)


# what may go


def test_slots_keep_as_many_complete_ones_as_there_is_room_for() -> None:
    for room in (1, 2, 3):
        core, nodes = collector(), world()
        all_take(core, nodes, 1, 2, 3, keep_complete=room, done=done(3))
        orders = settle(core, TABLE)
        assert orders.protected == snap(3)
        assert [s.step for s, _ in orders.drop] == list(range(1, 4 - room))


def test_the_node_with_least_room_counts_and_one_without_ranks_does_not() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, 3, done=done(3), keep_complete=3)
    core.take(nodes[1](keep_complete=2))
    core.take(Reporting("d", [], world_size=0)(keep_complete=1, is_capturing=False))
    assert [s.step for s, _ in settle(core, TABLE).drop] == [1]


def test_nothing_older_goes_before_the_new_generation_has_passed_a_step() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, 3, keep_complete=1, is_capturing=False)
    for node in nodes:
        core.take(node(generation=2, closed_below=2))
    assert settle(core, TABLE).drop == ()
    core.take(nodes[0](is_capturing=True))
    assert [s.step for s, _ in settle(core, TABLE).drop] == [1, 2]


def test_a_trainer_of_an_older_generation_does_not_count_as_capturing() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, keep_complete=1)
    for node in nodes[1:]:
        core.take(node(generation=2, is_capturing=False))
    assert settle(core, TABLE).drop == ()


def test_what_was_restored_stays_until_the_generation_has_a_complete_one_of_its_own() -> None:
    core, nodes = collector(), world()
    for rank, node in enumerate(nodes):
        both = (*held(3, rank, world_size=3), *held(5, rank, world_size=3))
        core.take(node(held=both, generation=2, closed_below=2, keep_complete=1))
    core.restored(2, snap(3))
    assert snap(3) not in dict(settle(core, TABLE).drop)
    for rank, node in enumerate(nodes):
        new = held(4, rank, world_size=3, generation=2)
        core.take(node(held=(*node.facts["held"], *new)))  # type: ignore[misc]
    assert [s for s, _ in settle(core, TABLE).drop] == [snap(3), snap(5)]


def test_the_parent_of_an_older_generation_does_not_displace_a_newer_ones() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 3, 4, 5, keep_complete=1, generation=3, closed_below=3)
    core.restored(3, snap(4))
    core.restored(2, snap(3))
    dropped = dict(settle(core, TABLE).drop)
    assert snap(4) not in dropped
    assert snap(3) in dropped


@pytest.mark.parametrize("has_passed", [False, True])
def test_an_unfinished_snapshot_goes_when_a_rank_has_gone_on_without_it(has_passed: bool) -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1)
    core.take(nodes[0].has(held(1, 0, world_size=3), held(2, 0, world_size=3)))
    core.take(nodes[1](passed={1: 2 if has_passed else 1}))
    orders = settle(core, TABLE)
    assert dict(orders.drop) == ({snap(2): "ranks 1 went on without it"} if has_passed else {})


def unfinished_of_an_older_world(
    *, served: int, closed_below: int, is_capturing: bool
) -> dict[SnapshotId, str]:
    """Step 2 of generation 1 lacks rank 2; three nodes report of generation 2."""
    core, nodes = collector(), world(generation=2)
    for rank, node in enumerate(nodes):
        old = held(2, rank, world_size=3) if rank < 2 else ()
        core.take(
            node(
                held=(*held(1, rank, world_size=3), *old),
                served=(rank,) if rank < served else (),
                closed_below=closed_below,
                is_capturing=is_capturing,
            )
        )
    return dict(settle(core, TABLE).drop)


@pytest.mark.parametrize("served", [2, 3])
@pytest.mark.parametrize("closed_below", [1, 2])
@pytest.mark.parametrize("is_capturing", [False, True])
def test_an_unfinished_one_of_an_older_world_goes_when_the_new_one_is_all_there(
    served: int, closed_below: int, is_capturing: bool
) -> None:
    dropped = unfinished_of_an_older_world(
        served=served, closed_below=closed_below, is_capturing=is_capturing
    )
    assert (snap(2) in dropped) == (served == 3 and closed_below == 2 and is_capturing)
