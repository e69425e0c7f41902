"""A job's collector among its nodes, in virtual time: reports in, orders out, rounds of restores."""

from __future__ import annotations

import asyncio

import pytest

from snapd.core.cluster import Code
from snapd.core.ids import Place
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.recovery import HeldRows, Inventory
from snapd.core.reports import Record, Told
from snapd.core.restore import Outcome, RankReport
from snapd.core.rows import chunks_of, plan_rows
from snapd.errors import ConflictError, NotFoundError, UnavailableError
from snapd.runtime.collecting import GRACE_S
from snapd.runtime.peers import Records, WorldPlan
from tests.support.collecting_scene import DONE, HOLD_S, SETTINGS, Scene, ask, now_s, scenario
from tests.support.collector_reports import done, held, snap, table_of
from tests.support.virtual_time import pass_time, run_virtually

# the long poll


@scenario
async def test_a_node_that_knows_older_orders_is_answered_at_once(scene: Scene) -> None:
    orders = await scene.tell(1)
    began_s = now_s()
    answer = await scene.host.report(scene.nodes[0](), known_orders=orders.number - 1, hold_s=HOLD_S)
    assert (answer, now_s()) == (orders, began_s)


@scenario
async def test_a_node_that_knows_them_waits_for_news_and_not_longer_than_it_said(scene: Scene) -> None:
    orders = await scene.tell(1)
    began_s = now_s()
    answer = await scene.host.report(scene.nodes[0](), known_orders=orders.number, hold_s=HOLD_S)
    assert (answer, now_s()) == (orders, began_s + HOLD_S)


@scenario
async def test_one_nodes_news_answer_all_who_wait(scene: Scene) -> None:
    number = (await scene.tell(1)).number
    waiting = [
        asyncio.ensure_future(scene.host.report(node(), known_orders=number, hold_s=HOLD_S))
        for node in scene.nodes[:2]
    ]
    await pass_time(1)
    assert not any(task.done() for task in waiting)
    for node in scene.nodes:
        await scene.host.report(node(done=done(1)), known_orders=-1, hold_s=0)
    began_s = now_s()
    answers = await asyncio.gather(*waiting)
    assert now_s() - began_s < 0.1
    assert {answer.protected for answer in answers} == {snap(1)}


@scenario
async def test_reports_that_come_together_are_settled_together(scene: Scene) -> None:
    for rank, node in enumerate(scene.nodes):
        await scene.host.report(node.has(held(1, rank, world_size=3)), known_orders=-1, hold_s=0)
    assert scene.host.orders.number == 0
    await pass_time(0.1)
    assert (scene.host.orders.number, scene.host.orders.complete) == (1, snap(1))


@scenario
async def test_what_is_newest_is_recorded_once_for_each_change(scene: Scene) -> None:
    await scene.tell(1)
    await scene.tell(1, newest_step_seen=9)
    await scene.tell(1, done=done(1))
    await scene.tell(1, done=done(1), trouble="x")
    told = [record.told for record in scene.recorded]
    assert told == [Told(snap(1)), Told(snap(1), snap(1), 1)]


@scenario
async def test_what_is_protected_is_told_once_it_is_recorded(scene: Scene) -> None:
    await scene.tell(1)
    scene.is_store_away = True
    orders = await scene.tell(1, 2, done=done(1, 2))
    assert (orders.complete, orders.protected, orders.drop) == (snap(2), None, ())
    assert scene.host.missing_parts(snap(2)) == "waiting for the coordinator to record it"
    scene.is_store_away = False
    orders = await scene.tell(1, 2)
    assert (orders.protected, orders.target) == (snap(2), None)
    assert scene.host.missing_parts(snap(2)) == ""


@scenario
async def test_a_widened_interval_is_recorded_for_the_next_collector(scene: Scene) -> None:
    await scene.tell(1, newest_step_seen=40)
    await scene.tell(1, newest_step_seen=40, aborts=1)
    widened = scene.host.orders.interval
    assert widened.factor == 2 and (scene.recorded[-1].generation, scene.recorded[-1].interval) == (
        1,
        widened,
    )
    scene.host.close()
    scene.begin(before=scene.recorded[-1])
    assert (await scene.tell(1, newest_step_seen=41, aborts=1)).interval == widened


@scenario
async def test_a_new_collector_has_nothing_dropped_before_all_who_live_have_reported(scene: Scene) -> None:
    for rank, node in enumerate(scene.nodes[:2]):
        shards = [held(step, rank, world_size=3) for step in (1, 2, 3)]
        shards += [held(step, 2, world_size=3) for step in (1, 2, 3)]
        await scene.host.report(node.has(*shards, keep_complete=1), known_orders=-1, hold_s=0)
    await pass_time(GRACE_S / 2)
    assert scene.host.orders.complete == snap(3)
    assert scene.host.orders.drop == ()
    await pass_time(GRACE_S)  # it is not waited for without end
    assert [s.step for s, _ in scene.host.orders.drop] == [1, 2]


