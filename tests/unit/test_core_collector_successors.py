"""The collector: what is a fact for its successor, and what a successor makes of it; the agreed interval."""

from __future__ import annotations

from dataclasses import replace

from snapd.core.collector import Collector
from snapd.core.interval import Interval
from snapd.core.reports import NodeReport, Record, Told
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

# nobody is told what is not recorded


def test_nobody_is_told_what_is_protected_before_it_is_recorded_and_nothing_goes_for_it() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    settle(core, TABLE)
    for _ in range(2):
        all_take(core, nodes, 1, 2, keep_complete=1, done=done(2))
        orders = core.settle(TABLE)
        assert (orders.protected, orders.target) == (snap(1), snap(2))
        assert snap(1) not in dict(orders.drop)
        assert core.to_record.told == Told(snap(2), snap(2), 1)
    core.recorded(core.to_record)
    orders = core.settle(TABLE)
    assert (orders.protected, orders.protected_epoch, orders.target) == (snap(2), 1, None)
    assert [s.step for s, _ in orders.drop] == [1]


def test_what_was_found_stays_until_it_is_recorded_whatever_comes_after_it() -> None:
    """Its record may be under way: who comes next would begin with it."""
    core, nodes = collector(), world()
    all_take(core, nodes, 1)
    core.settle(TABLE)
    all_take(core, nodes, 1, 2, 3, keep_complete=1, done=done(1))
    orders = core.settle(TABLE)
    assert (orders.protected, orders.target, orders.complete) == (None, snap(3), snap(3))
    assert [s.step for s, _ in orders.drop] == [2]
    all_take(core, nodes, 1, 3, done=done(1, 3))
    assert snap(1) not in dict(core.settle(TABLE).drop)
    assert core.to_record.told == Told(snap(3), snap(1), 1)
    core.recorded(core.to_record)
    assert core.settle(TABLE).protected == snap(1)
    assert core.to_record.told.protected == snap(3), "now it is its turn"


def test_a_collector_that_is_cut_off_takes_with_it_only_what_nobody_was_told_of() -> None:
    """Found by the simulation (seed 1048): its own node called it protected, the successor dropped parts of it."""
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, done=done(2))
    assert core.settle(TABLE).protected is None
    successor = Collector(8, Record())
    for rank, node in enumerate(nodes):
        more = (held(1, rank, world_size=3), held(2, rank, world_size=3), held(3, rank, world_size=3))
        successor.take(node.has(*more, keep_complete=1, done=()))
    assert [s.step for s, _ in successor.settle(TABLE).drop] == [1, 2]
    recorded = Collector(8, core.to_record)
    for node in nodes:
        recorded.take(node())
    assert [s.step for s, _ in recorded.settle(TABLE).drop] == [1], "once recorded, every successor knows it"


def test_a_record_that_comes_too_late_is_no_fact() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    core.settle(TABLE)
    under_way = core.to_record
    core.take(nodes[0](problems=((snap(1), "bad"),)))
    core.settle(TABLE)
    core.recorded(under_way)
    assert core.settle(TABLE).protected is None
    assert core.to_record.told.protected is None


def test_what_a_node_may_be_dropping_is_not_found_protected() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, keep_complete=1)
    assert [s.step for s, _ in core.settle(TABLE).drop] == [1]
    all_take(core, nodes, 1, 2, done=done(1))  # what they said before they heard of it
    assert core.settle(TABLE).protected is None
    assert core.to_record.told.protected is None


# what an earlier collector has promised


def test_what_a_node_was_told_holds_on() -> None:
    core, nodes = collector(protected=snap(1)), world()
    all_take(core, nodes, 3, 4, keep_complete=1)
    core.take(nodes[0](told=Told(snap(4), snap(3), 2)))
    orders = settle(core, TABLE)
    assert (orders.complete, orders.protected, orders.protected_epoch) == (snap(4), snap(3), 2)
    assert orders.drop == ()


def test_an_older_word_changes_nothing() -> None:
    core, nodes = collector(complete=snap(5), protected=snap(5)), world()
    core.take(nodes[0](told=Told(snap(4), snap(3), 2)))
    orders = settle(core, TABLE)
    assert (orders.complete, orders.protected) == (snap(5), snap(5))


def test_nothing_is_dropped_before_all_who_are_awaited_have_reported() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, 2, keep_complete=1, done=done(2))
    assert settle(core, TABLE, awaited=["a", "b", "c", "d"]).drop == ()
    core.take(Reporting("d", [], world_size=0)(is_capturing=False))
    assert [s.step for s, _ in settle(core, TABLE, awaited=["a", "b", "c", "d"]).drop] == [1]


def test_the_epoch_under_which_a_snapshot_is_protected_is_told() -> None:
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    assert settle(core, TABLE).protected_epoch == 1
    newer = table_of(["a", "b", "c"], epoch=2)
    assert settle(core, newer).protected_epoch == 1
    all_take(core, nodes, 1, done=done(1), epoch=2)
    assert settle(core, newer).protected_epoch == 2


