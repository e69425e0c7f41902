"""The short form of `make soak`: real daemon, real trainers, real SIGKILL.

Whatever is killed, at a named point or at a random moment, what comes back is the uninterrupted run's
state of that step, to the bit, on all ranks alike, and never older than what `status` had reported to a
third party.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

from rounds import Random, client_point, daemon_point, named_points
from scene import Scene, open_scene

CLIENT, DAEMON = named_points("client"), named_points("daemon")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with open_scene(steps=300) as opened:
        yield opened


def test_there_are_at_least_twenty_named_points() -> None:
    assert len(CLIENT) + len(DAEMON) >= 20


@pytest.mark.parametrize("point", CLIENT)
def test_trainer_killed_at_point(scene: Scene, point: str) -> None:
    restores = scene.restores
    client_point(scene, point, count=1)
    assert scene.phases[f"point {point}"] == 1
    assert scene.restores > restores


@pytest.mark.parametrize("point", DAEMON)
def test_daemon_killed_at_point(scene: Scene, point: str) -> None:
    restores = scene.restores
    daemon_point(scene, point, count=1)
    assert scene.phases[f"point {point}"] == 1
    assert scene.restores > restores


def test_ranks_killed_at_random_moments(scene: Scene) -> None:
    rounds = Random(scene, seed=1)
    phases = {rounds.kill_all() for _ in range(4)} | {rounds.kill_one(), rounds.kill_all(during="restore")}
    assert len(phases) >= 2, "the moments were not random"


def test_daemon_killed_at_random_moments_under_running_trainers(scene: Scene) -> None:
    pid = scene.node.pid
    Random(scene, seed=2).kill_daemon(times=3)
    assert scene.node.pid != pid


@pytest.mark.parametrize("what", ["daemon", "all", "one"])
def test_stopped_and_continued(scene: Scene, what: str) -> None:
    Random(scene, seed=3).stop_and_continue(what)


def test_zombie_of_an_older_generation_spoils_nothing(scene: Scene) -> None:
    Random(scene, seed=4).zombie()
