"""What a node makes of orders: which snapshots and which parity it drops, and whether its rows are counted on."""

from __future__ import annotations

import itertools

import pytest

from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.ledger import Ledger
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.obeying import counts_on, parity_to_drop, snapshots_to_drop
from snapd.core.presence import presence
from snapd.core.protection import RowMap
from snapd.core.reports import NodeReport, Orders, Told
from tests.support.collector_reports import Reporting, held, snap


def ledger_of(*steps: int) -> Ledger:
    ledger = Ledger()
    for step in steps:
        chunk = Chunk(10, bytes(16), Place(0, 0), None)
        record = ShardRecord("job", snap(step), 0, 2, 4096, 1, 10, 0, (chunk,), None, 0.0, bytes(16))
        ledger.add(record, session_id=1, sequence=step, is_verified=True)
    return ledger


def steps_to_drop(
    ledger: Ledger,
    orders: Orders,
    told: Told,
    *,
    is_away: bool = False,
    room: int = 2,
    coded: tuple[int, ...] = (),
) -> list[int]:
    doomed = snapshots_to_drop(
        ledger, orders, told, is_away=is_away, room=room, coded=lambda: [snap(step) for step in coded]
    )
    return [snapshot.step for snapshot, _ in doomed]


def test_what_the_collector_names_goes_but_for_what_was_promised_or_is_held() -> None:
    ledger = ledger_of(1, 2, 3, 4)
    ledger.hold(snap(2))
    orders = Orders(drop=tuple((snap(step), "x") for step in (1, 2, 3, 4, 9)))
    assert steps_to_drop(ledger, orders, Told(snap(4), snap(3), 1)) == [1]
    assert steps_to_drop(ledger, orders, Told()) == [1, 3, 4]
    assert steps_to_drop(ledger, orders, Told(), is_away=True, room=1) == [1, 3, 4], "who is away obeys too"


def test_who_hears_from_nobody_drops_own_captures_beyond_its_room_and_nothing_that_may_be_protected() -> None:
    ledger, orders = ledger_of(1, 2, 3, 4, 5), Orders(target=snap(3))
    assert steps_to_drop(ledger, orders, Told()) == []
    assert steps_to_drop(ledger, orders, Told(), is_away=True, room=9) == []
    assert steps_to_drop(ledger, orders, Told(snap(1)), is_away=True, coded=(5,)) == [2, 4]
    assert steps_to_drop(ledger, orders, Told(snap(1), snap(2)), is_away=True, room=4) == [5]


def row_map(step: int, epoch: int) -> RowMap:
    return RowMap(snap(step), epoch, 0, ("a", "b", "c"), Code(2, 1))


def test_parity_of_older_snapshots_goes_and_that_of_older_epochs_once_the_newer_one_is_everywhere() -> None:
    maps = [row_map(step, epoch) for step, epoch in itertools.product((1, 2, 3), (1, 2))]
    assert parity_to_drop(maps, set(), protected=None, protected_epoch=0) == []
    assert parity_to_drop(maps, set(), protected=snap(2), protected_epoch=1) == [(snap(1), None)]
    assert parity_to_drop(maps, {snap(1)}, protected=snap(2), protected_epoch=2) == [(snap(2), 2)]
    assert parity_to_drop(maps, set(), protected=snap(3), protected_epoch=2) == [
        (snap(1), None), (snap(2), None), (snap(3), 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("orders", "is_counted"),
    [
        (Orders(), False),
        (Orders(target=snap(1)), False),
        (Orders(protected=snap(1), protected_epoch=2), True),
        (Orders(protected=snap(1), protected_epoch=3), False),
        (Orders(found=(snap(1), 2)), True),
        (Orders(found=(snap(1), 1)), False),
        (Orders(protected=snap(2), protected_epoch=2), False),
    ],
)
def test_rows_are_counted_on_under_the_epoch_that_made_them(orders: Orders, is_counted: bool) -> None:
    assert counts_on(orders, snap(1), 2) == is_counted


# who is there


def reports(**facts: object) -> list[NodeReport]:
    nodes = [Reporting(name, [rank], world_size=3, generation=2) for rank, name in enumerate("abc")]
    return [node(**facts) for node in nodes]


def test_a_restore_may_be_decided_when_all_ranks_are_there_and_nothing_older_is_taken_up() -> None:
    now = presence(reports(), 2)
    assert now.is_settled(3) and not now.is_overtaken and now.lost(3) == set()
    assert not now.is_settled(4) and now.missing(4) == [3] and now.lost(4) == {3}
    busy = presence([*reports()[:2], reports(closed_below=1)[2]], 2)
    assert not busy.is_settled(3)
    empty = Reporting("d", [], world_size=0)(closed_below=0)
    assert presence([*reports(), empty], 2).is_settled(3), "nothing of the job is there"
    left = Reporting("d", [], world_size=3)(held=held(1, 2, world_size=3), closed_below=1)
    assert not presence([*reports(), left], 2).is_settled(3)


def test_ranks_are_lost_once_some_are_there_or_a_newer_generation_is() -> None:
    assert presence([], 2).lost(3) == set(), "nobody has reported yet"
    assert presence(reports(served=()), 2).lost(3) == set()
    assert presence(reports()[1:], 2).lost(3) == {0}
    newer = presence(reports(generation=3), 2)
    assert newer.is_overtaken and newer.lost(3) == {0, 1, 2}
    assert presence(reports(), SnapshotId(3, 0).generation).missing(3) == [0, 1, 2]