@scenario
async def test_a_lost_nodes_shards_are_no_more(scene: Scene) -> None:
    await scene.tell(1)
    scene.host.membership_changed(["b"])
    await pass_time(0.1)
    assert "b" not in scene.host.reports
    assert scene.host.orders.complete == snap(1)
    assert scene.host.orders.target is None
    assert scene.host.missing_parts(snap(9)) == "no node holds it"


@scenario
async def test_without_a_trusted_store_nothing_new_is_protected(scene: Scene) -> None:
    scene.around.table = None
    orders = await scene.tell(1)
    assert (orders.target, orders.reason) == (None, "no group table")
    assert scene.host.missing_parts(snap(1)) == "no group table"
    scene.around.table = table_of(["a", "b", "c"])
    scene.host.membership_changed([])
    await pass_time(0.1)
    assert scene.host.orders.target == snap(1)


# a restore's round


@scenario
async def test_all_ranks_get_the_decision_that_the_first_one_caused(scene: Scene) -> None:
    await scene.tell()
    scene.holds(1, 2)
    plans = await asyncio.gather(*(scene.host.plan(ask()) for _ in range(3)))
    assert plans[0] is not None
    assert {plan.decision.chosen for plan in plans} == {snap(2)}
    assert [source.nodes for source in plans[0].sources] == [("a",), ("b",), ("c",)]
    assert sorted(scene.around.asked) == [("inventory", n) for n in "abc"]
    scene.holds(1, 2, 3)  # what comes later changes nothing of a round
    assert (await scene.host.plan(ask())).decision.chosen == snap(2)
    assert (await scene.host.plan(ask(number=1))).decision.chosen == snap(3)


@scenario
async def test_ranks_that_ask_for_different_steps_are_told(scene: Scene) -> None:
    await scene.tell()
    scene.holds(1, 2)
    assert (await scene.host.plan(ask(step=1))).decision.chosen == snap(1)
    with pytest.raises(ConflictError) as caught:
        await scene.host.plan(ask(step=2))
    assert caught.value.kind == "restore_step"


@scenario
async def test_a_round_waits_for_all_ranks_and_says_whom_it_lacks(scene: Scene) -> None:
    await scene.tell(served=())
    began_s = now_s()
    with pytest.raises(UnavailableError) as caught:
        await scene.host.plan(ask())
    assert (caught.value.kind, caught.value.context["missing"]) == ("settling", "0, 1, 2")
    assert now_s() == began_s + SETTINGS.restore_settle_s


@scenario
async def test_a_round_waits_until_older_captures_are_taken_up(scene: Scene) -> None:
    scene.holds(1)
    for rank, node in enumerate(scene.nodes):
        closed = 1 if rank == 1 else 2
        await scene.host.report(node(generation=2, closed_below=closed), known_orders=-1, hold_s=0)
    planning = asyncio.ensure_future(scene.host.plan(ask(generation=2)))
    await pass_time(3)
    assert not planning.done()
    await scene.host.report(scene.nodes[1](closed_below=2), known_orders=-1, hold_s=0)
    assert (await planning).decision.chosen == snap(1)


@scenario
async def test_too_many_rounds_end(scene: Scene) -> None:
    with pytest.raises(ConflictError) as caught:
        await scene.host.plan(ask(number=64))
    assert caught.value.kind == "restore_round"


@scenario
async def test_a_silent_node_is_waited_for_and_named(scene: Scene) -> None:
    await scene.tell(1)
    scene.holds(1, nodes="ab")
    began_s = now_s()
    plan = await scene.host.plan(ask())
    assert plan.decision.outcome is Outcome.UNREACHABLE
    assert "c did not answer" in plan.decision.reason
    assert SETTINGS.restore_wait_s <= now_s() - began_s < SETTINGS.restore_wait_s + 2


@scenario
async def test_a_silent_node_that_answers_meanwhile_is_used(scene: Scene) -> None:
    await scene.tell(1)
    scene.holds(1, nodes="ab")
    planning = asyncio.ensure_future(scene.host.plan(ask()))
    await pass_time(5)
    scene.holds(1)
    began_s = now_s()
    plan = await planning
    assert (plan.decision.outcome, plan.decision.chosen) == (Outcome.FOUND, snap(1))
    assert now_s() - began_s < 1


