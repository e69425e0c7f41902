"""The job's trainers, and the agent that starts them again (torchrun's part): the outside world of the daemons.

All ranks step together; a rank that dies stops the world, and a new incarnation of it is started, on the same nodes or
on others. A trainer that cannot be reached cannot be killed either: it goes on for some steps, as if nothing had been.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Choice
from snapd.core.restore import Outcome, RankReport
from snapd.errors import FencedError, SnapdError
from snapd.sim.disk import Content, HandOver, Session, StoredShard, content
from snapd.sim.job import WAKE_S
from snapd.sim.machines import Machine

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon
    from snapd.sim.simulation import Simulation

RETRY_S = 0.3
RESTART_S = 0.7
ZOMBIE_STEPS = 3


class WorldDied(Exception):
    """Some rank is gone, or cannot go on."""


@dataclass(slots=True, eq=False)
class Trainer:
    rank: int
    machine: Machine
    row: Session
    contents: tuple[Content, ...] = ()
    restored: SnapshotId | None = None
    has_state: bool = False
    zombie_steps: int = 0

    @property
    def is_alive(self) -> bool:
        return not self.row.is_gone


@dataclass(slots=True)
class Training:
    """`step`: the last one that all ranks have done. `is_paused`: for scenarios that want to look at a standing job."""

    sim: Simulation
    trainers: list[Trainer] = field(default_factory=list)
    step: int = 0
    worlds: int = 0
    fresh_starts: int = 0
    steps_done: int = 0
    is_running: bool = False
    is_paused: bool = False
    rollbacks: int = 0
    move_ranks: float = 0.2
    rng: random.Random = field(init=False)
    _rollback_count: int = 0
    _wants_rollback: bool = False
    _left: str = ""  # the machine that is left behind

    def __post_init__(self) -> None:
        self.rng = self.sim.chance_of("training")

    async def run(self) -> None:
        while True:
            try:
                await self._start_world()
                await self._go_on()
            except WorldDied as error:
                self.is_running = False
                self.sim.note("job", f"the world ends: {error}")
            self._kill_all()
            await asyncio.sleep(RESTART_S * (0.5 + self.rng.random()))

    def kill(self, rank: int) -> None:
        """A trainer process dies."""
        if rank < len(self.trainers) and self.trainers[rank].is_alive:
            self.sim.note(self.trainers[rank].machine.name, f"trainer of rank {rank} is killed")
            self._end(self.trainers[rank])

    def leave_behind(self, machine: str) -> None:
        """The world is started again on other machines while this one runs: nobody tells its trainers."""
        self._left = machine

    def roll_back(self) -> None:
        self._wants_rollback = True

    # a world's life

    async def _start_world(self) -> None:
        machines = await self._choose_machines()
        self.worlds += 1
        self._rollback_count = 0
        incarnation, size = f"w{self.worlds}", self.sim.settings.ranks
        self.trainers = [
            Trainer(rank, machines[rank], Session(rank, -1, incarnation, size, self.sim.settings.slots))
            for rank in range(size)
        ]
        self.sim.note("job", f"{incarnation} starts on {', '.join(m.name for m in machines)}")
        await self._all(self._open)
        await self._restore()

    async def _choose_machines(self) -> list[Machine]:
        """Where each rank was, if that machine is there; else a spare one."""
        while True:
            up = [m for m in self.sim.machines.values() if m.is_up and self.sim.is_reachable(m.name)]
            up = [m for m in up if m.name != self._left] or up
            if len(up) * self.sim.settings.ranks_per_node_max >= self.sim.settings.ranks and up:
                break
            await asyncio.sleep(RETRY_S)
        self._left = ""
        former = [trainer.machine for trainer in self.trainers]
        if len(former) == self.sim.settings.ranks and self.rng.random() < self.move_ranks:
            self.rng.shuffle(former)
        load = {machine.name: 0 for machine in up}
        chosen: list[Machine] = []
        for rank in range(self.sim.settings.ranks):
            machine = former[rank] if rank < len(former) else up[rank % len(up)]
            if machine.name not in load or load[machine.name] >= self.sim.settings.ranks_per_node_max:
                machine = min(up, key=lambda m: load[m.name])
            load[machine.name] += 1
            chosen.append(machine)
        return chosen

    async def _restore(self) -> None:
        """Rounds until all ranks have restored the same, or there is nothing to restore."""
        for number in range(8):
            plans: dict[int, Choice] = {}
            is_committed: dict[int, bool] = {}

            async def one(
                trainer: Trainer,
                number: int = number,
                plans: dict[int, Choice] = plans,
                is_committed: dict[int, bool] = is_committed,
            ) -> None:
                is_committed[trainer.rank] = await self._restore_rank(trainer, number, plans)

            await self._all(one)
            outcomes = {choice.decision.outcome for choice in plans.values()}
            if outcomes <= {Outcome.ABSENT, Outcome.UNUSABLE}:
                self._start_fresh()
                return
            if all(is_committed.values()) and len(is_committed) == len(self.trainers):
                missing = [t.rank for t in self.trainers if not t.has_state]
                restored = {t.rank: t.restored for t in self.trainers}
                self.sim.truth.committed(self.trainers[0].row.generation, restored, missing)
                chosen = self.trainers[0].restored
                assert chosen is not None
                self.step = chosen.step
                return
            if not outcomes <= {Outcome.FOUND}:
                raise WorldDied(f"not restored: {', '.join(sorted(o.value for o in outcomes))}")
        raise WorldDied("not restored in many rounds")

    def _start_fresh(self) -> None:
        self.fresh_starts += 1
        self.step = 0
        for trainer in self.trainers:
            count = self.sim.settings.chunks_of(trainer.rank)
            lineage = trainer.row.incarnation
            trainer.contents = tuple(content(lineage, trainer.rank, index) for index in range(count))
            trainer.has_state = True
        self.sim.note("job", "starts fresh")

    async def _restore_rank(self, trainer: Trainer, number: int, plans: dict[int, Choice]) -> bool:
        """One rank's part of a round: True when the world's restore is committed."""
        row, shard = trainer.row, None
        trainer.has_state, trainer.restored = False, None
        try:
            daemon = await self._daemon(trainer)
            plan, shard = await daemon.life.call(daemon.restores.restore(row, number, accept_older=False))
            plans[trainer.rank] = plan.choice
            if plan.choice.decision.outcome is not Outcome.FOUND:
                return False
            report = RankReport(True)
        except FencedError as error:
            raise WorldDied(f"rank {trainer.rank}: {error.message}") from error
        except SnapdError as error:
            report = RankReport(False, failure=error.message)
        if shard is not None:
            self._take(trainer, plans[trainer.rank], shard)
        return await self._finish(trainer, number, report)

    def _take(self, trainer: Trainer, choice: Choice, shard: StoredShard) -> None:
        self.sim.truth.restored(trainer.rank, trainer.row, choice, shard)
        trainer.contents, trainer.restored, trainer.has_state = shard.contents, shard.record.id, True

    async def _finish(self, trainer: Trainer, number: int, report: RankReport) -> bool:
        try:
            daemon = await self._daemon(trainer)
            verdict = await daemon.life.call(daemon.restores.finish(trainer.row, number, report))
        except SnapdError as error:
            raise WorldDied(f"rank {trainer.rank}: {error.message}") from error
        if not verdict.is_committed and not verdict.is_try_again:
            raise WorldDied(verdict.reason)
        if verdict.is_committed and not report.has_succeeded:
            trainer.has_state = False
        return verdict.is_committed

    async def _open(self, trainer: Trainer) -> None:
        while trainer.is_alive:
            try:
                daemon = await self._daemon(trainer)
                await daemon.life.call(daemon.job.open_session(trainer.row))
                return
            except FencedError as error:
                raise WorldDied(f"rank {trainer.rank}: {error.message}") from error
            except SnapdError:
                await asyncio.sleep(RETRY_S)
        raise WorldDied(f"rank {trainer.rank} is gone")

    async def _daemon(self, trainer: Trainer) -> SimDaemon:
        """The daemon of the trainer's machine, when it is running."""
        while trainer.is_alive:
            daemon = trainer.machine.daemon
            if trainer.machine.is_serving and daemon is not None:
                return daemon
            await asyncio.sleep(RETRY_S)
        raise WorldDied(f"rank {trainer.rank} is gone")

    async def _all(self, work: Callable[[Trainer], Coroutine[Any, Any, None]]) -> None:
        """On all ranks at once; one that fails ends them all. Watches for ranks that die meanwhile."""
        tasks = [asyncio.ensure_future(work(trainer)) for trainer in self.trainers]
        until_s = self.sim.loop.now_s + self.sim.settings.start_timeout_s
        try:
            while True:
                done, waiting = await asyncio.wait(
                    tasks, timeout=RETRY_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in tasks:
                    if task in done:
                        task.result()
                if not waiting:
                    return
                gone = [trainer.rank for trainer in self.trainers if not trainer.is_alive]
                if gone:
                    raise WorldDied(f"rank {gone[0]} is gone")
                if self.sim.loop.now_s > until_s:
                    raise WorldDied("the start takes too long")
        finally:
            for task in tasks:
                task.cancel()

    async def _go_on(self) -> None:
        """Step after step, all ranks together."""
        self.is_running = True
        while True:
            await asyncio.sleep(self.sim.settings.step_s * (0.8 + 0.4 * self.rng.random()))
            for trainer in self.trainers:
                if not trainer.is_alive:
                    raise WorldDied(f"rank {trainer.rank} is gone")
                if trainer.row.is_fenced:
                    raise WorldDied(f"rank {trainer.rank} was overtaken")
                if not self.sim.is_reachable(trainer.machine.name):
                    raise WorldDied(f"rank {trainer.rank} does not answer")
            if self._left:
                raise WorldDied("it is started a second time")
            if self._wants_rollback:
                self._wants_rollback = False
                await self._roll_back()
            if not self.is_paused:
                self.step += 1
                self.steps_done += 1
                for trainer in self.trainers:
                    delay = self.rng.random() * self.sim.settings.step_s / 4
                    self.sim.loop.call_later(delay, self._do_step, trainer, self.step)
                await asyncio.sleep(self.sim.settings.step_s / 4)

    async def _roll_back(self) -> None:
        self._rollback_count += 1
        self.rollbacks += 1
        self.sim.note("job", "all ranks roll back")

        async def one(trainer: Trainer) -> None:
            while True:
                try:
                    daemon = await self._daemon(trainer)
                    await daemon.life.call(daemon.job.roll_back(trainer.row, self._rollback_count))
                    return
                except FencedError as error:
                    raise WorldDied(f"rank {trainer.rank}: {error.message}") from error
                except SnapdError:
                    await asyncio.sleep(RETRY_S)

        await self._all(one)
        await self._restore()

    # one trainer

    def _do_step(self, trainer: Trainer, step: int) -> None:
        """One optimizer step and its capture: the lane is in the machine's memory, whether or not a daemon runs."""
        row = trainer.row
        if not trainer.is_alive or not trainer.contents or row.generation < 0 or step <= row.step_seen:
            return
        frozen = len(trainer.contents) // 3
        trainer.contents = (
            *trainer.contents[:frozen],
            *(
                content(row.incarnation, row.generation, step, trainer.rank, index)
                for index in range(frozen, len(trainer.contents))
            ),
        )
        row.step_seen, row.is_capturing = step, True
        is_thinned = row.interval_steps > 0 and step >= row.interval_from and step % row.interval_steps != 0
        disk = trainer.machine.disk
        held = sum(1 for _, rank in disk.shards if rank == trainer.rank) + len(row.lanes)
        if not is_thinned and held < row.slots:
            lane = HandOver(
                SnapshotId(row.generation, step),
                self.sim.next_number(),
                trainer.contents,
                self.sim.loop.now_s,
            )
            self.sim.truth.handed_over(trainer.rank, lane)
            row.lanes.append(lane)
        elif not is_thinned:
            row.skipped, row.skipped_step = row.skipped + 1, step
        self._wake(trainer)

    def _wake(self, trainer: Trainer) -> None:
        daemon = trainer.machine.daemon
        if daemon is not None and daemon.life.is_alive:
            self.sim.loop.call_later(WAKE_S * self.rng.random(), _woken, daemon, trainer.row)

    def _end(self, trainer: Trainer) -> None:
        if trainer.is_alive:
            trainer.row.is_gone = True
            self._wake(trainer)

    def _kill_all(self) -> None:
        """What can be reached is killed; the others go on for some steps by themselves."""
        for trainer in self.trainers:
            if trainer.is_alive and self._left:
                trainer.zombie_steps = ZOMBIE_STEPS
                delay_s = 2.0 * self.rng.random() if trainer.machine.name == self._left else 0.0
                self.sim.loop.call_later(delay_s, self._haunt, trainer, self.step + 1)
            elif trainer.is_alive and not self.sim.is_reachable(trainer.machine.name):
                trainer.zombie_steps = ZOMBIE_STEPS
                self._haunt(trainer, self.step + 1)
            else:
                self._end(trainer)

    def _haunt(self, trainer: Trainer, step: int) -> None:
        if not trainer.is_alive or trainer.row.is_fenced or trainer.zombie_steps <= 0:
            self._end(trainer)
            return
        trainer.zombie_steps -= 1
        self._do_step(trainer, step)
        self.sim.loop.call_later(self.sim.settings.step_s, self._haunt, trainer, step + 1)


def _woken(daemon: SimDaemon, row: Session) -> None:
    if daemon.life.is_alive:
        daemon.job.woken(row)
