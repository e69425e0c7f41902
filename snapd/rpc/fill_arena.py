"""Admin.FillArena: bringing a snapshot of the shared tier into the arena, with progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from snapd_proto import admin_pb2

from snapd.core.ids import checked_job_name
from snapd.errors import ConfigError
from snapd.runtime.node import Node
from snapd.runtime.tier_filling import FillAsk, Filling, fill_arena

PROGRESS_INTERVAL_S = 0.2


async def fill(node: Node, request: admin_pb2.FillArenaRequest) -> AsyncIterator[admin_pb2.FillArenaProgress]:
    """Progress, the last one with `finished`.

    Raises:
        ConfigError: kind `no_tier`: none is configured, or another one; SnapdError: as `fill_arena`.
    """
    tier = node.tier_restores
    if tier is None or request.url not in ("", tier.url):
        what = (
            f"the daemon's shared tier is {tier.url}" if tier is not None else "the daemon has no shared tier"
        )
        raise ConfigError(
            what,
            kind="no_tier",
            hint="start it with tier.shared (SNAPD_TIER_SHARED) set, or restore into a directory with --to DIR",
        )
    name = checked_job_name(request.job)
    is_new = name not in node.jobs
    job = node.job_for(name)
    ask = FillAsk(
        step=request.step if request.has_step else None,
        generation=request.generation if request.has_generation else None,
        ranks=tuple(request.ranks),
    )
    filling = Filling()
    work = node.context.keep(fill_arena(tier, job, ask, filling))
    try:
        while not work.done():
            await asyncio.wait([work], timeout=PROGRESS_INTERVAL_S)
            if not work.done():
                yield _progress(tier.url, filling, is_finished=False)
        work.result()
        yield _progress(tier.url, filling, is_finished=True)
    finally:
        if not work.done():  # the caller is gone: what was brought so far stays
            work.cancel()
            await asyncio.wait([work])
        job.settle()
        if is_new:
            node.drop_if_empty(job)


def _progress(url: str, filling: Filling, *, is_finished: bool) -> admin_pb2.FillArenaProgress:
    snapshot = filling.snapshot
    return admin_pb2.FillArenaProgress(
        nbytes_done=filling.nbytes_done,
        nbytes_total=filling.nbytes_total,
        finished=is_finished,
        generation=snapshot.generation if snapshot else 0,
        step=snapshot.step if snapshot else 0,
        world_size=filling.world_size,
        ranks_here=filling.ranks_here,
        is_newer_here=filling.is_newer_here,
        passed_over=[
            admin_pb2.PassedOver(generation=one.generation, step=one.step, reason=reason)
            for one, reason in filling.passed_over
        ],
        tier=url,
    )
