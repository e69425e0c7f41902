"""How one rank's restore goes from round to round, and what it tells the others; the daemon is a script."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from snapd_client import restore as restoring
from snapd_client.elastic import SavedShards
from snapd_client.errors import NotRestorable, SnapdError, UnavailableError, from_daemon
from snapd_client.session import ShardMemory
from snapd_client.shard_source import BadChunks, ShardSource
from snapd_proto import format_pb2
from snapd_proto import trainer_pb2 as pb

FOUND = pb.PlanRestoreReply(
    outcome=pb.PlanRestoreReply.FOUND, generation=1, step=7, shards=[format_pb2.ShardRecord(rank=0)]
)
COMMITTED = pb.FinishRestoreReply(committed=True)
AGAIN = pb.FinishRestoreReply(try_again=True)
OVER = pb.FinishRestoreReply(reason="rank 1: failed")


class Script:
    """A session that answers PlanRestore and FinishRestore in order, and keeps what it was told."""

    session_id = 5

    def __init__(self, plans: list[Any], answers: list[Any]) -> None:
        self.plans, self.answers = list(plans), list(answers)
        self.told: list[pb.FinishRestoreRequest] = []

    def call(self, invoke: Callable[..., Any], **_: object) -> Any:
        return invoke(SimpleNamespace(PlanRestore=self.plan, FinishRestore=self.finish))

    def plan(self, _: pb.PlanRestoreRequest) -> Any:
        return self._next(self.plans)

    def finish(self, request: pb.FinishRestoreRequest) -> Any:
        self.told.append(request)
        return self._next(self.answers)

    @staticmethod
    def _next(items: list[Any]) -> Any:
        item = items.pop(0)
        if isinstance(item, SnapdError):
            raise item
        return item


def run(
    script: Script, monkeypatch: pytest.MonkeyPatch, *, fills: list[Exception | None] | None = None
) -> int:
    left = list(fills or [])

    def fill(*_: object) -> None:
        error = left.pop(0) if left else None
        if error is not None:
            raise error

    monkeypatch.setattr(restoring, "_fill", fill)
    context: Any = SimpleNamespace(session=script, job="j", world=SimpleNamespace(rank=3))
    return restoring.restore(context, restoring.Asked())


def no_source() -> SnapdError:
    return from_daemon("shard_sources", "row 3 has 1 of 2 fragments", status="FAILED_PRECONDITION")


def test_a_shard_that_no_node_has_is_told_and_the_next_snapshot_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script([no_source(), FOUND], [AGAIN, COMMITTED])
    assert run(script, monkeypatch) == 7
    first, second = script.told
    assert not first.succeeded and first.round == 0 and second.succeeded and second.round == 1
    assert [chunk.rank for chunk in first.bad_chunks] == [3] and "row 3" in first.bad_chunks[0].what


def test_a_shard_of_another_rank_that_cannot_be_had_is_told_as_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An elastic restore reads the shards of all saved ranks: the wrong one must not be mended, or given up."""
    missing = no_source()
    missing.context["rank"] = 9
    script = Script([FOUND, FOUND], [AGAIN, COMMITTED])
    assert run(script, monkeypatch, fills=[missing, None]) == 7
    assert [chunk.rank for chunk in script.told[0].bad_chunks] == [9]


def test_a_fetch_that_fails_names_the_rank() -> None:
    session: Any = SimpleNamespace(session_id=1, rank=0, chunk_bytes=64, call=fails_for_rank_two)
    memory = ShardMemory({(5, 0): None}, set())  # type: ignore[dict-item]
    shards = SavedShards(session, "j", 0, (1, 1), memory)
    for rank in (1, 2):
        record = format_pb2.ShardRecord(rank=rank, chunks=[format_pb2.Chunk()])
        shards.sources[rank] = ShardSource(record, memory, 64)
    with pytest.raises(NotRestorable) as caught:
        shards.fetch({1: [0], 2: [0]})
    assert caught.value.context["rank"] == 2


def fails_for_rank_two(invoke: Any, **_: object) -> Any:
    def answer(request: Any, **_: object) -> Any:
        if any(shard.rank == 2 for shard in request.wanted):
            raise no_source()
        return pb.FetchChunksReply(found=[pb.ShardPlaces(segment_rank=[5], segment=[0], frame=[0])])

    return invoke(SimpleNamespace(FetchChunks=answer))


def test_bad_chunks_lead_to_another_round(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([FOUND, FOUND], [AGAIN, COMMITTED])
    assert run(script, monkeypatch, fills=[BadChunks([(0, 4)])]) == 7
    assert [(c.rank, c.chunk_index) for c in script.told[0].bad_chunks] == [(0, 4)]


@pytest.mark.parametrize("is_bad", [True, False])
def test_a_round_that_is_over_for_all_is_over_for_this_rank_too(
    monkeypatch: pytest.MonkeyPatch, is_bad: bool
) -> None:
    """Else it would plan another round alone, and wait for ranks that have ended."""
    script = Script([FOUND] if is_bad else [no_source()], [OVER])
    with pytest.raises(UnavailableError, match="rank 1: failed"):
        run(script, monkeypatch, fills=[BadChunks([(0, 4)])] if is_bad else [])
    assert len(script.told) == 1 and not script.plans


@pytest.mark.parametrize(
    ("kind", "status", "is_told"),
    [
        ("shard_sources", "UNAVAILABLE", True),  # a node that may have it does not answer
        ("arena_full", "RESOURCE_EXHAUSTED", True),
        ("settling", "UNAVAILABLE", False),  # nobody has a plan: nobody waits
    ],
)
def test_what_fails_for_one_rank_alone_is_told_to_those_that_wait(
    monkeypatch: pytest.MonkeyPatch, kind: str, status: str, is_told: bool
) -> None:
    script = Script([from_daemon(kind, "no", status=status)], [OVER])
    with pytest.raises(SnapdError) as caught:
        run(script, monkeypatch)
    assert caught.value.kind == kind
    assert [bool(told.failure) for told in script.told] == [True] * is_told


def test_an_error_while_filling_is_told_and_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([FOUND], [OVER])
    with pytest.raises(NotRestorable, match="not ours"):
        run(script, monkeypatch, fills=[NotRestorable("not ours")])
    assert "not ours" in script.told[0].failure
