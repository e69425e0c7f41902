"""The comparison for protection and rebuild: chunks pulled from other nodes' daemons through the same transport, hashed
on arrival as a rebuild does, with no coding. Runs in a node's network namespace, under that node's certificate.

Reads one JSON order from standard input, prints one JSON result.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import xxhash

from snapd.core.cluster import Token
from snapd.peer.asking import Asking
from snapd.peer.base import ChunkName
from snapd.peer.identity import Identity
from snapd.peer.limits import PeerLimits
from snapd.peer.links import PeerLinks
from snapd.peer.side_channel import dial_socket
from snapd.peer.trust import Trust, TrustFiles

BATCH = 8
TIMEOUT_S = 60.0


def log_once(key: str, event: str, **fields: object) -> None:
    print(event, fields, file=sys.stderr)


def make_links(order: dict[str, Any]) -> PeerLinks:
    trust = None
    if order["certificate"]:
        files = TrustFiles(Path(order["certificate"]), Path(order["key"]), Path(order["ca"]))
        trust = Trust(order["node"], files, clock=time.monotonic, log_once=log_once)
    identity = Identity(order["node"], Token(order["cluster_id"], order["epoch"]))
    asking = Asking(identity=lambda: identity, clock=time.monotonic)
    return PeerLinks(order["addresses"].__getitem__, dial_socket(trust, stall_s=PeerLimits().stall_s), asking)


def pull(links: PeerLinks, peer: str, names: list[tuple[ChunkName, int]], bad: list[ChunkName]) -> None:
    """All chunks from one peer, a few at a time into the same buffers."""
    link = links.to(peer)
    buffers = [memoryview(bytearray(max(nbytes for _, nbytes in names))) for _ in range(BATCH)]
    for first in range(0, len(names), BATCH):
        part = names[first : first + BATCH]
        wanted = [(name, view[:nbytes]) for (name, nbytes), view in zip(part, buffers, strict=False)]
        digests = link.fetch(wanted, timeout_s=TIMEOUT_S)
        for (name, view), digest in zip(wanted, digests, strict=True):
            if xxhash.xxh3_128_digest(view) != digest:
                bad.append(name)


def main() -> int:
    order = json.load(sys.stdin)
    links = make_links(order)
    bad: list[ChunkName] = []
    work: dict[str, list[tuple[ChunkName, int]]] = {}
    for job, generation, step, rank, index, nbytes, peer in order["chunks"]:
        work.setdefault(peer, []).append((ChunkName(job, generation, step, rank, index), nbytes))
    began, cpu = time.monotonic(), _cpu_s()
    threads = [threading.Thread(target=pull, args=(links, peer, names, bad)) for peer, names in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    nbytes = sum(size for names in work.values() for _, size in names)
    seconds, used_s = time.monotonic() - began, _cpu_s() - cpu
    links.close()
    print(json.dumps({"nbytes": nbytes, "seconds": seconds, "cpu_s": used_s, "bad": len(bad)}))
    return 1 if bad else 0


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
