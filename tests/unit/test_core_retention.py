"""Which snapshots of a tier stay, and why."""

from __future__ import annotations

import itertools

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.retention import DAY_S, HOUR_S, KeepRules, TierSnapshot, judge_retention


def snapshots(*steps: int, every_s: float = 60.0, damaged: tuple[int, ...] = ()) -> list[TierSnapshot]:
    """One for each step, committed one after the other."""
    return [
        TierSnapshot(SnapshotId(1, step), index * every_s, "a pack is missing" if step in damaged else "")
        for index, step in enumerate(steps)
    ]


def kept(found: list[TierSnapshot], pins: dict[str, SnapshotId] | None = None, **rules: int) -> list[int]:
    verdicts = judge_retention(found, KeepRules(**rules), pins or {})
    return sorted(verdict.id.step for verdict in verdicts if verdict.is_kept)


def test_no_rule_keeps_all() -> None:
    assert kept(snapshots(1, 2, 3)) == [1, 2, 3]


def test_the_last_by_generation_and_step_whatever_the_clock_says() -> None:
    found = [
        TierSnapshot(SnapshotId(2, 5), 10.0),
        TierSnapshot(SnapshotId(1, 90), 30.0),
        TierSnapshot(SnapshotId(1, 80), 20.0),
    ]
    assert kept(found, last=1) == [5]
    assert kept(found, last=2) == [5, 90]


def test_every_nth_step_and_the_newest() -> None:
    assert kept(snapshots(100, 150, 200, 250, 301), every_steps=100) == [100, 200, 301]


def test_hourly_keeps_the_newest_of_each_of_the_newest_hours_that_have_one() -> None:
    found = snapshots(*range(12), every_s=HOUR_S / 2)  # two for each of six hours
    assert kept(found, hourly=3) == [7, 9, 11]
    sparse = [
        TierSnapshot(SnapshotId(1, index), hour * HOUR_S) for index, hour in enumerate((0.1, 0.9, 50.2, 99.5))
    ]
    assert kept(sparse, hourly=3) == [1, 2, 3]


def test_daily() -> None:
    found = snapshots(*range(8), every_s=DAY_S / 2)
    assert kept(found, daily=2) == [5, 7]
    assert kept(found, daily=2, hourly=1, last=3) == [5, 6, 7]


def test_a_pin_keeps_and_a_pin_of_something_else_does_not_matter() -> None:
    found = snapshots(1, 2, 3)
    assert kept(found, {"best": SnapshotId(1, 1), "gone": SnapshotId(1, 77)}, last=1) == [1, 3]


def test_the_newest_complete_one_stays_whatever_the_rules_say() -> None:
    for last, every, hourly, daily in itertools.product((0, 1), (0, 1000), (0, 1), (0, 1)):
        rules = KeepRules(last=last, every_steps=every, hourly=hourly, daily=daily)
        verdicts = judge_retention(snapshots(3, 7, 9, damaged=(9,)), rules, {})
        by_step = {verdict.id.step: verdict for verdict in verdicts}
        assert by_step[7].is_kept and "the newest complete" in by_step[7].reason
        assert by_step[9].is_kept and "a pack is missing" in by_step[9].reason  # may yet be mended


def test_a_damaged_one_takes_no_complete_ones_place_and_goes_when_it_would() -> None:
    found = snapshots(1, 2, 3, 4, damaged=(3,))
    assert kept(found, last=2) == [2, 3, 4]
    assert kept(snapshots(1, 2, 3, 4, damaged=(1,)), last=2) == [3, 4]
    assert kept(snapshots(1, 2, damaged=(1, 2)), last=1) == [1, 2]  # nothing complete: nothing goes


def test_a_parent_may_go_before_its_children() -> None:
    assert kept(snapshots(1, 2, 3), every_steps=3) == [3]


def test_each_verdict_has_its_reasons() -> None:
    verdicts = judge_retention(
        snapshots(10, 15, 20), KeepRules(last=1, every_steps=10), {"x": SnapshotId(1, 10)}
    )
    assert [(v.id.step, v.is_kept, v.reason) for v in verdicts] == [
        (20, True, "the newest complete, one of the last 1, every 10 steps"),
        (15, False, "not kept by the last 1, every 10 steps"),
        (10, True, "every 10 steps, pinned as x"),
    ]


@pytest.mark.parametrize("damaged", list(itertools.product((False, True), repeat=4)))
def test_over_all_small_cases_something_complete_always_stays(damaged: tuple[bool, ...]) -> None:
    broken = tuple(step for step, is_damaged in enumerate(damaged) if is_damaged)
    found = snapshots(*range(4), every_s=HOUR_S / 2, damaged=broken)
    complete = set(range(4)) - set(broken)
    for last, every, hourly, daily in itertools.product(range(4), range(3), range(3), range(2)):
        rules = {"last": last, "every_steps": every, "hourly": hourly, "daily": daily}
        stays = set(kept(found, **rules))
        assert not complete or max(complete) in stays
        more = set(kept(found, **{**rules, "last": last + 1})) if any(rules.values()) else stays
        assert stays <= more  # a wider rule never keeps less
