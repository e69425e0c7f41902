"""A daemon's cluster state as a process of its own: prints a JSON line whenever something changes. Killed by tests.

Arguments: endpoint, node, highwater file.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from snapd.coordination.etcd_kv import EtcdKeyValue
from snapd.coordination.highwater import HighwaterFile
from snapd.coordination.settings import ClusterSettings
from tests.support.clusters import ASKED, Cluster, member


async def main(endpoint: str, node: str, file: Path) -> None:
    settings = ClusterSettings(asked=ASKED, lease_s=2.0, lost_after_s=2.0)
    cluster = Cluster(lambda _: EtcdKeyValue([endpoint], timeout_s=1.0), settings)
    daemon = cluster.start(member(node), HighwaterFile(file))
    state, serial = daemon.state, 0
    while True:
        serial = await state.changed(serial, 0.2)
        groups = state.table.groups if state.table else ()
        facts = {
            "planner": state.is_planner,
            "epoch": state.token.epoch if state.token else 0,
            "nodes": [name for group in groups for name in group.nodes],
            "away": bool(state.away),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
