"""A snapshot out of S3 over a long line, against boto3's transfer manager on the same objects.

    python bench/tiers_far.py --delays-ms 0,20,50 --rounds 5
    python bench/tiers_far.py --rounds 0 --memory-nbytes 1073741824 --memory-concurrency 32

SeaweedFS on loopback, behind a relay that keeps every byte for so long, each way; what comes lies in memory that is
backed already. snapd lists, opens, reads, verifies; boto3 is given the names and reads. As many requests in flight.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import Report, spread
from tiers_restore import CHUNK_NBYTES, Memory, daemon_memory, read_snapd, write_into

from tests.support.seaweed import BUCKET, Seaweed, running

CONCURRENCY = 4  # as tier.concurrency; a restore has twice as many requests in flight
DOWN_LIMIT = 1 / 0.8


@contextmanager
def relayed(server: Seaweed, delay_s: float) -> Iterator[str]:
    """The server's endpoint, so far away."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).resolve().parent / "delaying.py"
    command = [sys.executable, str(script), str(port), str(server.port), str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as relay:
        try:
            assert relay.stdout is not None and relay.stdout.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            relay.kill()


class _Sink:
    """Where boto3 writes: at the place of the pack in memory."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def seek(self, at: int) -> None:
        self._at = at

    def seekable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self._view[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)


def read_boto3(client: Any, keys: list[tuple[str, int]], memory: Memory) -> float:
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(max_concurrency=2 * CONCURRENCY, preferred_transfer_client="classic")
    began, at = time.perf_counter(), 0
    for key, nbytes in keys:
        client.download_fileobj(BUCKET, key, _Sink(memory.view[at : at + nbytes]), Config=config)
        at += nbytes
    return time.perf_counter() - began


def compare(
    report: Report, server: Seaweed, endpoint: str, delay_ms: float, nbytes: int, rounds: int
) -> None:
    import boto3.session
    from botocore.config import Config

    store = server.store("far", endpoint=endpoint, concurrency=CONCURRENCY)
    style = Config(s3={"addressing_style": "path"}, max_pool_connections=4 * CONCURRENCY)
    client = boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", config=style
    )
    keys = [(f"far/{info.key}", info.nbytes) for info in store.list("jobs/a/packs/")]
    memory = Memory(nbytes + 16 * CHUNK_NBYTES)
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(rounds + 1):
        found = read_snapd(store, memory, 2 * CONCURRENCY), read_boto3(client, keys, memory)
        if number:  # the first makes connections
            ours.append(found[0])
            theirs.append(found[1])
    for name, seconds in (("snapd", ours), ("boto3", theirs)):
        print(
            f"{delay_ms:g} ms each way: {name}: {spread([nbytes / 1e6 / s for s in seconds], 0)} MB/s",
            flush=True,
        )
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    name = f"S3 restore, {2 * delay_ms:g} ms a round / boto3"
    report.claim(name, statistics.median(ratios), DOWN_LIMIT, "x time", spread(ratios, 2))
    report.samples[name] = {"snapd": ours, "boto3": theirs}
    store.close()


def show_memory(server: Seaweed, nbytes: int, concurrency: int) -> None:
    """What a daemon takes beside its arena while it fills that, raw and compressed."""
    for mode in ("off", "always"):
        store = server.store(mode)
        write_into(store, nbytes, mode)
        store.close()
        settings = {"SNAPD_TIER_ENDPOINT": server.endpoint, "SNAPD_TIER_CONCURRENCY": str(concurrency)}
        seconds, peak_mb = daemon_memory(f"s3://{BUCKET}/{mode}", **settings)
        print(f"daemon fills its arena, {mode}: {seconds:.2f} s, at most {peak_mb:.0f} MB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nbytes", type=int, default=256 << 20)
    parser.add_argument("--delays-ms", default="0,20,50", help="each way, separated by commas")
    parser.add_argument(
        "--memory-nbytes", type=int, default=0, help="also fill a daemon's arena with so many"
    )
    parser.add_argument(
        "--memory-concurrency", type=int, default=CONCURRENCY, help="tier.concurrency of that daemon"
    )
    args = parser.parse_args()
    report = Report("tiers_far", vars(args))
    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir="/dev/shm"))
    try:
        with running(folder) as server:
            os.environ.update(server.environment())
            if args.rounds:
                near = server.store("far", concurrency=CONCURRENCY)
                write_into(near, args.nbytes, "off")
                near.close()
            for delay_ms in map(float, args.delays_ms.split(",") if args.rounds else ()):
                with relayed(server, delay_ms / 1e3) as endpoint:
                    compare(report, server, endpoint, delay_ms, args.nbytes, args.rounds)
            if args.memory_nbytes:
                show_memory(server, args.memory_nbytes, args.memory_concurrency)
    finally:
        shutil.rmtree(folder)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