@scenario
async def test_a_member_in_doubt_counts_as_one_that_may_come_back(scene: Scene) -> None:
    await scene.tell(2)
    scene.around.living, scene.around.doubtful = {"a", "b"}, {"c"}
    scene.holds(2, nodes="ab")
    assert (await scene.host.plan(ask())).decision.outcome is Outcome.UNREACHABLE
    scene.around.doubtful = set()  # given up
    plan = await scene.host.plan(ask(number=1))
    assert plan.decision.outcome is Outcome.UNUSABLE
    assert "rank 2: no node has its shard any more" in plan.decision.reason


@scenario
async def test_an_older_one_is_taken_when_that_was_asked_for(scene: Scene) -> None:
    await scene.tell(2)
    both = tuple(one for step in (1, 2) for rank in (0, 1, 2) for one in held(step, rank, world_size=3))
    scene.around.inventories = {"a": Inventory(node="a", held=both[:5])}
    plan = await scene.host.plan(ask(accept_older=True))
    assert (plan.decision.outcome, plan.decision.chosen) == (Outcome.FOUND, snap(1))


# rows


def coded(scene: Scene, *, epochs: dict[int, bool]) -> None:
    """Step 1 was protected by a, b, c under each epoch, whole or with no parity yet; c is lost."""
    nodes, code = ("a", "b", "c"), Code(2, 1)
    scene.around.living = {"a", "b"}
    records = [
        (node, ShardRecord(
            "job", snap(1), rank, 4096, 4096, 1, 100, 0,
            tuple(Chunk(4096, bytes([rank, i]) * 8, Place(0, 0), None) for i in range(3)), None, 0.0, bytes(16),
        ))
        for rank, node in enumerate(nodes)
    ]  # fmt: skip
    for name in "ab":
        rows = []
        for epoch, is_whole in epochs.items():
            order = nodes if epoch == 1 else ("b", "c", "a")
            chunks = {n: chunks_of(n, [r for owner, r in records if owner == n]) for n in order}
            ids = {(row.id, 0) for row in plan_rows(code, order, chunks) if name in row.parity_nodes}
            rows.append(
                HeldRows(
                    snap(1), 0, epoch, order, code, frozenset(ids if is_whole else ()), frozenset({0, 1, 2})
                )
            )
            scene.around.records[name, epoch] = Records(tuple(records), epoch, order, code, 0)
        rank = nodes.index(name)
        scene.around.inventories[name] = Inventory(
            node=name, held=held(1, rank, world_size=3), rows=tuple(rows)
        )


@scenario
async def test_a_lost_nodes_shard_comes_from_rows(scene: Scene) -> None:
    await scene.tell(1)
    coded(scene, epochs={1: True})
    plan = await scene.host.plan(ask())
    assert (plan.decision.outcome, plan.decision.chosen) == (Outcome.FOUND, snap(1))
    assert [source.is_coded for source in plan.sources] == [False, False, True]
    assert (plan.sources[2].epoch, plan.sources[2].record_nodes) == (1, ("a", "b"))
    assert "ranks 2 from parity" in plan.decision.verdicts[0].reason


@scenario
async def test_rows_of_an_older_epoch_are_used_while_those_of_the_newer_one_are_being_made(
    scene: Scene,
) -> None:
    await scene.tell(1)
    coded(scene, epochs={1: True, 2: False})
    plan = await scene.host.plan(ask())
    assert plan.decision.outcome is Outcome.FOUND
    assert plan.sources[2].epoch == 1
    assert {what for what, _ in scene.around.asked} == {"inventory", "records 1", "records 2"}


@scenario
async def test_records_that_one_node_cannot_give_are_asked_of_the_next(scene: Scene) -> None:
    await scene.tell(1)
    coded(scene, epochs={1: True})
    del scene.around.records["a", 1]
    assert (await scene.host.plan(ask())).decision.outcome is Outcome.FOUND
    del scene.around.records["b", 1]
    plan = await scene.host.plan(ask(number=1))
    assert plan.decision.outcome is Outcome.UNUSABLE


@scenario
async def test_records_that_exist_and_cannot_be_had_are_waited_for(scene: Scene) -> None:
    """Found by the simulation (seed 744): a lost message made a shard lost that was not."""
    await scene.tell(1)
    coded(scene, epochs={1: True})
    scene.around.silent_records = {"a", "b"}
    planning = asyncio.ensure_future(scene.host.plan(ask()))
    await pass_time(3)
    assert not planning.done()
    scene.around.silent_records = {"a"}
    assert (await planning).decision.outcome is Outcome.FOUND
    scene.around.silent_records = {"a", "b"}
    plan = await scene.host.plan(ask(number=1))
    assert plan.decision.outcome is Outcome.UNREACHABLE
    assert "a, b did not answer" in plan.decision.reason


