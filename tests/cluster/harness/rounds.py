"""Rounds of loss: m nodes die with all their memory, and the job goes on from that of the others, bit for bit.

A `Rounds` keeps a cluster with one or two jobs from round to round, as a cluster lives: what a round leaves is what the
next begins with.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.daemon import PYTHON_PATH, ClusterDaemon
from tests.cluster.harness.observer import Observer, Snapshot
from tests.cluster.harness.training import Recipe, Restored, Training, TrainingFailed, run_reference
from tests.support.waiting import wait_for

PROTECT_S = 90.0
MOMENT_S = 1.5
REMOVED_S = 30.0
STEP_S = 0.2
START_MOMENT_S = 10.0
AGAIN_SHARE = 0.25
FRESH_STEPS = 3  # steps of this start that must be protected before the next loss


class Wrong(AssertionError):
    """A promise was broken."""


@dataclass
class Job:
    """A job from its first start to its end; `number` of the start under way. `hosts`: where its ranks run."""

    name: str
    recipe: Recipe
    hosts: list[int]
    reference: list[dict[int, str]]
    starts: int = 0
    training: Training | None = None
    protected: Snapshot = (0, 0)

    @property
    def now(self) -> Training:
        assert self.training is not None, f"{self.name} does not run"
        return self.training


@dataclass
class Outcome:
    """What a round showed. `steps`: job -> (protected before the loss, restored)."""

    lost: list[str]
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    is_twice: bool = False  # the replacements died as well, while the job started or restored


def make_recipes(ranks: int, steps: int, seed: int, *, is_uneven: bool, is_double: bool) -> list[Recipe]:
    """One job over all hosts and, if `is_double`, a smaller one over two of them."""
    first = Recipe(
        ranks=ranks, steps=steps, seed=seed, width=160 + 16 * ranks, heavy=seed % ranks if is_uneven else -1
    )
    second = Recipe(ranks=2, steps=steps, seed=seed + 1, width=128)
    return [first, second] if is_double else [first]


class Rounds:
    """Losses of `m` nodes, one after the other. `say` gets a line for each thing that happens."""

    def __init__(
        self,
        cluster: Cluster,
        observer: Observer,
        recipes: Sequence[Recipe],
        *,
        m: int,
        seed: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.cluster, self.observer, self.m, self.say = cluster, observer, m, say
        self.chance = random.Random(seed)
        self.recipes = list(recipes)
        self.references: list[list[dict[int, str]]] = []
        self.jobs: list[Job] = []
        self.job_count = 0
        self.replacement_count = 0

    def prepare(self) -> None:
        """The references, and the first start of every job."""
        for number, recipe in enumerate(self.recipes):
            began = time.monotonic()
            folder = self.cluster.folder / f"reference-{number}"
            self.references.append(run_reference(recipe, {"PYTHONPATH": PYTHON_PATH}, folder))
            self.say(
                f"reference {number}: {recipe.ranks} ranks, {recipe.steps} steps, {time.monotonic() - began:.0f} s"
            )
        self.jobs = [self.new_job(number) for number in range(len(self.recipes))]
        self.start_jobs()

    def new_job(self, number: int) -> Job:
        self.job_count += 1
        recipe = self.recipes[number]
        hosts = self.chance.sample(range(len(self.cluster.daemons)), recipe.ranks)
        return Job(f"job-{number}-{self.job_count}", recipe, hosts, self.references[number])

    # starting and checking

    def start_jobs(self) -> dict[str, int]:
        """Start every job on its hosts; returns job -> restored step."""
        for job in self.jobs:
            self.launch(job)
        return {job.name: self.check_restored(job) for job in self.jobs}

    def launch(self, job: Job) -> None:
        daemons = [self.cluster.daemons[index] for index in job.hosts]
        job.starts += 1
        job.training = Training(
            job.recipe,
            [daemon.host for daemon in daemons],
            [daemon.trainer_env() for daemon in daemons],
            self.cluster.folder / f"{job.name}.{job.starts}",
            job=job.name,
            step_s=STEP_S,
        )

    def check_restored(self, job: Job) -> int:
        """All ranks restored one step, no older than what was protected, and every byte is the reference's."""
        try:
            found = job.now.wait_restored()
        except TrainingFailed as error:
            raise Wrong(
                f"{job.name} (protected before: {job.protected}) was not restored:\n{error}"
            ) from None
        steps = {each.step for each in found}
        if len(steps) != 1:
            raise Wrong(f"{job.name}: ranks went on from different steps: {[each.step for each in found]}")
        step = steps.pop()
        if step < job.protected[1]:
            raise Wrong(f"{job.name}: status had called {job.protected} protected, restored was step {step}")
        self._check_digests(job, found)
        return step

    def _check_digests(self, job: Job, found: Sequence[Restored]) -> None:
        for rank, each in enumerate(found):
            if each.digest != job.reference[rank][each.step]:
                raise Wrong(
                    f"{job.name}: rank {rank}'s state at step {each.step} is not that of the reference"
                )

    def check_steps(self, job: Job) -> int:
        """Every step of this start gave the reference's bytes; returns how many there were."""
        count = 0
        for rank, digests in enumerate(job.now.digests()):
            for step, digest in digests.items():
                count += 1
                if digest != job.reference[rank][step]:
                    raise Wrong(f"{job.name}: rank {rank} has other bytes at step {step} than the reference")
        if not count:
            raise Wrong(f"{job.name}: no step of start {job.starts} was there to be compared")
        return count

    # one round

    def play(self, *, lost_count: int | None = None) -> Outcome:
        """Protect, lose, replace, restart, check."""
        for job in self.jobs:
            self.wait_protected(job)
        time.sleep(self.chance.random() * MOMENT_S)
        victims = self.chance.sample(self.cluster.daemons, self.m if lost_count is None else lost_count)
        outcome = Outcome([daemon.node for daemon in victims])
        for job in self.jobs:
            job.protected = self.observer.protected(job.name)
        self.lose(victims)
        for job in self.jobs:
            job.protected = max(job.protected, self.observer.protected(job.name))
            self.check_steps(job)
        began = time.monotonic()
        self.replace(victims)
        outcome.seconds["replacements"] = time.monotonic() - began
        if self.chance.random() < AGAIN_SHARE:
            outcome.is_twice = True
            self.lose_again(victims)
        restored = self.start_jobs()
        for job in self.jobs:
            outcome.steps[job.name] = (job.protected[1], restored[job.name])
            outcome.seconds[f"restore {job.name}"] = max(
                each["seconds"]
                for rank in range(job.recipe.ranks)
                for each in job.now.events(rank, "restored")
            )
        self._retire_old()
        return outcome

    def wait_protected(self, job: Job) -> None:
        """Until some steps of this start are protected."""
        restored = job.now.wait_restored()[0]
        wanted = (restored.generation, min(restored.step + FRESH_STEPS, job.recipe.steps - 1))

        def is_protected() -> bool:
            if job.now.failures():
                raise Wrong(f"{job.name} failed in its loop:\n{job.now.tail()}")
            return self.observer.protected(job.name) >= wanted

        what = f"{job.name}: {wanted} or newer is protected"
        wait_for(is_protected, what, PROTECT_S, self.cluster.tails, job.now.tail)

    def lose(self, victims: Sequence[ClusterDaemon]) -> None:
        """What runs on those hosts is killed and their memory is gone; the launcher then ends the job elsewhere."""
        for daemon in victims:
            killed = daemon.host.kill_everything()
            if daemon.wait_ended() != -signal.SIGKILL or not killed:
                raise Wrong(f"the daemon of {daemon.node} was not killed")
        for daemon in victims:
            if not daemon.wipe():
                raise Wrong(f"there was nothing to wipe on {daemon.node}")
            daemon.asker.forget()
        for job in self.jobs:
            job.now.kill()

    def lose_again(self, victims: Sequence[ClusterDaemon]) -> None:
        """The replacements die in their turn, at some moment of the job's start: still only m nodes are lost."""
        for job in self.jobs:
            self.launch(job)
        time.sleep(self.chance.random() * START_MOMENT_S)
        self.lose(victims)
        self.replace(victims)

    def replace(self, victims: Sequence[ClusterDaemon]) -> None:
        """New daemons on the empty hosts, some under new names."""
        for daemon in victims:
            if self.chance.random() < 0.5 and daemon.settings.get("SNAPD_CLUSTER_COORDINATOR") != "leader":
                self.replacement_count += 1
                self.cluster.rename(daemon, f"{daemon.host.name}-{self.replacement_count}")
        self.cluster.start(victims)

    def _retire_old(self) -> None:
        """A job that comes near its last step is ended and another begins; one that was restored at its end has no
        steps of this start.
        """
        for number, job in enumerate(self.jobs):
            restored = job.now.wait_restored()[0].step
            if max(job.now.step(), restored) > job.recipe.steps * 2 // 3:
                job.now.kill()
                if restored < job.recipe.steps:
                    self.check_steps(job)
                self.remove(job)
                self.jobs[number] = new = self.new_job(number)
                self.launch(new)
                self.check_restored(new)

    def remove(self, job: Job) -> None:
        """On one node; it goes on all."""
        holders = [daemon for daemon in self.cluster.running if daemon.job(job.name) is not None]
        holders[0].asker.remove(job.name)
        wait_for(
            lambda: all(daemon.job(job.name) is None for daemon in self.cluster.running),
            f"{job.name} is removed everywhere",
            REMOVED_S,
            self.cluster.says,
        )

    # more than m

    def lose_too_many(self) -> list[str]:
        """m + 1 nodes of one group are lost: the job is refused, and each rank says what is missing."""
        for each in self.jobs:
            self.wait_protected(each)
        job = self.jobs[0]
        victims = [self.cluster.daemons[index] for index in self.chance.sample(job.hosts, self.m + 1)]
        self.lose(victims)
        self.cluster.start(victims)
        self.launch(job)
        said = job.now.wait_failed()
        job.now.kill()
        lost = [job.hosts.index(self.cluster.daemons.index(daemon)) for daemon in victims]
        missing = [f"rank {rank}: no node has its shard any more" for rank in lost]
        if len(lost) == len(job.hosts):  # of 1+1 even the records are gone
            missing.append("it was complete; no node has anything of it any more")
        for line in said:
            if "NotRestorable" not in line or not any(words in line for words in missing):
                raise Wrong(f"the loss of ranks {lost} is not what was said: {line}")
        return said
