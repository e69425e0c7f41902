"""peer.proto <-> core, with every number of a peer bounded before anything else sees it."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace

from snapd_proto import peer_pb2, trainer_pb2

from snapd.core.cluster import DATA_FRAGMENTS_MAX, PARITY_FRAGMENTS_MAX, Code, checked_node_name
from snapd.core.ids import STEP_MAX, WORLD_SIZE_MAX, SnapshotId, checked_job_name
from snapd.core.interval import Interval
from snapd.core.recovery import HeldRows, Inventory
from snapd.core.reports import FlushNews, Held, NodeReport, Orders, PartDone, Told
from snapd.core.restore import Decision, Outcome, RankReport, Verdict, Verdicts
from snapd.errors import RemoteProtocolError
from snapd.memory.records import record_from_bytes, record_to_proto
from snapd.rpc.convert import OUTCOMES, TEXT_MAX, plan_reply, report_of
from snapd.runtime.peers import NodeFacts, Records, ReportAnswer, ShardSource, WorldAsk, WorldPlan

HELD_MAX = 1 << 18
LIST_MAX = 1 << 20
PLAN_BYTES_MAX = 64
ROW_ID_BYTES = 16
HOLD_S_MAX = 60.0

_OUTCOMES_BACK = {number: outcome for outcome, number in OUTCOMES.items()}


def _bounded(value: int, bound: int, what: str) -> int:
    if not 0 <= value <= bound:
        raise RemoteProtocolError(f"{what} is out of range", kind="peer", value=value, max=bound)
    return value


def _few(items: Sized, bound: int, what: str) -> None:
    if len(items) > bound:
        raise RemoteProtocolError(f"too many {what}", kind="peer", count=len(items), max=bound)


def snapshot_of(generation: int, step: int) -> SnapshotId:
    return SnapshotId(_bounded(generation, STEP_MAX, "generation"), _bounded(step, STEP_MAX, "step"))


def _key(snapshot: SnapshotId) -> peer_pb2.SnapshotKey:
    return peer_pb2.SnapshotKey(generation=snapshot.generation, step=snapshot.step)


# held shards


def _held_to(held: Held) -> peer_pb2.HeldShard:
    return peer_pb2.HeldShard(
        generation=held.id.generation,
        step=held.id.step,
        rank=held.rank,
        world_size=held.world_size,
        nbytes=held.nbytes,
    )


def _held_from(message: peer_pb2.HeldShard) -> Held:
    world_size = _bounded(message.world_size, WORLD_SIZE_MAX, "world_size")
    rank = _bounded(message.rank, max(0, world_size - 1), "rank")
    return Held(snapshot_of(message.generation, message.step), rank, world_size, message.nbytes)


# reports


def report_to_proto(
    sender: peer_pb2.Sender, job: str, report: NodeReport, *, known_orders: int, hold_s: float
) -> peer_pb2.ReportRequest:
    message = peer_pb2.ReportRequest(
        sender=sender,
        job=job,
        generation=report.generation,
        serial=report.serial,
        instance=report.instance,
        newest_step_seen=report.newest_step_seen,
        aborts=report.aborts,
        trouble=report.trouble,
        known_orders=known_orders,
        hold_s=hold_s,
        served_ranks=report.served,
        world_size=report.world_size,
        interval_steps=report.interval_steps,
        closed_below=report.closed_below,
        keep_complete=report.keep_complete,
        is_capturing=report.is_capturing,
        final_ranks=report.final,
    )
    message.held.extend(_held_to(held) for held in report.held)
    message.passed.extend(
        peer_pb2.Passed(generation=report.generation, rank=rank, step=step)
        for rank, step in report.passed.items()
    )
    message.parts_done.extend(
        peer_pb2.PartDone(generation=part.id.generation, step=part.id.step, plan=part.plan)
        for part in report.done
    )
    message.problems.extend(
        peer_pb2.SnapshotProblem(generation=s.generation, step=s.step, problem=text[:TEXT_MAX])
        for s, text in report.problems
    )
    for name in ("complete", "protected"):
        told = getattr(report.told, name)
        if told is not None:
            getattr(message, f"told_{name}").CopyFrom(_key(told))
    message.told_protected_epoch = report.told.protected_epoch
    for name in ("durable", "wish"):
        named = getattr(report.flush, name)
        if named is not None:
            getattr(message, f"flush_{name}").CopyFrom(_key(named))
    message.flush_stuck = report.flush.stuck[:TEXT_MAX]
    message.flush_busy = report.flush.is_busy
    if report.node_flush is not None:
        message.node_flush.CopyFrom(_news_to(report.node_flush))
    return message


def _news_to(news: FlushNews) -> peer_pb2.FlushNews:
    message = peer_pb2.FlushNews(stuck=news.stuck[:TEXT_MAX], is_busy=news.is_busy)
    for name in ("durable", "wish"):
        named = getattr(news, name)
        if named is not None:
            getattr(message, name).CopyFrom(_key(named))
    return message


def _news_from(message: peer_pb2.FlushNews) -> FlushNews:
    return FlushNews(
        _snapshot(message.durable, message.HasField("durable")),
        _snapshot(message.wish, message.HasField("wish")),
        message.stuck[:TEXT_MAX],
        message.is_busy,
    )


def report_from_proto(message: peer_pb2.ReportRequest) -> NodeReport:
    """Raises RemoteProtocolError, ConfigError: a number or a name is out of range."""
    checked_job_name(message.job)
    _few(message.held, HELD_MAX, "held shards")
    _few(message.passed, WORLD_SIZE_MAX, "ranks")
    _few(message.served_ranks, WORLD_SIZE_MAX, "ranks")
    _few(message.final_ranks, WORLD_SIZE_MAX, "ranks")
    for part in message.parts_done:
        _bounded(len(part.plan), PLAN_BYTES_MAX, "plan")
    return NodeReport(
        node=checked_node_name(message.sender.node),
        instance=message.instance,
        serial=message.serial,
        epoch=message.sender.epoch,
        generation=_bounded(message.generation, STEP_MAX, "generation"),
        world_size=_bounded(message.world_size, WORLD_SIZE_MAX, "world_size"),
        held=tuple(_held_from(held) for held in message.held),
        passed={passed.rank: min(passed.step, STEP_MAX) for passed in message.passed},
        served=tuple(message.served_ranks),
        closed_below=message.closed_below,
        keep_complete=max(1, message.keep_complete),
        is_capturing=message.is_capturing,
        newest_step_seen=min(message.newest_step_seen, STEP_MAX),
        interval_steps=max(1, message.interval_steps),
        aborts=message.aborts,
        done=tuple(PartDone(snapshot_of(p.generation, p.step), p.plan) for p in message.parts_done),
        problems=tuple((snapshot_of(p.generation, p.step), p.problem[:TEXT_MAX]) for p in message.problems),
        trouble=message.trouble[:TEXT_MAX],
        told=Told(
            _snapshot(message.told_complete, message.HasField("told_complete")),
            _snapshot(message.told_protected, message.HasField("told_protected")),
            message.told_protected_epoch,
        ),
        final=tuple(message.final_ranks),
        flush=FlushNews(
            _snapshot(message.flush_durable, message.HasField("flush_durable")),
            _snapshot(message.flush_wish, message.HasField("flush_wish")),
            message.flush_stuck[:TEXT_MAX],
            message.flush_busy,
        ),
        node_flush=_news_from(message.node_flush) if message.HasField("node_flush") else None,
    )


def _snapshot(key: peer_pb2.SnapshotKey, is_there: bool) -> SnapshotId | None:
    return snapshot_of(key.generation, key.step) if is_there else None


def orders_to_proto(orders: Orders) -> peer_pb2.Orders:
    message = peer_pb2.Orders(
        number=orders.number,
        generation=orders.generation,
        interval_steps=orders.interval.configured,
        interval_factor=orders.interval.factor,
        interval_from_step=orders.interval.from_step,
        reason=orders.reason,
        target_groups=orders.target_groups,
        protected_epoch=orders.protected_epoch,
    )
    for name in ("complete", "target", "protected", "flush", "durable", "node_flush", "node_durable"):
        snapshot = getattr(orders, name)
        if snapshot is not None:
            getattr(message, name).CopyFrom(_key(snapshot))
    if orders.found is not None:
        message.found.CopyFrom(_key(orders.found[0]))
        message.found_epoch = orders.found[1]
    message.drop.extend(
        peer_pb2.Drop(generation=s.generation, step=s.step, reason=reason) for s, reason in orders.drop
    )
    message.problems.extend(
        peer_pb2.SnapshotProblem(generation=s.generation, step=s.step, problem=text)
        for s, text in orders.problems
    )
    return message


def orders_from_proto(message: peer_pb2.Orders) -> Orders:
    _few(message.drop, LIST_MAX, "snapshots")
    found = _snapshot(message.found, message.HasField("found"))
    return Orders(
        found=(found, message.found_epoch) if found is not None else None,
        number=message.number,
        generation=message.generation,
        complete=_snapshot(message.complete, message.HasField("complete")),
        target=_snapshot(message.target, message.HasField("target")),
        protected=_snapshot(message.protected, message.HasField("protected")),
        protected_epoch=message.protected_epoch,
        flush=_snapshot(message.flush, message.HasField("flush")),
        durable=_snapshot(message.durable, message.HasField("durable")),
        node_flush=_snapshot(message.node_flush, message.HasField("node_flush")),
        node_durable=_snapshot(message.node_durable, message.HasField("node_durable")),
        target_groups=tuple(message.target_groups),
        drop=tuple((snapshot_of(d.generation, d.step), d.reason) for d in message.drop),
        problems=tuple((snapshot_of(p.generation, p.step), p.problem) for p in message.problems),
        interval=Interval(
            configured=max(1, message.interval_steps),
            factor=max(1, message.interval_factor),
            from_step=message.interval_from_step,
        ),
        reason=message.reason,
    )


def answer_from_proto(message: peer_pb2.ReportReply) -> ReportAnswer:
    return ReportAnswer(message.is_collector, message.collector, orders_from_proto(message.orders))


# inventories and records


def inventory_to_proto(sender: peer_pb2.Sender, inventory: Inventory) -> peer_pb2.InventoryReply:
    reply = peer_pb2.InventoryReply(
        answerer=sender,
        generation=inventory.generation,
        is_here=inventory.is_here,
        live_ranks=inventory.live_ranks,
        arena_bytes=inventory.arena_bytes,
    )
    reply.held.extend(_held_to(held) for held in inventory.held)
    reply.rows.extend(
        peer_pb2.HeldRows(
            generation=rows.id.generation,
            step=rows.id.step,
            group=rows.group,
            epoch=rows.epoch,
            nodes=rows.nodes,
            k=rows.code.k,
            m=rows.code.m,
            row_ids=[row_id for row_id, _ in sorted(rows.fragments)],
            fragment_numbers=[number for _, number in sorted(rows.fragments)],
            record_ranks=sorted(rows.record_ranks),
        )
        for rows in inventory.rows
    )
    reply.problems.extend(
        peer_pb2.SnapshotProblem(generation=s.generation, step=s.step, problem=text)
        for s, text in inventory.problems
    )
    return reply


def inventory_from_proto(message: peer_pb2.InventoryReply) -> Inventory:
    _few(message.held, HELD_MAX, "held shards")
    _few(message.live_ranks, WORLD_SIZE_MAX, "ranks")
    for rows in message.rows:
        _few(rows.row_ids, LIST_MAX, "rows")
        if any(len(row_id) != ROW_ID_BYTES for row_id in rows.row_ids):
            raise RemoteProtocolError("a row's id has another size", kind="peer")
    return Inventory(
        node=checked_node_name(message.answerer.node),
        held=tuple(_held_from(held) for held in message.held),
        rows=tuple(
            HeldRows(
                snapshot_of(rows.generation, rows.step),
                rows.group,
                rows.epoch,
                tuple(checked_node_name(node) for node in rows.nodes),
                _code(rows.k, rows.m),
                _fragments(rows),
                frozenset(rows.record_ranks),
            )
            for rows in message.rows
        ),
        problems=tuple((snapshot_of(p.generation, p.step), p.problem) for p in message.problems),
        is_here=message.is_here,
        generation=_bounded(message.generation, STEP_MAX, "generation"),
        live_ranks=tuple(message.live_ranks),
        arena_bytes=message.arena_bytes,
    )


def _fragments(rows: peer_pb2.HeldRows) -> frozenset[tuple[bytes, int]]:
    if not rows.fragment_numbers:  # a version before did not say
        return frozenset((row_id, number) for row_id in rows.row_ids for number in range(rows.m))
    if len(rows.fragment_numbers) != len(rows.row_ids) or max(rows.fragment_numbers) >= rows.m:
        raise RemoteProtocolError("an inventory names fragments that do not exist", kind="peer")
    return frozenset(zip(rows.row_ids, rows.fragment_numbers, strict=True))


def _code(k: int, m: int) -> Code:
    if not 1 <= k <= DATA_FRAGMENTS_MAX or not 1 <= m <= PARITY_FRAGMENTS_MAX:
        raise RemoteProtocolError("a code is out of range", kind="peer", k=k, m=m)
    return Code(k, m)


def records_to_proto(records: Records) -> peer_pb2.FetchRecordsReply:
    reply = peer_pb2.FetchRecordsReply(epoch=records.epoch, nodes=records.nodes, group=records.group)
    if records.code is not None:
        reply.k, reply.m = records.code.k, records.code.m
    reply.records.extend(
        peer_pb2.PlacedRecord(node=node, record=record_to_proto(record)) for node, record in records.placed
    )
    return reply


def records_from_proto(message: peer_pb2.FetchRecordsReply) -> Records:
    """Raises IntegrityError: a record breaks a bound of the format."""
    return Records(
        tuple(
            (checked_node_name(placed.node), record_from_bytes(placed.record.SerializeToString()))
            for placed in message.records
        ),
        message.epoch,
        tuple(message.nodes),
        _code(message.k, message.m) if message.k else None,
        message.group,
    )


# restores


def ask_to_proto(sender: peer_pb2.Sender, job: str, ask: WorldAsk) -> peer_pb2.PlanWorldRestoreRequest:
    return peer_pb2.PlanWorldRestoreRequest(
        sender=sender,
        job=job,
        generation=ask.generation,
        round=ask.number,
        has_step=ask.step is not None,
        step=ask.step or 0,
        accept_older=ask.accept_older,
        world_size=ask.world_size,
        elastic=ask.is_elastic,
    )


def ask_from_proto(message: peer_pb2.PlanWorldRestoreRequest) -> WorldAsk:
    checked_job_name(message.job)
    return WorldAsk(
        generation=_bounded(message.generation, STEP_MAX, "generation"),
        number=message.round,
        world_size=_bounded(message.world_size, WORLD_SIZE_MAX, "world_size"),
        step=_bounded(message.step, STEP_MAX, "step") if message.has_step else None,
        accept_older=message.accept_older,
        is_elastic=message.elastic,
    )


def plan_to_proto(plan: WorldPlan) -> peer_pb2.PlanWorldRestoreReply:
    reply = peer_pb2.PlanWorldRestoreReply(decision=plan_reply(plan.decision))
    reply.sources.extend(
        peer_pb2.ShardSource(
            rank=source.rank,
            nodes_with_bytes=source.nodes,
            group=source.group,
            is_coded=source.is_coded,
            nodes_with_records=source.record_nodes,
            epoch=source.epoch,
        )
        for source in plan.sources
    )
    return reply


def plan_from_proto(message: peer_pb2.PlanWorldRestoreReply) -> WorldPlan:
    decision = message.decision
    outcome = _OUTCOMES_BACK.get(decision.outcome)
    if outcome is None:
        raise RemoteProtocolError("the decision has no outcome", kind="peer")
    has_chosen = outcome in (Outcome.FOUND, Outcome.WORLD_SIZE_DIFFERS)
    return WorldPlan(
        Decision(
            outcome,
            snapshot_of(decision.generation, decision.step) if has_chosen else None,
            tuple(
                Verdict(snapshot_of(c.generation, c.step), c.verdict, c.reason) for c in decision.candidates
            ),
            decision.reason,
        ),
        tuple(
            ShardSource(
                source.rank,
                tuple(source.nodes_with_bytes),
                source.is_coded,
                source.group,
                source.epoch,
                tuple(source.nodes_with_records),
            )
            for source in message.sources
        ),
    )


def rank_report_to_proto(number: int, report: RankReport) -> trainer_pb2.FinishRestoreRequest:
    return trainer_pb2.FinishRestoreRequest(
        round=number,
        succeeded=report.has_succeeded,
        failure=report.failure,
        mended=report.is_mended,
        bad_chunks=[
            trainer_pb2.BadChunk(rank=rank, chunk_index=index, what=what)
            for rank, index, what in report.bad_chunks
        ],
    )


def rank_report_from_proto(message: peer_pb2.FinishWorldRestoreRequest) -> RankReport:
    return replace(report_of(message.report), is_mended=message.report.mended)


def verdicts_from_proto(message: trainer_pb2.FinishRestoreReply) -> Verdicts:
    return Verdicts(message.committed, message.try_again, message.reason, message.problem)


def verdicts_to_proto(verdicts: Verdicts) -> trainer_pb2.FinishRestoreReply:
    return trainer_pb2.FinishRestoreReply(
        committed=verdicts.is_committed,
        try_again=verdicts.is_try_again,
        reason=verdicts.reason,
        problem=verdicts.problem,
    )


# status


def facts_from_proto(message: peer_pb2.NodeStatusReply, version: str) -> NodeFacts:
    return NodeFacts(
        node=checked_node_name(message.answerer.node),
        version=version,
        arena_bytes=message.arena_bytes,
        parity_bytes=message.parity_bytes,
        trouble=message.trouble[:TEXT_MAX],
        jobs=tuple(message.jobs),
        sent_bytes=message.sent_bytes,
        received_bytes=message.received_bytes,
        exposure_byte_s=message.exposure_byte_s,
        is_draining=message.is_draining,
        drain_waits_for=message.drain_waits_for[:TEXT_MAX],
    )