@scenario
async def test_records_of_another_epoch_than_asked_for_are_not_taken(scene: Scene) -> None:
    await scene.tell(1)
    coded(scene, epochs={1: True, 2: True})
    scene.around.records = {(n, 1): scene.around.records[n, 2] for n in "ab"}
    assert (await scene.host.plan(ask())).decision.outcome is Outcome.UNUSABLE


# the barrier


async def planned(scene: Scene) -> WorldPlan:
    await scene.tell()
    scene.holds(1)
    return await scene.host.plan(ask())


@scenario
async def test_the_barrier_answers_when_all_ranks_have_reported(scene: Scene) -> None:
    await planned(scene)
    waiting = [asyncio.ensure_future(scene.host.finish(1, 0, rank, DONE)) for rank in (0, 1)]
    await pass_time(5)
    assert not any(task.done() for task in waiting)
    last = await scene.host.finish(1, 0, 2, DONE)
    assert last.is_committed
    assert await asyncio.gather(*waiting) == [last, last]
    assert await scene.host.finish(1, 0, 1, DONE) == last, "asked again, after an answer that was lost"


@scenario
async def test_a_rank_that_is_gone_ends_the_round_for_the_others(scene: Scene) -> None:
    await planned(scene)
    waiting = asyncio.ensure_future(scene.host.finish(1, 0, 0, DONE))
    await scene.host.report(scene.nodes[1](served=()), known_orders=-1, hold_s=0)
    began_s = now_s()
    answer = await waiting
    assert (answer.is_committed, answer.is_try_again) == (False, False)
    assert answer.reason == "not restored: the trainer of rank 1 is gone"
    assert now_s() - began_s < 0.1


@scenario
async def test_a_rank_that_says_nothing_ends_it_after_a_while(scene: Scene) -> None:
    await planned(scene)
    began_s = now_s()
    answers = await asyncio.gather(*(scene.host.finish(1, 0, rank, DONE) for rank in (0, 2)))
    assert {answer.reason for answer in answers} == {"not restored in time: rank 1 has not reported"}
    assert now_s() == began_s + SETTINGS.restore_finish_s


@scenario
async def test_a_bad_chunk_leads_to_the_next_round_and_another_snapshot(scene: Scene) -> None:
    await scene.tell()
    scene.holds(1, 2)
    assert (await scene.host.plan(ask())).decision.chosen == snap(2)
    bad = RankReport(False, ((1, 7, "digest"),))
    answers = await asyncio.gather(*(scene.host.finish(1, 0, r, bad if r == 1 else DONE) for r in range(3)))
    assert {(a.is_committed, a.is_try_again) for a in answers} == {(False, True)}
    assert "rank 1 chunk 7: digest" in answers[0].problem
    node = scene.around.inventories["b"]
    scene.around.inventories["b"] = Inventory(node="b", held=node.held, problems=((snap(2), "digest"),))
    again = await scene.host.plan(ask(number=1))
    assert again.decision.chosen == snap(1)
    assert f"not {snap(2)}: digest" in again.decision.reason


@scenario
async def test_a_round_that_was_planned_elsewhere_has_to_be_planned_again(scene: Scene) -> None:
    with pytest.raises(NotFoundError) as caught:
        await scene.host.finish(1, 0, 0, DONE)
    assert (caught.value.kind, caught.value.hint) == ("restore_round", "call PlanRestore again")


@scenario
async def test_what_was_restored_stays(scene: Scene) -> None:
    await scene.tell(1, 2, 3, keep_complete=1, is_capturing=False, generation=2, closed_below=2)
    scene.holds(1, 2, 3)
    await scene.host.plan(ask(step=1, generation=2))
    await asyncio.gather(*(scene.host.finish(2, 0, rank, DONE) for rank in range(3)))
    orders = await scene.tell(1, 2, 3, is_capturing=True)
    assert [s.step for s, _ in orders.drop] == [2]


def test_a_successor_keeps_what_was_restored_and_what_was_recorded() -> None:
    async def run() -> None:
        scene = Scene()
        scene.begin(2, before=Record(Told(snap(3), snap(2))), parent=(2, snap(1)))
        orders = await scene.tell(1, 2, 3, keep_complete=1, closed_below=2)
        assert (orders.complete, orders.protected, orders.drop) == (snap(3), snap(2), ())
        scene.host.close()

    run_virtually(run())


@scenario
async def test_a_job_that_all_ranks_have_closed_for_good_has_ended(scene: Scene) -> None:
    await scene.tell(1)
    for rank, node in enumerate(scene.nodes):
        await scene.host.report(node(served=(), final=(rank,)), known_orders=-1, hold_s=0)
        assert scene.ended == []
    await pass_time(0.1)
    assert scene.ended == [1]
    await scene.tell(1, served=())
    assert scene.ended == [1]
    assert all(report.held == () for report in scene.host.reports.values())
