"""One daemon, an observer, a nursery and a job: what every kill round starts from, and how it is judged."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
import snapd_native as native
from node import Node
from observer import Observer
from worlds import Nursery, World, wait_until

START_S = 30.0
PREFIX = "snapd-soak"


class Wrong(AssertionError):
    """A promise was broken."""


@dataclass
class Scene:
    """The pieces, and what was found. `steps` bounds every run; after them a new job begins."""

    node: Node
    observer: Observer
    nursery: Nursery
    references: dict[int, list[list[str]]]  # ranks -> digests [rank][step]
    steps: int
    job_count: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    restores: int = 0

    def new_job(self) -> str:
        self.job_count += 1
        return f"soak-{self.job_count}"

    def start(
        self,
        job: str,
        *,
        ranks: int,
        points: Mapping[int, str] | None = None,
        is_hurried: bool = False,
        rollback_every: int = 0,
    ) -> World:
        return self.nursery.start(
            job,
            ranks=ranks,
            steps=self.steps,
            env=self.node.env(),
            points=points,
            is_hurried=is_hurried,
            rollback_every=rollback_every,
        )

    # ---- judging

    def check_log(self, world: World) -> None:
        """Every digest that the trainers wrote is the one of the uninterrupted run at that step."""
        reference = self.references[len(world.ranks)]
        for rank in world.ranks:
            for event in rank.events():
                if "digest" in event and event["digest"] != reference[rank.rank][event["step"]]:
                    raise Wrong(
                        f"rank {rank.rank}: {event['what']} step {event['step']}: not the reference's state"
                    )

    def check_restored(self, world: World, before: tuple[int, int]) -> int:
        """All ranks came back to one step, no older than what had been reported, with the right bytes.

        Returns the step.
        """
        self.wait_restored(world)
        starts = {rank.events("restored")[0]["step"] for rank in world.ranks}
        if len(starts) != 1:
            raise Wrong(f"the ranks came back to different steps: {sorted(starts)}")
        start = int(starts.pop())
        if start < before[1]:
            raise Wrong(
                f"came back to step {start}, but (generation, step) {before} had been reported complete"
            )
        self.check_log(world)
        if self.observer.errors:
            raise Wrong("; ".join(self.observer.errors))
        self.restores += 1
        return start

    def wait_restored(self, world: World) -> None:
        def is_restored() -> bool:
            if not world.is_whole and not all(
                rank.status == 0 for rank in world.ranks if rank.status is not None
            ):
                raise Wrong(f"a rank failed before it had restored:\n{world.tail()}\n{self.node.tail()}")
            return all(rank.events("restored") for rank in world.ranks)

        wait_until(is_restored, START_S, f"restore of {world.job}", world.tail, self.node.tail)

    def wait_reported_beyond(self, job: str, before: tuple[int, int], timeout_s: float = START_S) -> None:
        """New snapshots are complete again: the system lives."""
        wait_until(
            lambda: self.observer.reported(job) > before,
            timeout_s,
            f"a snapshot of {job} newer than {before}",
            self.node.tail,
        )

    # ---- what the kill hit

    def lane_states(self, world: World) -> list[int]:
        """States of all lanes of the job's newest control page of each rank, as in the shared memory."""
        found: dict[int, tuple[int, list[int]]] = {}
        for path in (self.node.arena / "jobs" / world.job).glob("session-*.ctl"):
            with contextlib.suppress(OSError, ValueError), open(path, "r+b") as file:
                page = native.ControlPage.attach(file.fileno())
                with contextlib.closing(page):
                    states = [page.lane_state(lane) for lane in range(page.lane_count)]
                    if page.session_id > found.get(page.rank, (0, []))[0]:
                        found[page.rank] = (page.session_id, states)
        return [state for _, states in found.values() for state in states]

    def phase(self, world: World) -> str:
        """One word for where the world is; the copy and the daemon's work are what matters most."""
        phases = {rank.beat()[1] for rank in world.ranks}
        for phase in ("starting", "restoring", "handing over", "updating"):
            if phase in phases:
                return phase
        states = self.lane_states(world)
        if native.LANE_OPEN in states:
            return "computing, copy under way"
        if native.LANE_COMPLETE in states:
            return "computing, daemon recording"
        return "computing, all captured"

    def note_phase(self, world: World) -> str:
        phase = self.phase(world)
        self.phases[phase] += 1
        return phase

    # ---- pieces of rounds

    def reach_step(self, world: World, step: int, timeout_s: float = START_S) -> None:
        def is_there() -> bool:
            if not world.is_alive:
                raise Wrong(f"the run ended before step {step}:\n{world.tail()}\n{self.node.tail()}")
            return world.step() >= step

        wait_until(is_there, timeout_s, f"step {step} of {world.job}", world.tail, self.node.tail)

    def end(self, world: World) -> None:
        """Kill what is left of a world and judge what it logged."""
        world.kill()
        world.wait_gone()
        self.check_log(world)

    def remove(self, job: str) -> None:
        """The job is done with: its memory comes free."""
        self.observer.forget(job)
        self.node.remove(job)

    def restart_daemon(self) -> None:
        self.node.kill()
        self.node.start()

    @contextlib.contextmanager
    def stopped(self, pids: list[int], seconds: float) -> Iterator[None]:
        import os

        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def open_scene(*, steps: int, ranks: tuple[int, ...] = (1, 2)) -> Iterator[Scene]:
    with Nursery() as nursery:
        references = {count: nursery.reference(ranks=count, steps=steps) for count in ranks}
        with Node(PREFIX) as node, Observer(node.runtime) as observer:
            yield Scene(node, observer, nursery, references, steps)
