"""A node's part of a job's world, in virtual time: what it reports and when, and what it makes of orders."""

from __future__ import annotations

import asyncio

from snapd.core.interval import Interval
from snapd.core.recovery import HeldRows
from snapd.core.reports import Orders, Told
from snapd.runtime.world import AWAY_AFTER_S, GATHER_S, HEAR_EVERY_S, HOLD_S, RETRY_S
from tests.support.collector_reports import done, snap, table_of
from tests.support.virtual_time import pass_time
from tests.support.world_scene import FakeJob, Scene, scenario, still

# reporting


@scenario
async def test_news_go_to_the_collector_at_once(scene: Scene) -> None:
    await pass_time(0.5)
    scene.mine.capture(4)
    began_s = asyncio.get_running_loop().time()
    scene.world.changed()
    await pass_time(0.2)
    at_s, report = next((at_s, r) for at_s, r in scene.collecting.heard if r.held)
    assert at_s - began_s < GATHER_S + 2 * scene.collecting.delay_s
    assert [(held.id, held.rank, held.world_size) for held in report.held] == [(snap(4), 0, 2)]
    assert (report.node, report.instance, report.epoch, report.keep_complete) == ("a", 7, 3, 2)


@scenario
async def test_what_is_no_news_is_not_reported(scene: Scene) -> None:
    await pass_time(0.5)
    count = len(scene.collecting.heard)
    for step in range(20):
        scene.mine.sessions[0].step = 0 if step == 0 else step
        scene.world.changed()
        await pass_time(0.05)
    assert len(scene.collecting.heard) <= count + 2, (
        "that capturing has begun is news; the step alone is none"
    )


@scenario
async def test_new_orders_are_obeyed_at_once(scene: Scene) -> None:
    await pass_time(1)
    scene.collecting.order(complete=snap(2), target=snap(2), target_groups=(0,))
    await pass_time(2 * scene.collecting.delay_s)
    assert scene.world.complete == snap(2)
    assert scene.protection.aims[-1] == (snap(2), scene.table)
    assert scene.world.collector == "collector"


@scenario
async def test_a_quiet_node_polls_once_in_a_while(scene: Scene) -> None:
    await pass_time(10 * HOLD_S)
    assert 9 <= len(scene.collecting.heard) <= 12
    assert not scene.world.is_away


@scenario
async def test_orders_arrive_although_there_is_something_new_more_often_than_an_answer_takes(
    scene: Scene,
) -> None:
    scene.collecting.delay_s = 0.2
    await pass_time(2)
    scene.collecting.order(complete=snap(1))
    for step in range(100):
        scene.mine.capture(step)
        scene.world.changed()
        await pass_time(0.1)
        assert not scene.world.is_away
        if step * 0.1 > HEAR_EVERY_S + 1:
            assert scene.world.complete == snap(1)
    newest = max(len(report.held) for report in scene.reports())
    assert newest > 80, "and the collector hears the news"


@scenario
async def test_serials_grow(scene: Scene) -> None:
    for step in range(5):
        scene.mine.capture(step)
        scene.world.changed()
        await pass_time(0.3)
    serials = [report.serial for report in scene.reports()]
    assert serials == sorted(set(serials))


@scenario
async def test_rows_give_way_only_once_the_collector_has_heard_that_they_are_not_done(scene: Scene) -> None:
    scene.protection.parts = done(2)
    await pass_time(1)
    asking = asyncio.ensure_future(scene.world.may_replace(snap(2), 3))
    await pass_time(2)
    assert not asking.done(), "it is still reported as done"
    scene.protection.parts, scene.collecting.away = (), True
    await pass_time(2)
    assert not asking.done(), "nobody has heard that it is not"
    scene.collecting.away = False
    assert await asking
    assert scene.reports()[-1].done == ()


@scenario
async def test_rows_that_are_counted_on_stay(scene: Scene) -> None:
    scene.collecting.order(found=(snap(2), 3))
    assert not await scene.world.may_replace(snap(2), 3)
    assert await scene.world.may_replace(snap(2), 4)
    scene.collecting.order(found=None, protected=snap(2), protected_epoch=3)
    assert not await scene.world.may_replace(snap(2), 3)


