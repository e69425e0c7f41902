"""A process with three nodes that captures, protects and brings back, and is killed on the way.

`python -m tests.support.protecting_child FOLDER POINT`: arms a fault point (faultpoints.py) and works until it is
hit; a process that ends by itself has never come to it. Prints what it had reached, a word a line.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from snapd.core.ids import SnapshotId
from snapd.runtime import faultpoints
from snapd.runtime.protecting import drop_protection
from tests.support.cluster_nodes import CHUNK, group_of, network_of, protect, sources_now

NODES = ["n0", "n1", "n2"]
CODE = "1+2"  # so that fragments are pushed, too
GROUP = group_of(NODES, CODE)
CHUNKS = 6


async def work(folder: Path, spec: str) -> None:
    async with network_of(folder, NODES) as network:
        for step in (5, 6):
            for rank, name in enumerate(NODES):
                await network.nodes[name].capture("a", step, rank, [CHUNK] * CHUNKS)
        print("captured", flush=True)
        faultpoints.arm(spec)
        await protect(network, "a", 5, GROUP)
        print("protected", flush=True)
        await protect(network, "a", 6, GROUP)
        for node in network.nodes.values():
            drop_protection(node.jobs["a"], SnapshotId(1, 5))
        print("dropped", flush=True)
        await network.nodes["n0"].bring("a", 6, 1, sources_now(network, "a", 6, GROUP))
        print("brought", flush=True)


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), sys.argv[2]))
