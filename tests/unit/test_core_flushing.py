"""What is flushed next, from literal situations."""

from __future__ import annotations

import pytest

from snapd.core.flushing import (
    FlushRules,
    FlushSituation,
    choose_flush,
    choose_for_world,
    counted_from_step,
)
from snapd.core.ids import SnapshotId
from snapd.core.reports import FlushNews

S = SnapshotId
BY_STEPS = FlushRules(every_steps=100)
BY_TIME = FlushRules(every_s=60.0)


@pytest.mark.parametrize(
    ("rules", "situation", "chosen", "reason"),
    [
        (BY_STEPS, FlushSituation(), None, "nothing is complete"),
        (BY_STEPS, FlushSituation(newest=S(1, 99)), None, "next at step 100"),
        (BY_STEPS, FlushSituation(newest=S(1, 100)), S(1, 100), "every 100 steps"),
        (BY_STEPS, FlushSituation(newest=S(1, 103)), S(1, 103), "every 100 steps"),  # 100 was overtaken
        (BY_STEPS, FlushSituation(newest=S(1, 199), durable=S(1, 103)), None, "next at step 200"),
        (BY_STEPS, FlushSituation(newest=S(1, 250), durable=S(1, 103)), S(1, 250), "every 100 steps"),
        (BY_TIME, FlushSituation(newest=S(1, 7), waited_s=59.0), None, "next in 1 s"),
        (BY_TIME, FlushSituation(newest=S(1, 7), waited_s=60.0), S(1, 7), "every 60 s"),
        (
            FlushRules(every_steps=10, every_s=60),
            FlushSituation(newest=S(1, 7), waited_s=58),
            None,
            "next at step 10 or in 2 s",
        ),
        (FlushRules(), FlushSituation(newest=S(1, 7)), None, "flushed on demand and before the end only"),
        (FlushRules(), FlushSituation(newest=S(1, 7), is_ending=True), S(1, 7), "this node goes away"),
        (FlushRules(), FlushSituation(newest=S(1, 7), wanted=S(1, 7)), S(1, 7), "asked for"),
        (FlushRules(), FlushSituation(newest=S(1, 9), wanted=S(1, 7)), S(1, 9), "asked for"),
        (
            FlushRules(),
            FlushSituation(newest=S(1, 6), wanted=S(1, 7)),
            None,
            "flushed on demand and before the end only",
        ),
        (  # what was asked for is durable; the newer one was not asked for
            FlushRules(),
            FlushSituation(newest=S(1, 9), wanted=S(1, 7), durable=S(1, 8)),
            None,
            "flushed on demand and before the end only",
        ),
        (
            BY_STEPS,
            FlushSituation(newest=S(1, 100), durable=S(1, 100)),
            None,
            "the newest complete snapshot is durable",
        ),
        (
            FlushRules(),
            FlushSituation(newest=S(1, 100), durable=S(1, 100), is_ending=True),
            None,
            "the newest complete snapshot is durable",
        ),
    ],
)
def test_the_choice(
    rules: FlushRules, situation: FlushSituation, chosen: SnapshotId | None, reason: str
) -> None:
    choice = choose_flush(rules, situation)
    assert (choice.snapshot, choice.reason, choice.pause) == (chosen, reason, "")


def test_what_is_under_way_is_finished_before_a_newer_one() -> None:
    choice = choose_flush(BY_STEPS, FlushSituation(newest=S(1, 300), current=S(1, 200), durable=S(1, 100)))
    assert (choice.snapshot, choice.reason) == (S(1, 200), "being flushed")


def test_a_newer_one_overtakes_one_that_is_stuck() -> None:
    stuck = FlushSituation(newest=S(1, 201), current=S(1, 200), stuck="the store is away")
    choice = choose_flush(BY_STEPS, stuck)
    assert choice.snapshot == S(1, 201)
    assert choice.reason == "1/200 is stuck (the store is away), and 1/201 is newer"
    same = FlushSituation(newest=S(1, 200), current=S(1, 200), stuck="the store is away")
    assert choose_flush(BY_STEPS, same).snapshot == S(1, 200)