def test_a_later_epoch_protects_nothing_of_which_a_shard_is_left_in_the_rows_of_the_former_one_only() -> None:
    """Found by the simulation (seed 186): the parity of the epoch before was dropped then."""
    core, nodes = collector(), world()
    all_take(core, nodes, 1, done=done(1))
    assert settle(core, TABLE).protected_epoch == 1
    core.forget("c")
    newer = table_of(["a", "b", "d"], epoch=2)
    for rank, node in enumerate(nodes[:2]):
        core.take(node.has(held(1, rank, world_size=3), done=done(1), epoch=2))
    core.take(Reporting("d", [], world_size=3, generation=1).has(done=done(1), epoch=2))
    orders = settle(core, newer)
    assert core.missing_parts(snap(1), core.holders()[snap(1)], newer) == "", "all of the new group is done"
    assert (orders.protected, orders.protected_epoch) == (snap(1), 1)


# the interval


def interval_after(core: Collector) -> Interval:
    return settle(core, TABLE).interval


def test_the_interval_is_as_configured_when_a_generation_begins() -> None:
    core, nodes = collector(), world()
    for node in nodes:
        core.take(node(interval_steps=5))
    assert interval_after(core) == Interval(configured=5)


def test_a_skipped_step_widens_it_once_from_a_step_that_nobody_has_reached() -> None:
    core, nodes = collector(), world()
    for node in nodes:
        core.take(node(newest_step_seen=100))
    interval_after(core)
    for node in nodes:  # all of them for the same want of room
        core.take(node(aborts=1, newest_step_seen=100))
    widened = interval_after(core)
    assert (widened.factor, widened.steps) == (2, 2)
    assert widened.from_step > 100
    core.take(nodes[0](aborts=1, newest_step_seen=widened.from_step))
    assert interval_after(core).factor == 2, "a report that repeats a count says nothing new"
    core.take(nodes[0](aborts=2))
    assert interval_after(core).factor == 4


def test_it_is_never_wider_than_its_bound_and_narrows_after_64_complete_ones() -> None:
    core, nodes = collector(), world()
    step = 0
    for count in range(1, 7):
        step = core.orders.interval.from_step + 1
        core.take(nodes[0](aborts=count, newest_step_seen=step))
        settle(core, TABLE)
    assert core.orders.interval.factor == 8
    factors = []
    for number in range(1, 66):
        all_take(core, nodes, step + number, newest_step_seen=step + 1000 + number)
        factors.append(settle(core, TABLE).interval.factor)
    assert factors[62:] == [8, 4, 4]
    assert core.orders.interval.from_step > step + 1000 + 64


def test_a_new_generation_begins_as_configured_again() -> None:
    core, nodes = collector(), world()
    core.take(nodes[0](newest_step_seen=10))
    settle(core, TABLE)
    core.take(nodes[0](aborts=1))
    assert interval_after(core).factor == 2
    core.take(nodes[1](generation=2, served=()))
    assert interval_after(core) == Interval(), "also before its trainers have come"
    core.take(nodes[0](generation=2, interval_steps=3))
    assert interval_after(core) == Interval(configured=3)


def test_a_collector_that_takes_over_goes_on_with_a_widened_interval() -> None:
    _, nodes = collector(), world()
    widened = Interval(configured=3, factor=2, from_step=30)
    successor = Collector(8, Record(generation=1, interval=widened))
    assert successor.orders.interval == widened, "also for who asks before anything is settled"
    for node in nodes:
        successor.take(node(interval_steps=3, newest_step_seen=40))
    assert interval_after(successor) == widened
    successor.take(nodes[0](aborts=1))
    assert interval_after(successor).factor == 4
    for node in nodes:
        successor.take(node(generation=2, interval_steps=3))
    assert interval_after(successor) == Interval(configured=3)


def test_of_two_agreed_intervals_the_newer_one_counts() -> None:
    record = Record(Told(snap(1)), 2, Interval(1, 2, 64))
    assert record.with_interval(0, Interval()) is record
    assert record.with_interval(2, Interval(1, 4, 32)) is record
    assert record.with_interval(1, Interval(1, 4, 128)) is record
    assert record.with_interval(2, Interval(1, 4, 80)) == Record(Told(snap(1)), 2, Interval(1, 4, 80))
    assert record.with_interval(3, Interval(5)).generation == 3


def test_a_collector_that_takes_over_widens_nothing_for_what_was_skipped_before() -> None:
    _, nodes = collector(), world()
    for node in nodes:
        node(newest_step_seen=500, aborts=7)
    successor = collector()
    for node in nodes:
        successor.take(node())
    assert interval_after(successor).factor == 1
    successor.take(nodes[1](aborts=8))
    assert interval_after(successor).factor == 2


def test_a_node_that_holds_nothing_changes_nothing() -> None:
    core = collector()
    empty = NodeReport(node="a", instance=1, serial=1, epoch=0, generation=0, world_size=0)
    assert core.take(empty)
    assert replace(settle(core, TABLE), number=0, reason="") == replace(
        collector().orders, number=0, reason=""
    )
