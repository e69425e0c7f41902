"""Part `restore` of tiers.py: a snapshot of a directory tier into memory, against reading the same bytes; DCP load and
safetensors of the same state beside it; and what memory the daemon takes beside the arena.

Also a program of its own: python bench/tiers_restore.py --nbytes 1073741824 --rounds 5

All take turns in one run and find their files in the page cache (each was read once before). Destinations are memory
that is backed already: shared memory for snapd and the floors, as the arena is; for the others tensors that have been
written to. CPU seconds are told beside the time: on a machine that does other work, too, they say more.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import Report, spread
from snapd_proto import admin_pb2, format_pb2
from tiers_flush import CHUNK_NBYTES, Floats, MemoryWatch

from snapd.store.base import Store
from snapd.tier.reading import Opened, TierReader
from snapd.tier.streaming import THREADS, ReadPool
from tests.support.daemon_process import daemon_folders
from tests.support.flush_scene import ON_DEMAND
from tests.support.shard_builder import ShardBuilder
from tests.support.stored_snapshot import TierWriter, directory_store

PIECE_NBYTES = 8 << 20
FLOOR_SHARE = 0.70
MEMORY_LIMIT_MB = 256.0


class Memory:
    """Backed shared memory, cut into chunks."""

    def __init__(self, nbytes: int) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="snapd-bench-") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.view = memoryview(self._map)

    def chunk(self, index: int, nbytes: int) -> memoryview:
        return self.view[index * CHUNK_NBYTES : index * CHUNK_NBYTES + nbytes]


def write_state(root: Path, nbytes: int, mode: str) -> None:
    """One rank with one tensor of `nbytes`, in a tier below `root`."""
    write_into(directory_store(root), nbytes, mode)


def write_into(store: Store, nbytes: int, mode: str) -> None:
    """The same, in a store."""
    floats = Floats(1)
    builder = ShardBuilder(job="a", generation=1, step=1, chunk_bytes=CHUNK_NBYTES)
    small = builder.build()  # the layout's form; the tensor's bytes are streamed
    chunks: dict[int, bytes] = {i: small.chunk(i) for i in range(len(small.record.chunks))}
    record = small.record
    for index in range(len(chunks), len(chunks) + nbytes // CHUNK_NBYTES):
        chunks[index] = b""  # made when it is asked for
        record.chunks.add(nbytes=CHUNK_NBYTES, segment=0, frame=index, segment_rank=0)
    lazy = _Chunks(chunks, floats, record)
    lazy.finish()
    TierWriter(store, job="a", mode=mode).write([(record, lazy)])


class _Chunks(dict[int, bytes]):
    def __init__(self, small: dict[int, bytes], floats: Floats, record: format_pb2.ShardRecord) -> None:
        super().__init__(small)
        self._floats, self._record = floats, record

    def __getitem__(self, index: int) -> bytes:
        return super().__getitem__(index) or self._floats.chunk(1, index)

    def finish(self) -> None:
        import xxhash

        for index, chunk in enumerate(self._record.chunks):
            if not chunk.xxh3_128:
                chunk.xxh3_128 = xxhash.xxh3_128_digest(self[index])
        self._record.shard_xxh3_128 = xxhash.xxh3_128_digest(
            b"".join(c.xxh3_128 for c in self._record.chunks)
        )


def read_floor(paths: Sequence[Path], memory: Memory, threads: int) -> float:
    """Seconds to read all bytes of these files into the memory, in pieces of 8 MiB."""
    places: list[tuple[Path, int, int]] = []
    at = 0
    for path in paths:
        for offset in range(0, path.stat().st_size, PIECE_NBYTES):
            count = min(PIECE_NBYTES, path.stat().st_size - offset)
            places.append((path, offset, at % (memory.view.nbytes - PIECE_NBYTES)))
            at += count

    def read(place: tuple[Path, int, int]) -> None:
        path, offset, target = place
        descriptor = os.open(path, os.O_RDONLY)
        os.preadv(descriptor, [memory.view[target : target + PIECE_NBYTES]], offset)
        os.close(descriptor)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, places))
    return time.perf_counter() - began


def read_snapd(store: Store, memory: Memory, threads: int = THREADS) -> float:
    """Seconds from the listing to the last verified byte."""
    pool = ReadPool(threads=threads)
    began = time.perf_counter()
    reader = TierReader(store, "a", pool)
    opened = reader.open(reader.candidates()[0], None)
    assert isinstance(opened, Opened)
    shard = opened.shards[0]
    misses = reader.read(shard, range(len(shard.chunks)), lambda i: memory.chunk(i, shard.chunks[i].nbytes))
    seconds = time.perf_counter() - began
    pool.close()
    assert not misses
    return seconds


def others(folder: Path, nbytes: int) -> dict[str, Callable[[], float]]:
    """DCP and safetensors of the same number of bytes, each into tensors that are there."""
    from tiers_peers import Peers

    peers = Peers(folder / "peers", nbytes)
    for save in peers.saves().values():
        save()
    return peers.loads()


def daemon_memory(tier: str, **settings: str) -> tuple[float, float]:
    """(seconds, most MB beside the arena) of a whole daemon that fills its arena from the tier."""
    settings = {**ON_DEMAND, "SNAPD_TIER_SHARED": tier, "SNAPD_ARENA_HEADROOM": "0", **settings}
    with daemon_folders(**settings) as daemon:
        daemon.start()
        assert daemon.process is not None
        watch = MemoryWatch(daemon.process.pid)
        began = time.perf_counter()
        list(_fill(daemon))
        seconds = time.perf_counter() - began
        watch.close()
        return seconds, watch.peak / 1e6


def _fill(daemon: object) -> Iterator[admin_pb2.FillArenaProgress]:
    from snapd.rpc.local_client import LocalClient

    with LocalClient(daemon.runtime) as client:  # type: ignore[attr-defined]
        yield from client.fill_arena(admin_pb2.FillArenaRequest(job="a"))


def restore(
    report: Report, *, rounds: int, nbytes: int, tmp: str | None = None, with_others: bool = True
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=tmp))
    try:
        roots = {mode: folder / mode for mode in ("off", "always")}
        for mode, root in roots.items():
            write_state(root, nbytes, mode)
        memory = Memory(nbytes + 16 * CHUNK_NBYTES)
        packs = {mode: sorted((root / "jobs/a/packs").iterdir()) for mode, root in roots.items()}
        runs: dict[str, Callable[[], float]] = {
            "read, one thread": lambda: read_floor(packs["off"], memory, 1),
            f"read, {THREADS} threads": lambda: read_floor(packs["off"], memory, THREADS),
            "snapd, raw": lambda: read_snapd(directory_store(roots["off"]), memory),
            "snapd, compressed": lambda: read_snapd(directory_store(roots["always"]), memory),
        }
        if with_others:
            runs |= others(folder, nbytes)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                before = time.process_time()
                seconds = run()
                if number:
                    samples[name].append(seconds)
                    cpu[name].append(time.process_time() - before)
        _tell(report, samples, cpu, nbytes, packs)
        report.samples["restore"] = samples
        report.samples["restore, CPU"] = cpu
    finally:
        shutil.rmtree(folder)


def _tell(
    report: Report,
    samples: dict[str, list[float]],
    cpu: dict[str, list[float]],
    nbytes: int,
    packs: dict[str, list[Path]],
) -> None:
    for name, found in samples.items():
        spent = spread([each / (nbytes / 1e9) for each in cpu[name]], 3)
        print(
            f"{name}: {spread([nbytes / 1e9 / each for each in found], 2)} GB/s, CPU {spent} s/GB", flush=True
        )
    stored = sum(path.stat().st_size for path in packs["always"]) / sum(
        p.stat().st_size for p in packs["off"]
    )
    print(f"stored compressed: {stored:.3f} of raw; page cache: warm for all")
    for what, found in (("time", samples), ("CPU", cpu)):
        for floor in [name for name in found if name.startswith("read, ")]:
            pairs = zip(found["snapd, raw"], found[floor], strict=True)
            ratio = statistics.median(ours / base for ours, base in pairs)
            name = f"directory restore, raw / {floor}, {what}"
            report.claim(name, ratio, 1 / FLOOR_SHARE, "x", "page cache warm")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nbytes", type=int, default=1 << 30)
    parser.add_argument(
        "--memory-nbytes", type=int, default=0, help="also fill a daemon's arena with so many"
    )
    parser.add_argument("--tmp", default=None, help="where files go (default: the temporary folder)")
    args = parser.parse_args()
    report = Report("tiers_restore", {"rounds": args.rounds, "nbytes": args.nbytes})
    if args.rounds:
        restore(report, rounds=args.rounds, nbytes=args.nbytes, tmp=args.tmp)
    if args.memory_nbytes:
        folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=args.tmp))
        try:
            for mode in ("off", "always"):
                write_state(folder / mode, args.memory_nbytes, mode)
                seconds, peak_mb = daemon_memory(str(folder / mode))
                rate = args.memory_nbytes / 1e9 / seconds
                print(
                    f"daemon fills its arena, {mode}: {seconds:.2f} s, {rate:.2f} GB/s, at most {peak_mb:.0f} MB"
                )
                detail = f"shard of {args.memory_nbytes / 1e9:.1f} GB, compression {mode}"
                report.claim(f"daemon beside the arena, {mode}", peak_mb, MEMORY_LIMIT_MB, "MB", detail)
                shutil.rmtree(folder / mode)
        finally:
            shutil.rmtree(folder)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
