"""Records of a snapshot that was protected under two epochs: those of the older one can be had until its rows go."""

from __future__ import annotations

import asyncio
from pathlib import Path

from snapd.codec.isal import make_codec
from snapd.core.ids import SnapshotId
from snapd.runtime.node_protection import NodeProtection
from snapd.runtime.protecting import Means, drop_protection
from tests.support.cluster_nodes import CHUNK, group_of, network_of, protect

SNAPSHOT = SnapshotId(1, 5)
OLDER, NEWER = ["n0", "n1", "n2"], ["n2", "n0", "n1"]


def test_records_are_those_of_the_epoch_that_was_asked_for(folder: Path) -> None:
    async def run() -> None:
        async with network_of(folder, OLDER) as network:
            for rank, name in enumerate(OLDER):
                await network.nodes[name].capture("a", 5, rank, [CHUNK] * 4)
            await protect(network, "a", 5, group_of(OLDER, "2+1"), epoch=1)
            await protect(network, "a", 5, group_of(NEWER, "2+1"), epoch=2)
            node = network.nodes["n0"]
            job = node.jobs["a"]
            means = Means(
                node.name, node.links, node.pipeline, make_codec, lambda _: node.fetch_own,
                node.metrics, node.store.commits,  # type: ignore[arg-type,return-value]
            )  # fmt: skip
            protection = NodeProtection(
                means, changed=lambda _: None, epoch=lambda: 2, traffic=lambda: (0, 0)
            )

            def asked(epoch: int) -> tuple[int, list[str], int]:
                found = protection.records(job, SNAPSHOT, ranks=set(), own_only=False, epoch=epoch)
                return found.epoch, list(found.nodes), len(found.placed)

            assert asked(1) == (1, OLDER, 3)
            assert asked(2) == (2, NEWER, 3)
            assert asked(0) == (2, NEWER, 3), "of the newest"
            assert asked(3) == (0, [], 1), "no such map here: its own record, and no rows"
            drop_protection(job, SNAPSHOT, below_epoch=2)
            assert asked(1) == (0, [], 1)
            assert asked(2) == (2, NEWER, 3)
            await protection.close()

    asyncio.run(run())
