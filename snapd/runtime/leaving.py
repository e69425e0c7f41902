"""Going away in good order: a SIGTERM may be the notice that this machine is taken away.

What the trainers have handed over is captured, and what this node has of each job becomes protected, and durable where
there is a tier, as far as the times of grace go. Trainers may go on meanwhile; what they hand over later is not
waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from snapd.core.ids import SnapshotId
from snapd.runtime.disk_job import JobDisk
from snapd.runtime.flushing import JobFlusher
from snapd.runtime.job import Job
from snapd.runtime.node import Node

LOOK_S = 0.02


async def finish_levels(
    node: Node, grace_s: float, *, tier_grace_s: float = 0.0, is_failing: Callable[[], bool]
) -> None:
    """Return when it is done, when nothing more can be done, or after `grace_s`; what becomes durable has until
    `tier_grace_s`, but a store that refuses us for good is not waited for. `is_failing`: the daemon must end.
    """
    began_s = node.context.environment.monotonic_s()
    deadline_s = began_s + grace_s

    def is_over() -> bool:
        return is_failing() or node.context.environment.monotonic_s() >= deadline_s

    while not is_over() and not _is_captured(node):
        await asyncio.sleep(LOOK_S)
    is_captured = _is_captured(node)
    disks = node.disks.jobs if node.disks is not None else {}
    for flusher in node.flushers.values():
        flusher.finish()
    for disk in disks.values():
        disk.finish()
    goals = {name: _newest_here(job) for name, job in node.jobs.items()}
    while not is_over() and (open_jobs := _unprotected(node, goals)):
        await asyncio.sleep(LOOK_S)
        goals = {name: goals[name] for name in open_jobs}
    left = _unprotected(node, goals)
    tier_deadline_s = began_s + tier_grace_s
    while not is_failing() and not all(each.is_hopeless for each in _not_durable(node)):
        if node.context.environment.monotonic_s() >= tier_deadline_s:
            break
        await asyncio.sleep(LOOK_S)
    not_durable = _not_durable(node)
    for left_behind in not_durable:
        _tell_left(node, left_behind)
    node.context.log.info(
        "levels.finished",
        is_captured=is_captured,
        unprotected_jobs=left,
        not_durable_jobs=sorted({flusher.job.name for flusher in not_durable}),
        seconds=round(node.context.environment.monotonic_s() - began_s, 3),
    )


def _is_captured(node: Node) -> bool:
    """Every lane that a trainer has completed by now is recorded."""
    node.poll()
    return all(session.is_drained for _, session in node.sessions())


def _newest_here(job: Job) -> SnapshotId | None:
    return next((facts.id for facts in job.ledger.newest_first() if not facts.problem), None)


def _unprotected(node: Node, goals: dict[str, SnapshotId | None]) -> list[str]:
    """The jobs whose newest snapshot here may still become protected, and is not."""
    cluster = node.cluster
    table = cluster.table if cluster is not None else None
    group = table.group_of(cluster.name) if cluster is not None and table is not None else None
    if cluster is None or group is None or group.code is None:
        return []
    found = []
    for name, goal in sorted(goals.items(), key=lambda item: item[0]):
        job, world = node.jobs.get(name), cluster.worlds.get(name)
        if goal is None or job is None or world is None or world.is_away:
            continue
        facts, protected = job.ledger.snapshots.get(goal), world.protected
        is_reached = protected is not None and protected >= goal
        if not is_reached and facts is not None and not facts.problem:
            found.append(name)
    return found


def _not_durable(node: Node) -> list[JobFlusher | JobDisk]:
    """The jobs whose newest complete snapshot may still become durable, and is not."""
    disks = node.disks.jobs if node.disks is not None else {}
    shared = [flusher for _, flusher in sorted(node.flushers.items()) if flusher.is_behind()]
    return [*shared, *(disk for _, disk in sorted(disks.items()) if disk.is_behind())]


def _tell_left(node: Node, flusher: JobFlusher | JobDisk) -> None:
    """What is lost with this machine, unless another has it."""
    trouble, durable = flusher.trouble, flusher.durable
    node.context.log.warning(
        "snapshot.not_durable",
        job=flusher.job.name,
        snapshot=str(flusher.newest),
        durable=str(durable) if durable is not None else None,
        kind=trouble.kind if trouble is not None else "grace",
        is_waited_for=not flusher.is_hopeless,
        reason=flusher.reason,
    )
