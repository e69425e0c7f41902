"""Coding again what this node lacks of the parity that a stored row map gives it, after a fragment went bad.

The rows are those that were planned: nobody else takes part but the nodes whose chunks are pulled, and what protects
the group does not change. Each fragment is encoded here, from chunks that are checked.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import xxhash

from snapd.core.ids import SnapshotId
from snapd.core.protection import RowPlan
from snapd.core.rows import Row
from snapd.errors import SnapdError
from snapd.runtime.bulk_store import commits_on
from snapd.runtime.coding import Bench, fetch_row, pieces_per_row
from snapd.runtime.job import Job
from snapd.runtime.loop_caller import LoopCaller
from snapd.runtime.recovering import RecoveryMeans

REASONS_SHOWN = 4


async def mend_parity(job: Job, means: RecoveryMeans, snapshot: SnapshotId) -> str:
    """Code what is lacking; returns why some of it could not be, empty if nothing is lacking now."""
    plans = [plan for plan in job.parity.plans() if plan.map.id == snapshot]
    reasons: list[str] = []
    for plan in sorted(plans, key=lambda plan: plan.map.epoch)[-1:]:  # older epochs protect nothing more
        given = dict.fromkeys((row.id, number) for row, number in plan.given_to(means.node))
        held = job.parity.held_among(given)
        rows = {row.id: row for row in plan.rows}
        lacking = [(rows[row_id], number) for row_id, number in given if (row_id, number) not in held]
        if lacking:
            reasons += await _mend(job, means, plan, lacking)
    return "; ".join(dict.fromkeys(reasons[:REASONS_SHOWN]))


async def _mend(
    job: Job, means: RecoveryMeans, plan: RowPlan, lacking: Sequence[tuple[Row, int]]
) -> list[str]:
    stop = threading.Event()
    bench = Bench(
        job,
        plan.map.id,
        means.make_codec(plan.map.code),
        means.links,
        means.pipeline.buffers,
        LoopCaller(asyncio.get_running_loop()),
        commits_on(asyncio.get_running_loop()),
        stop,
    )
    try:
        with means.pipeline.used():
            reasons = await means.pipeline.bring(_mend_rows, bench, lacking, plan.frame_bytes)
    finally:
        stop.set()
    job.context.log.info(
        "parity.mended",
        job=job.name,
        generation=plan.map.id.generation,
        step=plan.map.id.step,
        fragments=len(lacking) - len(reasons),
        reason="; ".join(reasons[:REASONS_SHOWN]),
    )
    job.settle()
    return reasons


def _mend_rows(bench: Bench, lacking: Sequence[tuple[Row, int]], piece_bytes: int) -> list[str]:
    """On a thread, one row after the other. Returns why, for each fragment that failed."""
    reasons: list[str] = []
    for row, number in lacking:
        with bench.buffers.lend(pieces_per_row(row), piece_bytes, bench.stop) as pieces:
            chunks = [pieces.pop()[: chunk.nbytes] for chunk in row.chunks]
            parity = [pieces.pop()[: row.nbytes] for _ in row.parity_nodes]
            try:
                fetch_row(bench, row, chunks)
                data: list[memoryview | None] = [*chunks]
                data.extend([None] * (bench.codec.k - len(data)))
                bench.codec.encode(data, parity)
                _keep(bench, row, number, parity[number])
            except SnapdError as error:
                reasons.append(f"row {row.number}: {error.message}")
    return reasons


def _keep(bench: Bench, row: Row, number: int, fragment: memoryview) -> None:
    parity = bench.job.parity
    own = parity.reserve(row.id, number, row.nbytes)
    try:
        own.view[:] = fragment
        digest = xxhash.xxh3_128_digest(own.view)
        bench.commits.call((bench.job, (own, digest)))
    finally:
        parity.cancel(own)  # nothing after a commit
