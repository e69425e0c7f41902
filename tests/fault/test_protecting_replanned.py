"""Who holds what of a snapshot changes after it was protected: its rows stay while somebody counts on them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from tests.support.cluster_nodes import (
    CHUNK,
    Network,
    group_of,
    network_of,
    protect,
    sources_now,
    target,
    until,
)

NODES = ["n0", "n1", "n2"]
STEP = SnapshotId(1, 5)


def ask(network: Network, name: str, answer: bool) -> list[tuple[str, SnapshotId, int]]:
    """From now on this node is told so when it would plan anew. Returns what it asks."""
    asked: list[tuple[str, SnapshotId, int]] = []

    async def may_replace(job: str, snapshot: SnapshotId, epoch: int) -> bool:
        asked.append((job, snapshot, epoch))
        await asyncio.sleep(0)
        return answer

    protector = network.nodes[name].protector("a")
    protector._means = replace(protector._means, may_replace=may_replace)
    return asked


@pytest.mark.parametrize("may_replace", [False, True])
def test_rows_that_are_counted_on_stay_and_go_on_being_complete(folder: Path, may_replace: bool) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network:
            group = group_of(NODES, "2+1")
            for rank, name in enumerate(NODES):
                await network.nodes[name].capture("a", 5, rank, [CHUNK] * 4)
            await protect(network, "a", 5, group)
            node = network.nodes["n0"]
            before = node.jobs["a"].parity.plan(STEP, 1)
            assert before is not None
            # the job's ranks have moved: a restore has brought another node's shard here
            await node.bring("a", 5, 1, sources_now(network, "a", 5, group))
            asked = ask(network, "n0", may_replace)
            protector = node.protector("a")
            protector.aim(None)
            protector.aim(target(5, group))
            await until(lambda: bool(asked) and bool(protector.state.plan), 20, "it has planned")
            assert asked == [("a", STEP, 1)]
            after = node.jobs["a"].parity.plan(STEP, 1)
            assert after is not None and (after.identity == before.identity) == (not may_replace)
            assert protector.state.plan == after.identity
            if not may_replace:
                await until(lambda: protector.state.is_done, 20, "its part is done as before")
                network_lost = sources_now(network, "a", 5, group)
                kept = network.nodes["n2"].shard("a", 5, 2)
                await network.lose("n2")
                fresh = network.add("fresh")
                await fresh.bring("a", 5, 2, network_lost)
                assert fresh.shard("a", 5, 2) == kept

    asyncio.run(run())