@scenario
async def test_an_absent_collector_is_asked_again_and_said(scene: Scene) -> None:
    await pass_time(0.5)
    scene.collecting.away = True
    scene.mine.capture(1)
    scene.world.changed()
    await pass_time(AWAY_AFTER_S + 2)
    assert scene.world.is_away
    assert scene.world.trouble() == "the collector cannot be asked: no route"
    scene.collecting.away = False
    await pass_time(RETRY_S + 0.1)
    assert not scene.world.is_away
    assert scene.world.trouble() == ""
    assert scene.reports()[-1].held


@scenario
async def test_a_node_without_the_job_reports_that_it_holds_nothing(scene: Scene) -> None:
    scene.job = None
    scene.world.changed()
    await pass_time(1)
    report = scene.reports()[-1]
    assert (report.held, report.served, report.generation) == ((), (), 0)
    assert scene.world.inventory().held == ()


@still
def test_inventories_name_what_is_bad_and_leave_its_shards_out(scene: Scene) -> None:
    scene.mine.capture(1)
    scene.mine.capture(2)
    scene.mine.ledger.mark_unusable(snap(2), "digest")
    found = scene.world.inventory()
    assert [held.id for held in found.held] == [snap(1)]
    assert found.problems == ((snap(2), "digest"),)


# obeying


@still
def test_a_node_in_a_group_of_the_target_takes_part_though_it_has_no_rank(scene: Scene) -> None:
    scene.job = None
    scene.world.obey(Orders(number=1, complete=snap(1), target=snap(1), target_groups=(1,)))
    assert (scene.made, scene.job) == (0, None), "another group's"
    scene.world.obey(Orders(number=2, complete=snap(1), target=snap(1), target_groups=(0, 1)))
    assert scene.made == 1
    assert scene.protection.aims == [(snap(1), scene.table)]


@still
def test_a_target_of_other_groups_is_not_ours(scene: Scene) -> None:
    scene.world.obey(Orders(number=1, target=snap(1), target_groups=(1,)))
    assert scene.protection.aims == [(None, scene.table)]


@still
def test_another_table_is_obeyed_anew(scene: Scene) -> None:
    scene.world.obey(Orders(number=1, target=snap(1), target_groups=(0,)))
    scene.table = table_of(["b", "a"], epoch=2)
    scene.world.table_changed()
    assert [table for _, table in scene.protection.aims][-1] == scene.table
    scene.table = None
    scene.world.table_changed()
    assert scene.protection.aims[-1] == (None, None)


@still
def test_what_others_have_proved_bad_is_condemned_here(scene: Scene) -> None:
    scene.mine.capture(1)
    scene.world.obey(Orders(number=1, problems=((snap(1), "rank 5 chunk 2: digest"),)))
    assert scene.mine.ledger.snapshots[snap(1)].problem == "rank 5 chunk 2: digest"
    assert scene.mine.index.problems == {snap(1): "rank 5 chunk 2: digest"}


@still
def test_the_interval_is_taken_once(scene: Scene) -> None:
    wider = Interval(1, 2, 32)
    for number in (1, 2):
        scene.world.obey(Orders(number=number, interval=wider))
    assert scene.mine.intervals == [wider]


@still
def test_a_collector_that_begins_here_is_told_of_a_widened_interval_and_of_its_generation(
    scene: Scene,
) -> None:
    assert scene.world.widened == (0, Interval()), "as configured: nothing to tell"
    wider = Interval(3, 2, 32)
    scene.mine.coordination.taken = wider
    assert scene.world.widened == (1, wider), "from the pages, after a restart"
    scene.world.obey(Orders(number=1, generation=2, interval=Interval(3, 4, 64)))
    assert scene.world.widened == (2, Interval(3, 4, 64))
    scene.world.obey(Orders(number=2, generation=3, interval=Interval(3)))
    assert scene.world.widened == (0, Interval())


