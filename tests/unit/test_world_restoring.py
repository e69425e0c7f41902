"""A restore in a world that spans nodes, as one of them sees it: the collector and the bringing of shards are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.restore import Decision, Outcome, RankReport, RestoreRound, Verdicts
from snapd.errors import ConflictError, NotFoundError, NotRestorable, UnavailableError
from snapd.runtime.fetched import Fetched
from snapd.runtime.peers import Brought, ShardSource, WorldAsk, WorldPlan
from snapd.runtime.world_restoring import WorldRestores
from tests.support.collector_reports import snap
from tests.support.virtual_time import pass_time, run_virtually
from tests.support.world_scene import FakeJob, FakeSession

DONE = RankReport(True)
FOUND = Decision(Outcome.FOUND, snap(4), (), "the newest")


class Restored(FakeJob):
    """A job of which nothing is here at first."""

    def __init__(self) -> None:
        super().__init__()
        self.planning = asyncio.Lock()
        self.repairs = None
        self.fetched = Fetched()
        self.arenas: dict[int, object] = {}
        self.parents: list[tuple[int, SnapshotId]] = []
        self.coordination.commit_parent = self._commit_parent  # type: ignore[attr-defined]
        self.context.settings = Settings()  # type: ignore[attr-defined]

    async def _commit_parent(self, generation: int, parent: SnapshotId) -> None:
        self.parents.append((generation, parent))


@dataclass
class Settings:
    restore_finish_s: float = 30.0


@dataclass
class Collecting:
    """The collector: one decision for each round, a barrier of `world_size` ranks."""

    decisions: dict[int, Decision] = field(default_factory=lambda: {0: FOUND, 1: FOUND})
    asked: list[WorldAsk] = field(default_factory=list)
    rounds: dict[int, RestoreRound] = field(default_factory=dict)
    finished: list[tuple[int, int]] = field(default_factory=list)
    away: bool = False

    async def plan_restore(self, name: str, ask: WorldAsk, *, timeout_s: float) -> WorldPlan:
        self.asked.append(ask)
        if self.away:
            raise UnavailableError("nobody collects the job", kind="no_collector")
        decision = self.decisions[ask.number]
        self.rounds[ask.number] = RestoreRound(ask.generation, ask.number, ask.world_size, ask.step, decision)
        return WorldPlan(decision, tuple(ShardSource(rank, (f"n{rank}",)) for rank in range(2)))

    async def finish_restore(
        self, name: str, generation: int, number: int, rank: int, report: RankReport, *, timeout_s: float
    ) -> Verdicts:
        self.finished.append((number, rank))
        self.rounds[number].report(rank, report)
        answer = self.rounds[number].settle(is_late=True)
        assert answer is not None
        return answer


@dataclass
class Bringing:
    """Brings a shard into the ledger, or fails as it is told."""

    errors: list[Exception] = field(default_factory=list)
    brought: list[tuple[SnapshotId, int]] = field(default_factory=list)

    async def bring(
        self,
        job: Any,
        snapshot: SnapshotId,
        rank: int,
        sources: Sequence[ShardSource],
        *,
        is_here_bad: bool,
    ) -> Brought:
        self.brought.append((snapshot, rank))
        await pass_time(0.1)
        if self.errors:
            raise self.errors.pop(0)
        job.capture(snapshot.step, rank)
        job.ledger.hold(snapshot)
        return Brought(job.ledger.snapshots[snapshot].shards[rank].record)


@dataclass
class Scene:
    job: Restored
    collecting: Collecting = field(default_factory=Collecting)
    bringing: Bringing = field(default_factory=Bringing)
    restores: WorldRestores = None  # type: ignore[assignment]

    async def plan(
        self, rank: int = 0, number: int = 0, step: int | None = None, generation: int = 1
    ) -> Decision:
        session = FakeSession(rank, generation)
        return await self.restores.plan(self.job, session, number, step, accept_older=False)  # type: ignore[arg-type]

    async def finish(self, rank: int = 0, number: int = 0, report: RankReport = DONE) -> Verdicts:
        return await self.restores.finish(self.job, FakeSession(rank), number, report)  # type: ignore[arg-type]

    @property
    def holds(self) -> int:
        facts = self.job.ledger.snapshots.get(snap(4))
        return facts.hold_count if facts else 0


def scenario(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def run() -> None:
        scene = Scene(Restored())
        scene.restores = WorldRestores(scene.collecting, scene.bringing, wait_s=60)
        await test(scene)

    def wrapped() -> None:
        run_virtually(run())

    wrapped.__name__ = test.__name__
    return wrapped


@scenario
async def test_the_collector_is_asked_once_for_all_ranks_of_the_node(scene: Scene) -> None:
    decisions = await asyncio.gather(scene.plan(0), scene.plan(1))
    assert decisions == [FOUND, FOUND]
    assert len(scene.collecting.asked) == 1
    assert (scene.collecting.asked[0].world_size, scene.collecting.asked[0].number) == (2, 0)
    assert sorted(scene.bringing.brought) == [(snap(4), 0), (snap(4), 1)]


@scenario
async def test_a_shard_is_brought_once_however_often_it_is_asked_for(scene: Scene) -> None:
    await asyncio.gather(*(scene.plan(1) for _ in range(3)))
    assert scene.bringing.brought == [(snap(4), 1)]
    assert scene.holds == 1


@scenario
async def test_a_shard_that_is_here_is_held_and_not_brought(scene: Scene) -> None:
    scene.job.capture(4, 0)
    await scene.plan(0)
    assert scene.bringing.brought == []
    assert scene.holds == 1
    assert scene.job.ledger.snapshots[snap(4)].is_announced


@scenario
async def test_what_was_restored_is_let_go_and_recorded_once(scene: Scene) -> None:
    await asyncio.gather(scene.plan(0), scene.plan(1))
    assert scene.holds == 2
    scene.collecting.rounds[0].report(1, DONE)
    answers = [await scene.finish(0), await scene.finish(1)]
    assert [answer.is_committed for answer in answers] == [True, True]
    assert scene.holds == 0
    assert scene.job.parents == [(1, snap(4))]


@scenario
async def test_different_steps_are_refused_here_already(scene: Scene) -> None:
    await scene.plan(0, step=4)
    with pytest.raises(ConflictError) as caught:
        await scene.plan(1, step=5)
    assert caught.value.kind == "restore_step"


@scenario
async def test_a_shard_that_cannot_be_had_is_the_askers_error_and_tried_again_when_asked_again(
    scene: Scene,
) -> None:
    missing = NotRestorable("shard of rank 0: row 3 has 1 of the 2 fragments it needs", kind="shard_sources")
    scene.bringing.errors.append(missing)
    with pytest.raises(NotRestorable) as caught:
        await scene.plan(0)
    assert caught.value.kind == "shard_sources"
    assert await scene.plan(1) == FOUND, "another rank's shard is another matter"
    assert await scene.plan(0) == FOUND
    assert scene.bringing.brought == [(snap(4), 0), (snap(4), 1), (snap(4), 0)]


@scenario
async def test_an_absent_collector_is_said_and_leaves_nothing_behind(scene: Scene) -> None:
    scene.collecting.away = True
    with pytest.raises(UnavailableError) as caught:
        await scene.plan(0)
    assert caught.value.kind == "no_collector"
    scene.collecting.away = False
    assert await scene.plan(0) == FOUND


@pytest.mark.parametrize(
    "outcome", [Outcome.ABSENT, Outcome.UNUSABLE, Outcome.UNREACHABLE, Outcome.WORLD_SIZE_DIFFERS]
)
def test_other_outcomes_bring_nothing(outcome: Outcome) -> None:
    @scenario
    async def run(scene: Scene) -> None:
        scene.collecting.decisions[0] = replace(FOUND, outcome=outcome)
        assert (await scene.plan(0)).outcome is outcome
        assert scene.bringing.brought == []
        assert scene.holds == 0

    run()


@scenario
async def test_a_bad_chunk_condemns_the_snapshot_and_the_next_round_takes_another(scene: Scene) -> None:
    scene.collecting.decisions[1] = replace(FOUND, chosen=snap(3))
    await asyncio.gather(scene.plan(0), scene.plan(1))
    scene.collecting.rounds[0].report(1, DONE)
    answer = await scene.finish(0, report=RankReport(False, ((1, 7, "digest"),)))
    assert (answer.is_committed, answer.is_try_again) == (False, True)
    assert "rank 1 chunk 7: digest" in scene.job.index.problems[snap(4)]
    assert scene.holds == 0
    assert scene.job.parents == []
    assert (await scene.plan(0, number=1)).chosen == snap(3)
    assert scene.bringing.brought[-1] == (snap(3), 0)


@scenario
async def test_a_newer_generation_lets_go_of_an_older_ones_rounds(scene: Scene) -> None:
    await asyncio.gather(scene.plan(0), scene.plan(1))
    assert scene.holds == 2
    await scene.plan(0, generation=2)
    assert scene.holds == 1


@scenario
async def test_shards_of_a_round_that_was_not_planned(scene: Scene) -> None:
    with pytest.raises(NotFoundError) as caught:
        await scene.restores.shards_for(scene.job, FakeSession(), 5)  # type: ignore[arg-type]
    assert caught.value.kind == "restore_round"
