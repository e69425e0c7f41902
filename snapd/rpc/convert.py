"""proto <-> core: requests are bounded and checked here, before anything else sees them."""

from __future__ import annotations

from collections.abc import Sequence

from snapd_proto import trainer_pb2

from snapd.core.ids import check_world, checked_incarnation, checked_job_name
from snapd.core.restore import Decision, Outcome, RankReport
from snapd.errors import RemoteProtocolError
from snapd.runtime.fetched import Found
from snapd.runtime.opening import Opening

STATE_BYTES_MAX = 1 << 46
BAD_CHUNKS_MAX = 4096
TEXT_MAX = 4096
INTERVAL_MAX = 1 << 31

OUTCOMES = {
    Outcome.FOUND: trainer_pb2.PlanRestoreReply.FOUND,
    Outcome.ABSENT: trainer_pb2.PlanRestoreReply.ABSENT,
    Outcome.UNUSABLE: trainer_pb2.PlanRestoreReply.UNUSABLE,
    Outcome.WORLD_SIZE_DIFFERS: trainer_pb2.PlanRestoreReply.WORLD_SIZE_DIFFERS,
    Outcome.UNREACHABLE: trainer_pb2.PlanRestoreReply.UNREACHABLE,
}


def opening_of(request: trainer_pb2.OpenSessionRequest, *, is_clustered: bool) -> Opening:
    """Check an OpenSession request.

    Raises:
        ConfigError: kinds `job_name`, `incarnation`, `world`, `no_coordination`.
        RemoteProtocolError: a number is out of range.
    """
    checked_job_name(request.job)
    checked_incarnation(request.incarnation)
    check_world(
        request.rank,
        request.world_size,
        request.local_rank,
        request.local_world_size,
        is_clustered=is_clustered,
    )
    checked_state_bytes(request.state_bytes_estimate)
    if request.interval_steps > INTERVAL_MAX:
        raise RemoteProtocolError("interval_steps is out of range", interval_steps=request.interval_steps)
    return Opening(
        job=request.job,
        incarnation=request.incarnation,
        rank=request.rank,
        world_size=request.world_size,
        state_bytes_estimate=request.state_bytes_estimate,
        chunk_bytes=request.chunk_bytes,
        slots=request.slots,
        interval_steps=max(1, request.interval_steps),
    )


def checked_state_bytes(nbytes: int) -> int:
    """Return `nbytes` if a state can have that size."""
    if nbytes > STATE_BYTES_MAX:
        raise RemoteProtocolError("the state's size is out of range", state_bytes=nbytes, max=STATE_BYTES_MAX)
    return nbytes


def report_of(request: trainer_pb2.FinishRestoreRequest) -> RankReport:
    """Check a FinishRestore request."""
    if len(request.bad_chunks) > BAD_CHUNKS_MAX:
        raise RemoteProtocolError("too many bad chunks in one report", count=len(request.bad_chunks))
    bad = tuple((chunk.rank, chunk.chunk_index, chunk.what[:TEXT_MAX]) for chunk in request.bad_chunks)
    return RankReport(request.succeeded and not bad, bad, request.failure[:TEXT_MAX])


def places_to_proto(found: Sequence[Found]) -> trainer_pb2.ShardPlaces:
    """Where chunks lie, as columns."""
    return trainer_pb2.ShardPlaces(
        segment_rank=[one.segment_rank for one in found],
        segment=[one.place.segment for one in found],
        frame=[one.place.frame for one in found],
    )


def for_another_world(
    reply: trainer_pb2.PlanRestoreReply, request: trainer_pb2.PlanRestoreRequest, world_size: int
) -> trainer_pb2.PlanRestoreReply:
    """The reply to a rank of another number of ranks than saved: it lists the shards itself, if it knows how."""
    if not request.elastic:
        reply.outcome = trainer_pb2.PlanRestoreReply.WORLD_SIZE_DIFFERS
        reply.reason = f"it was captured by {reply.saved_world_size} ranks, this world has {world_size}"
    return reply


def plan_reply(decision: Decision) -> trainer_pb2.PlanRestoreReply:
    """The decision without its shards."""
    reply = trainer_pb2.PlanRestoreReply(outcome=OUTCOMES[decision.outcome], reason=decision.reason)
    if decision.chosen is not None:
        reply.generation, reply.step = decision.chosen.generation, decision.chosen.step
    reply.candidates.extend(
        trainer_pb2.Candidate(
            generation=verdict.id.generation,
            step=verdict.id.step,
            verdict=verdict.verdict,
            reason=verdict.reason,
        )
        for verdict in decision.verdicts
    )
    return reply
