"""What protection adds to training's steps: one FSDP2 job, protection on and off in turn.

Off means that etcd is stopped: daemons then begin no new level, capturing goes on as before. So both halves of a pair
have the same job, the same captures and the same processes.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from typing import Any

from cluster_scene import WAIT_S, measured_cluster, wait_protected

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.training import Recipe, Training
from tests.support.waiting import wait_for

SETTLE_S = 2.0
STEPS_MAX = 100_000
T_95 = {4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262, 12: 2.201, 16: 2.131}


def recipe_for(state_bytes: int, ranks: int) -> Recipe:
    """Two square layers: parameters and two moments, four bytes each."""
    width = int(math.sqrt(state_bytes / 12 / 2))
    return Recipe(ranks=ranks, steps=STEPS_MAX, width=width - width % 16, layers=2)


def measure(
    code: str, nodes: int, state_bytes: int, *, pairs: int, interval: int, is_tls: bool, window_s: float
) -> dict[str, Any]:
    """`interval`: steps between snapshots; `window_s`: of each half of a pair."""
    recipe = recipe_for(state_bytes, nodes)
    with measured_cluster(code, nodes, is_tls=is_tls) as made:
        envs = [daemon.trainer_env() for daemon in made.daemons]
        options = ["--no-digests", "--step-seconds", "0", "--interval", str(interval)]
        hosts = [daemon.host for daemon in made.daemons]
        training = Training(recipe, hosts, envs, made.folder / "steps", job="steps", options=options)
        try:
            training.wait_step(interval + 3)
            wait_protected(made, "steps", 2 * interval + 1)  # the memory of two parities is backed by then
            return (
                alternate(made, training, pairs, window_s)
                | {"interval": interval}
                | {"state_GB": recipe.width**2 * 2 * 12 / 1e9}
            )
        finally:
            training.kill()


def alternate(made: Cluster, training: Training, pairs: int, window_s: float) -> dict[str, Any]:
    assert made.etcd is not None and made.etcd.process is not None
    etcd = made.etcd.process.pid
    differences, on_s, off_s, protected = [], [], [], 0
    for turn in range(pairs):
        values = {}
        for is_on in (True, False) if turn % 2 else (False, True):
            os.kill(etcd, signal.SIGCONT if is_on else signal.SIGSTOP)
            wait_for(lambda on=is_on: is_protecting(made) == on, "protection is switched", WAIT_S, made.says)
            time.sleep(SETTLE_S)
            before, began = protected_step(made), time.monotonic()
            time.sleep(window_s)
            values[is_on] = step_seconds(training, began, time.monotonic())
            protected += is_on and protected_step(made) > before
        on_s.append(values[True])
        off_s.append(values[False])
        differences.append(100 * (values[True] / values[False] - 1))
    os.kill(etcd, signal.SIGCONT)
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(pairs)
    t = T_95.get(pairs, 2.0)
    return {
        "pairs": pairs,
        "step_s_with": statistics.median(on_s),
        "step_s_without": statistics.median(off_s),
        "added_percent": mean,
        "added_percent_low_95": mean - t * error,
        "added_percent_high_95": mean + t * error,
        "windows_with_a_newer_protected": protected,
        "window_s": window_s,
        "each_pair_percent": " ".join(f"{one:.1f}" for one in differences),
    }


def is_protecting(made: Cluster) -> bool:
    return not any(daemon.status().cluster.is_away for daemon in made.daemons)


def protected_step(made: Cluster) -> int:
    job = made.daemons[0].job("steps")
    return int(job.protected_step) if job is not None else 0


def step_seconds(training: Training, began: float, ended: float) -> float:
    """Mean seconds from one step's end to the next within a window, on rank 0: the ranks step together."""
    ends = [event["t"] for event in training.events(0, "step") if began <= event["t"] <= ended]
    assert len(ends) > 2, f"{len(ends)} steps in {ended - began:.0f} s"
    return (ends[-1] - ends[0]) / (len(ends) - 1)
