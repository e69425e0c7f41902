"""What light worlds are held against: training is never held, and levels come back."""

from __future__ import annotations

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer
from tests.support.waiting import wait_for

HELD_S_MAX = 1.0
LEVEL_S = 40.0


def wait_protected_beyond(made: Cluster, observer: Observer, job: str, step: int) -> int:
    """Wait until a step beyond this one is called protected; returns the newest."""
    what = f"a step of {job} beyond {step} is protected"
    wait_for(lambda: observer.protected(job)[1] > step, what, LEVEL_S, made.tails)
    return observer.protected(job)[1]


def assert_never_held(world: LightWorld, since: float, *, seconds: float) -> None:
    """It stepped on all the while, and no step took long."""
    steps = world.held_since(since)
    assert len(steps) >= seconds / world.step_s / 4, f"only {len(steps)} steps in {seconds:.0f} s"
    assert max(step.held_s for step in steps) < HELD_S_MAX, sorted(step.held_s for step in steps)[-5:]


def catches_up(made: Cluster, observer: Observer, world: LightWorld) -> None:
    """What is captured from now on becomes protected."""
    wait_protected_beyond(made, observer, world.job, world.last)