@still
def test_parity_of_what_was_promised_is_kept_whatever_a_new_collector_knows(scene: Scene) -> None:
    scene.world.obey(Orders(number=9, complete=snap(5), protected=snap(4), protected_epoch=2))
    scene.world.obey(Orders(number=1, complete=snap(2)))
    keep, protected, _ = scene.protection.forgotten[-1]
    assert snap(4) in keep
    assert protected is None
    assert scene.mine.index.known == Told(snap(5), snap(4), 2)


@still
def test_what_was_promised_outlives_the_daemon(scene: Scene) -> None:
    scene.mine.index.known = Told(snap(5), snap(4), 2)
    for step in (4, 5):
        scene.mine.capture(step)
    scene.world.obey(Orders(number=1, drop=((snap(4), "x"), (snap(5), "y"))))
    assert scene.world.doomed(scene.mine) == []  # type: ignore[arg-type]


# what may go


@still
def test_only_what_the_collector_names_goes_and_nothing_that_is_held(scene: Scene) -> None:
    for step in (1, 2, 3):
        scene.mine.capture(step)
    scene.mine.ledger.hold(snap(2))
    scene.world.obey(
        Orders(number=1, complete=snap(3), drop=((snap(1), "x"), (snap(2), "y"), (snap(9), "z")))
    )
    assert scene.world.doomed(scene.mine) == [(snap(1), "x")]  # type: ignore[arg-type]


@scenario
async def test_while_the_collector_is_away_what_stays_follows_from_the_steps_alone(scene: Scene) -> None:
    scene.collecting.order(complete=snap(3), protected=snap(3))
    await pass_time(0.5)
    scene.collecting.away = True
    scene.world.changed()
    scene.mine.capture(3)
    other = FakeJob()
    other.capture(3)
    for step in (4, 5, 6, 7, 8):
        scene.mine.capture(step)
        if step != 6:
            other.capture(step)
    assert scene.world.doomed(scene.mine) == [], "not yet"  # type: ignore[arg-type]
    await pass_time(AWAY_AFTER_S + 6)
    left = set(scene.mine.ledger.snapshots) - {s for s, _ in scene.world.doomed(scene.mine)}  # type: ignore[arg-type]
    assert left == {snap(3), snap(8)}, "what was promised, and the step with most factors of two"
    theirs = set(other.ledger.snapshots) - {s for s, _ in scene.world.doomed(other)}  # type: ignore[arg-type]
    assert theirs == left, "a node that missed one keeps the same"


@scenario
async def test_what_has_parity_here_is_not_dropped_while_the_collector_is_away(scene: Scene) -> None:
    code = table_of(["a", "b"]).groups[0].code
    assert code is not None
    scene.protection.rows = (HeldRows(snap(5), 0, 1, ("a", "b"), code, frozenset(), frozenset()),)
    for step in (4, 5, 8):
        scene.mine.capture(step)
    scene.collecting.away = True
    scene.world.changed()
    await pass_time(AWAY_AFTER_S + 6)
    assert [s for s, _ in scene.world.doomed(scene.mine)] == [snap(4)]  # type: ignore[arg-type]


@still
def test_removed_generations_go_whatever_is_promised(scene: Scene) -> None:
    scene.mine.capture(1)
    scene.world.obey(Orders(number=1, complete=snap(1), protected=snap(1)))
    scene.world.forget_through(1)
    assert scene.world.doomed(scene.mine) == [(snap(1), "the job was removed")]  # type: ignore[arg-type]
    assert (scene.world.complete, scene.world.protected) == (None, None)
    scene.world.obey(Orders(number=2, complete=snap(1), protected=snap(1)))
    assert scene.world.complete is None, "a collector that has not heard of it yet"


def test_done_parts_are_reported() -> None:
    @scenario
    async def run(scene: Scene) -> None:
        await pass_time(0.5)
        scene.protection.parts, scene.protection.text = done(1), "waiting for b"
        scene.world.changed()
        await pass_time(0.2)
        assert (scene.reports()[-1].done, scene.reports()[-1].trouble) == (done(1), "waiting for b")
        assert scene.world.protection_reason().endswith("waiting for b")

    run()
