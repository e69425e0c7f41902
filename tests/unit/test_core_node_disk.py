"""Which snapshots a node keeps on its own disk, and which it brings back: pure decisions."""

from __future__ import annotations

from snapd.core.flushing import choose_for_disks
from snapd.core.ids import SnapshotId
from snapd.core.node_disk import DiskPart, held_to_let_go, parts_to_bring, parts_to_drop, whole_parts
from snapd.core.reports import FlushNews


def part(step: int, *ranks: int, world: int = 2, generation: int = 1) -> DiskPart:
    return DiskPart(SnapshotId(generation, step), frozenset(ranks), world if ranks else 0)


def ids(*steps: int, generation: int = 1) -> list[SnapshotId]:
    return [SnapshotId(generation, step) for step in steps]


def test_alone_only_what_has_all_ranks_is_whole() -> None:
    parts = [part(1, 0, 1), part(2, 0), part(3, 0, 1), part(4)]
    assert whole_parts(parts, is_alone=True) == ids(3, 1)


def test_in_a_cluster_what_has_fewer_ranks_than_its_generation_was_cut_off() -> None:
    parts = [part(1, 2, 3, world=8), part(2, 2, world=8), part(3, 2, 3, world=8), part(4)]
    assert whole_parts(parts, is_alone=False) == ids(3, 1)
    alone_in_its_generation = part(1, 2, world=8, generation=2)
    found = whole_parts([*parts, alone_in_its_generation], is_alone=False)
    assert found == [SnapshotId(2, 1), *ids(3, 1)]


def test_another_number_of_ranks_says_nothing_of_the_others() -> None:
    parts = [part(1, 0, 1, world=4), part(2, 0, world=2)]
    assert whole_parts(parts, is_alone=False) == ids(2, 1)


def test_the_newest_whole_ones_stay_and_what_is_newer_too() -> None:
    parts = [part(step, 0, 1) for step in (1, 2, 3, 4)] + [part(5, 0), part(0, 0)]
    assert parts_to_drop(parts, keep=2, is_alone=True) == ids(0, 1, 2)
    assert parts_to_drop(parts, keep=9, is_alone=True) == ids(0)


def test_what_all_disks_have_stays_however_old_it_is() -> None:
    parts = [part(step, 0, 1) for step in (1, 2, 3, 4)]
    assert parts_to_drop(parts, keep=2, is_alone=False, common=SnapshotId(1, 1)) == ids(2)


def test_nothing_goes_before_something_is_whole() -> None:
    assert parts_to_drop([part(1, 0), part(2)], keep=1, is_alone=True) == []


def test_a_damaged_one_goes_when_a_newer_one_is_whole() -> None:
    assert parts_to_drop([part(1, 0, 1), part(2)], keep=1, is_alone=True) == []
    assert parts_to_drop([part(1, 0, 1), part(2), part(3, 0, 1)], keep=2, is_alone=True) == ids(2)


def test_only_what_memory_lacks_is_brought_newest_first() -> None:
    parts = [part(1, 0, 1), part(2, 0, 1), part(3, 0)]
    assert parts_to_bring(parts, newest_here=None, is_alone=True) == ids(2, 1)
    assert parts_to_bring(parts, newest_here=SnapshotId(1, 1), is_alone=True) == ids(2)
    assert parts_to_bring(parts, newest_here=SnapshotId(1, 2), is_alone=True) == []


def test_what_was_brought_is_held_until_something_newer_is_complete() -> None:
    held = ids(1, 2)
    assert held_to_let_go(held, newest=SnapshotId(1, 2), parent=None, slots=2) == []
    assert held_to_let_go(held, newest=SnapshotId(1, 2), parent=SnapshotId(1, 2), slots=3) == []
    assert held_to_let_go(held, newest=SnapshotId(2, 3), parent=SnapshotId(1, 2), slots=3) == held
    assert held_to_let_go([], newest=SnapshotId(2, 3), parent=None, slots=2) == []


def test_with_two_slots_only_what_the_job_goes_on_from_is_held() -> None:
    held = ids(1, 2)
    assert held_to_let_go(held, newest=SnapshotId(1, 2), parent=SnapshotId(1, 2), slots=2) == ids(1)
    assert held_to_let_go(held, newest=SnapshotId(1, 2), parent=SnapshotId(1, 1), slots=2) == ids(2)
    assert held_to_let_go(ids(2), newest=SnapshotId(1, 2), parent=SnapshotId(1, 2), slots=2) == []


HOLDERS = {SnapshotId(1, step): {0: {"a"}, 1: {"b"}} for step in (1, 2)}
ONE, TWO = ids(1, 2)


def test_all_disks_take_the_same_snapshot() -> None:
    news = {"a": FlushNews(wish=TWO), "b": FlushNews()}
    assert choose_for_disks(HOLDERS, [ONE, TWO], None, news, None) == (TWO, None)
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None) == (ONE, None)  # it is being written


def test_it_is_durable_when_it_is_on_the_disk_of_a_holder_of_each_rank() -> None:
    news = {"a": FlushNews(durable=ONE), "b": FlushNews()}
    assert choose_for_disks(HOLDERS, [ONE], ONE, news, None) == (ONE, None)
    news["b"] = FlushNews(durable=ONE)
    assert choose_for_disks(HOLDERS, [ONE], ONE, news, None) == (None, ONE)
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None) == (None, ONE)
    news["a"] = FlushNews(durable=ONE, wish=TWO)
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, ONE) == (TWO, ONE)


def test_disks_that_each_have_another_one_are_durable_with_none() -> None:
    news = {"a": FlushNews(durable=TWO), "b": FlushNews(durable=ONE)}
    assert choose_for_disks(HOLDERS, [ONE, TWO], None, news, None)[1] is None


def test_a_node_without_a_disk_holds_up_nobody_and_nothing_is_durable() -> None:
    news = {"a": FlushNews(durable=ONE, wish=TWO)}
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None) == (TWO, None)


def test_a_disk_that_is_stuck_is_overtaken_when_nobody_writes() -> None:
    news = {"a": FlushNews(durable=ONE), "b": FlushNews(stuck="full")}
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None)[0] is None
    news["a"] = FlushNews(durable=ONE, wish=TWO)
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None)[0] == TWO
    news["a"] = FlushNews(wish=TWO, is_busy=True)
    assert choose_for_disks(HOLDERS, [ONE, TWO], ONE, news, None)[0] == ONE


def test_what_was_on_all_disks_stays_known() -> None:
    assert choose_for_disks({}, [], None, {}, ONE) == (None, ONE)
