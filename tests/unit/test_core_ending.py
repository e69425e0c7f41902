"""A job's end, a node's end, and a restore's round after a repair, as pure decisions."""

from __future__ import annotations

from dataclasses import replace

from snapd.core.draining import lacks_protection, lone_shards, that_matter
from snapd.core.ending import Ending, inventory_without, orders_without, report_without
from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import Held, NodeReport, Orders, PartDone, Told
from snapd.core.restore import Decision, Outcome, RankReport, RestoreRound

OLD, NEW = SnapshotId(3, 10), SnapshotId(4, 2)


def report(node: str, **more: object) -> NodeReport:
    facts = {"instance": 1, "serial": 1, "epoch": 1, "generation": 4, "world_size": 2}
    return NodeReport(node=node, **{**facts, **more})  # type: ignore[arg-type]


def held(snapshot: SnapshotId, *ranks: int) -> tuple[Held, ...]:
    return tuple(Held(snapshot, rank, 2, 100) for rank in ranks)


def test_a_job_is_over_when_every_rank_has_closed_for_good() -> None:
    ending = Ending()
    assert not ending.is_over([])
    assert not ending.is_over([report("a", final=(0,)), report("b", served=(1,))])
    assert not ending.is_over([report("a", final=(0,)), report("b")])  # its rank ended without a word
    assert ending.is_over([report("a", final=(0,)), report("b", final=(1,))])
    assert ending.generation == 4


def test_what_was_said_once_outlives_the_daemon_but_not_the_generation() -> None:
    ending = Ending()
    assert not ending.is_over([report("a", final=(0,)), report("b", served=(1,))])
    assert ending.is_over([report("a"), report("b", final=(1,))])
    begun_again = [report("a", generation=5), report("b", final=(1,))]
    assert not ending.is_over(begun_again)
    assert not ending.is_over([report("a", generation=5), report("b", generation=5, final=(1,))])
    assert not ending.is_over([report("a", generation=5, final=(0, 1), served=(0,))])


def test_reports_orders_and_inventories_without_what_was_removed() -> None:
    told = Told(NEW, OLD, 7)
    full = report(
        "a",
        held=held(OLD, 0) + held(NEW, 0),
        done=(PartDone(OLD, b"p"),),
        problems=((OLD, "bad"), (NEW, "bad")),
        told=told,
    )
    left = report_without(full, 3)
    assert left.held == held(NEW, 0) and left.done == () and left.problems == ((NEW, "bad"),)
    assert left.told == Told(NEW, None, 0)
    assert report_without(full, 0) is full
    orders = Orders(number=9, complete=NEW, target=NEW, protected=OLD, protected_epoch=7)
    assert orders_without(orders, 3) == replace(orders, protected=None, protected_epoch=0)
    assert orders_without(orders, 2) is orders
    assert orders_without(orders, 4) == Orders(number=9)
    inventory = Inventory(node="a", held=held(OLD, 0, 1), problems=((NEW, "bad"),))
    assert inventory_without(inventory, 3) == Inventory(node="a", problems=((NEW, "bad"),))


def test_shards_that_only_one_node_has() -> None:
    inventories = [
        Inventory(node="a", held=held(OLD, 0, 1) + held(NEW, 0)),
        Inventory(node="b", held=held(OLD, 1)),
        Inventory(node="c", held=held(OLD, 0)),  # in no group: its copy protects nothing
    ]
    orders = Orders(complete=NEW, protected=OLD)
    assert lone_shards("a", that_matter(orders), inventories, {"b"}) == [(OLD, 0), (NEW, 0)]
    assert lone_shards("a", that_matter(orders), inventories, {"b", "c"}) == [(NEW, 0)]
    assert lone_shards("a", {OLD}, inventories, {"b", "c"}) == []


def test_when_protection_needs_a_node_no_more() -> None:
    assert lacks_protection(Orders(), 5) == ""
    assert "not protected" in lacks_protection(Orders(complete=NEW, reason="waiting for b"), 5)
    before = Orders(complete=NEW, protected=NEW, protected_epoch=4)
    assert "groups with the node" in lacks_protection(before, 5)
    assert lacks_protection(replace(before, protected_epoch=5), 5) == ""
    assert lacks_protection(replace(before, complete=SnapshotId(4, 3), protected_epoch=6), 5) == ""


def round_of(*reports: RankReport) -> RestoreRound:
    made = RestoreRound(4, 0, 2, None, Decision(Outcome.FOUND, OLD, (), ""))
    for rank, each in enumerate(reports):
        made.report(rank, each)
    return made


def test_a_repair_leads_to_another_round_of_the_same_snapshot() -> None:
    good, mended = RankReport(True), RankReport(False, is_mended=True)
    assert round_of(mended).settle() is None  # the other rank has not reported
    answer = round_of(good, mended).settle()
    assert answer is not None and not answer.is_committed and answer.is_try_again and answer.problem == ""
    bad = RankReport(False, ((1, 3, "hash differs; no node has it"),))
    answer = round_of(mended, bad).settle()
    assert answer is not None and answer.is_try_again and "rank 1 chunk 3" in answer.problem
    answer = round_of(mended, RankReport(False, failure="names differ")).settle()
    assert answer is not None and not answer.is_try_again and "rank 1: names differ" in answer.reason
