"""Protection and recovery over the real side channel, in the clear and with TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.runtime.protecting import drop_protection
from tests.support.cluster_nodes import CHUNK, group_of, network_of, protect, sources_now
from tests.support.cluster_sockets import joined

NODES = ["n0", "n1", "n2", "n3"]
GROUP = group_of(NODES, "2+2")


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_two_of_four_are_lost_and_come_back_over_sockets(folder: Path, tmp_path: Path, is_tls: bool) -> None:
    async def run() -> None:
        async with network_of(folder, NODES) as network, joined(network, tmp_path, is_tls=is_tls) as sockets:
            kept = {}
            for rank, name in enumerate(NODES):
                node = network.nodes[name]
                await node.capture("a", 5, rank, [CHUNK] * (6 + 6 * rank) + [11])
                await node.capture("a", 6, rank, [CHUNK] * (6 + 6 * rank) + [11])
                kept[rank] = node.shard("a", 6, rank)
            await protect(network, "a", 5, GROUP)
            await protect(network, "a", 6, GROUP)
            for name in NODES:
                drop_protection(network.nodes[name].jobs["a"], SnapshotId(1, 5))
            await sockets.lose("n1")
            await sockets.lose("n3")
            fresh = network.add("fresh")
            sockets.join(fresh)
            sources = sources_now(network, "a", 6, GROUP)
            for rank in kept:
                await fresh.bring("a", 6, rank, sources)
                assert fresh.shard("a", 6, rank) == kept[rank]
            assert sockets.log.lines == []

    asyncio.run(run())


def test_a_node_that_vanishes_in_the_middle_is_trouble_and_then_is_not(folder: Path, tmp_path: Path) -> None:
    """Its server goes while rows are being pulled from it; it comes back on another port, and the part is done."""

    async def run() -> None:
        async with (
            network_of(folder, NODES, bytes_max=4 * CHUNK) as network,
            joined(network, tmp_path, is_tls=False) as sockets,
        ):
            for rank, name in enumerate(NODES):
                await network.nodes[name].capture("a", 5, rank, [CHUNK] * 30)
            task = asyncio.create_task(protect(network, "a", 5, GROUP))
            while not any(network.nodes[name].protector("a").state.rows_done for name in NODES):
                await asyncio.sleep(0.001)
            await sockets.silence("n2")
            while "n2: " not in network.nodes["n0"].protector("a").state.trouble:
                assert not task.done(), "it was too quick to be interrupted"
                await asyncio.sleep(0.005)
            sockets.speak("n2")
            await task
            assert network.nodes["n0"].protector("a").state.trouble == ""

    asyncio.run(run())