def test_what_became_durable_is_not_under_way_any_more() -> None:
    done = FlushSituation(newest=S(1, 201), current=S(1, 200), durable=S(1, 200))
    assert choose_flush(BY_STEPS, done).snapshot is None


def test_nothing_is_flushed_before_the_tiers_generations_are_known() -> None:
    choice = choose_flush(BY_STEPS, FlushSituation(newest=S(1, 100), floor=None, is_ending=True))
    assert (choice.snapshot, choice.pause) == (None, "tier_floor")


def test_a_generation_that_the_tier_had_before_is_refused() -> None:
    choice = choose_flush(BY_STEPS, FlushSituation(newest=S(3, 100), floor=3, wanted=S(3, 100)))
    assert (choice.snapshot, choice.pause) == (None, "tier_generation")
    assert "generation 3" in choice.reason
    restored = FlushSituation(
        newest=S(3, 100), floor=3, generation=4, wanted=S(3, 100)
    )  # from the tier itself
    choice = choose_flush(BY_STEPS, restored)
    assert (choice.snapshot, choice.pause) == (None, "") and "generation 4" in choice.reason
    assert choose_flush(BY_STEPS, FlushSituation(newest=S(4, 100), floor=3)).snapshot == S(4, 100)


def test_time_says_when_to_look_again() -> None:
    choice = choose_flush(BY_TIME, FlushSituation(newest=S(1, 7), waited_s=45.0))
    assert choice.due_s == 15.0


@pytest.mark.parametrize(
    ("durable", "generation", "first_step", "counted_from"),
    [
        (None, 1, 1, 0),
        (None, 1, 57, 56),  # went on from memory at 56; the tier came later
        (S(1, 100), 1, 1, 100),
        (S(1, 100), 2, 101, 100),  # restored at 100
        (S(1, 103), 2, 51, 50),  # went back to 50: 100 comes again
        (S(1, 100), 2, 151, 100),  # 150 was never flushed: overdue since
    ],
)
def test_steps_are_counted_from(
    durable: SnapshotId | None, generation: int, first_step: int, counted_from: int
) -> None:
    assert counted_from_step(durable, generation, first_step) == counted_from


N = FlushNews
WHOLE = [S(1, 100), S(1, 150), S(1, 200)]


@pytest.mark.parametrize(
    ("whole", "current", "news", "named", "durable"),
    [
        ([], None, [N(wish=S(1, 1))], None, None),
        (WHOLE, None, [N(), N()], None, None),
        (
            WHOLE,
            None,
            [N(), N(wish=S(1, 150))],
            S(1, 200),
            None,
        ),  # the newest stands for the one that was wished
        (WHOLE, S(1, 100), [N(wish=S(1, 200)), N()], S(1, 100), None),  # what is under way is finished
        (WHOLE, S(1, 100), [N(stuck="away"), N()], S(1, 200), None),
        (WHOLE, S(1, 200), [N(stuck="away"), N()], S(1, 200), None),
        # who is done waits for who has more to write: that is not stuck
        (WHOLE, S(1, 100), [N(stuck="waits for the shards of ranks 1"), N(is_busy=True)], S(1, 100), None),
        (WHOLE, S(1, 100), [N(durable=S(1, 100)), N()], None, S(1, 100)),
        (
            WHOLE,
            S(1, 100),
            [N(durable=S(1, 100)), N(wish=S(1, 100))],
            None,
            S(1, 100),
        ),  # it has not heard yet
        (WHOLE, S(1, 100), [N(durable=S(1, 100)), N(wish=S(1, 200))], S(1, 200), S(1, 100)),
        (WHOLE, S(1, 50), [N(), N()], None, None),  # a node that held some of it is lost
        (WHOLE, None, [N(durable=S(1, 200), wish=S(1, 200))], None, S(1, 200)),
    ],
)
def test_the_snapshot_that_all_nodes_flush(
    whole: list[SnapshotId],
    current: SnapshotId | None,
    news: list[FlushNews],
    named: SnapshotId | None,
    durable: SnapshotId | None,
) -> None:
    assert choose_for_world(whole, current, news) == (named, durable)
