"""Part `flush` of tiers.py: a whole daemon flushes a state to a directory, against the same bytes with large `write`
and fsync, raw, `auto` and `always`; DCP and safetensors saves of as many bytes beside the raw one; and what memory the
daemon takes beside the arena meanwhile.

Also a program of its own: python bench/tiers_flush.py --nbytes 4294967296 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import Report, spread
from snapd_proto import admin_pb2, format_pb2, trainer_pb2

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer

CHUNK_NBYTES = 4 << 20
PIECE_NBYTES = 64 << 20
RAW_LIMIT = 1 / 0.70  # of the time of write and fsync
AUTO_LIMIT = 1.10  # of the time of raw: the same, within what this measures
MEMORY_LIMIT_MB = 256.0
MODES = ("off", "auto", "always")


class Floats:
    """Chunks that look like a training state: float32 around 0, each chunk another part of one noise."""

    def __init__(self, seed: int) -> None:
        self._noise = np.random.default_rng(seed).standard_normal(2 * CHUNK_NBYTES // 4, dtype=np.float32)

    def chunk(self, step: int, index: int) -> bytes:
        start = (step * 7919 + index * 613) % (CHUNK_NBYTES // 4)
        part = self._noise[start : start + CHUNK_NBYTES // 4].copy()
        part[:4] = (step, index, step + index, step * 31 + index)
        return part.tobytes()


class BigTrainer(FakeTrainer):
    """One rank with a state of `chunk_count` chunks, all of which change at each step."""

    floats = Floats(1)

    def layout(self) -> bytes:
        assert self.page is not None
        return big_layout(self.job, self.page.chunk_bytes, self.count)

    def chunks(self, step: int, seed: int, chunk_count: int) -> Iterator[bytes]:  # type: ignore[override]
        self.count = chunk_count
        yield self.layout()
        yield format_pb2.EarlyValues(step=step).SerializeToString()
        for index in range(2, chunk_count):
            yield self.floats.chunk(step, index)


def big_layout(job: str, chunk_bytes: int, count: int) -> bytes:
    nbytes = (count - 2) * chunk_bytes
    layout = format_pb2.ShardLayout(
        format_version=1, job=job, rank=0, world_size=1, chunk_bytes=chunk_bytes, client_version="bench",
        early_values_offset=chunk_bytes, early_values_capacity=chunk_bytes,
    )  # fmt: skip
    layout.regions.add(shard_offset=2 * chunk_bytes, nbytes=nbytes, when=format_pb2.Region.LAZY)
    layout.tensors.add(name="w", dtype="float32", shape=[nbytes // 4], strides=[1], nbytes=nbytes)
    return layout.SerializeToString()


class MemoryWatch:
    """The most that a process took outside of mapped files, in bytes, and its CPU seconds."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self.peak = self.first = self._anonymous()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _anonymous(self) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self._anonymous())

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def floor_s(trainer: FakeTrainer, record: format_pb2.ShardRecord, folder: Path) -> float:
    """The same bytes from the same memory, in files of 64 MiB, each synced."""
    folder.mkdir()
    views = [
        trainer.segments[chunk.segment].view(chunk.frame * record.chunk_bytes, chunk.nbytes)
        for chunk in record.chunks
    ]
    per_file = PIECE_NBYTES // CHUNK_NBYTES
    began = time.perf_counter()
    for number, first in enumerate(range(0, len(views), per_file)):
        with open(folder / str(number), "xb", buffering=0) as file:
            for view in views[first : first + per_file]:
                file.write(view)
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def flushed(daemon: DaemonProcess, step: int) -> admin_pb2.FlushedPart:
    """Flush the newest snapshot; how it went."""
    while not daemon.admin("Flush", admin_pb2.FlushRequest(job="a", timeout_s=10.0)).is_durable:
        pass
    last = daemon.job("a").flush.last
    assert last.step == step
    return last


def one_mode(mode: str, nbytes: int, rounds: int, tmp: str | None) -> dict[str, list[float]]:
    """Each round: capture, the floor, the flush. Gives the samples."""
    found: dict[str, list[float]] = {
        key: [] for key in ("floor_s", "flush_s", "cpu_s", "stored", "memory_mb", "requests_per_gb")
    }
    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=tmp))
    tier = folder / "tier"
    tier.mkdir()
    saves = peer_saves(folder, nbytes) if mode == "off" and rounds else {}
    count = nbytes // CHUNK_NBYTES
    settings = {
        "SNAPD_TIER_SHARED": str(tier), "SNAPD_TIER_EVERY": "0", "SNAPD_TIER_RATE": "0",
        "SNAPD_TIER_COMPRESSION": mode, "SNAPD_ARENA_SLOTS": "2", "SNAPD_ARENA_HEADROOM": "0",
        "SNAPD_ARENA_CHUNK_BYTES": str(CHUNK_NBYTES),
    }  # fmt: skip
    try:
        with daemon_folders(**settings) as daemon:
            daemon.start()
            assert daemon.process is not None
            trainer = BigTrainer(daemon.runtime)
            trainer.open(job="a", state_bytes_estimate=PIECE_NBYTES, chunk_bytes=CHUNK_NBYTES, slots=2)
            # a single snapshot may take the room of both slots
            state_bytes = nbytes if rounds else nbytes // 2 + CHUNK_NBYTES
            reserve = trainer_pb2.ReserveRequest(
                session_id=trainer.session.session_id, state_bytes=state_bytes
            )
            trainer.call("Reserve", reserve, timeout_s=300.0)
            trainer.fetch()
            for step in range(1, rounds + 2):  # the first does not count: the store is opened, pages are met
                trainer.capture(step, 0, count)
                request = admin_pb2.GetSnapshotRequest(job="a", has_step=True, step=step)
                record = daemon.admin("GetSnapshot", request).shards[0]
                is_floor_first = bool(step % 2)
                floor = floor_s(trainer, record, folder / "floor") if is_floor_first else 0.0
                watch, cpu = MemoryWatch(daemon.process.pid), cpu_s(daemon.process.pid)
                part = flushed(daemon, step)
                watch.close()
                spent_cpu_s = cpu_s(daemon.process.pid) - cpu
                floor = floor or floor_s(trainer, record, folder / "floor")
                for path in (tier / "jobs/a/packs").iterdir():
                    path.unlink()  # nobody reads them, and the disk is small
                if step == 1 and rounds > 0:
                    continue
                for key, value in {
                    "floor_s": floor,
                    "flush_s": part.seconds,
                    "cpu_s": spent_cpu_s,
                    "stored": part.stored_nbytes / part.written_nbytes,
                    "memory_mb": watch.peak / 1e6,
                    "requests_per_gb": part.requests_per_gb,
                    **{name: save() for name, save in saves.items()},
                }.items():
                    found.setdefault(key, []).append(value)
    finally:
        shutil.rmtree(folder)
    return found


def peer_saves(folder: Path, nbytes: int) -> dict[str, Callable[[], float]]:
    """What others take for as many bytes; each is done once before."""
    from tiers_peers import Peers

    saves = Peers(folder / "peers", nbytes).saves()
    for save in saves.values():
        save()
    return saves


def flush(
    report: Report,
    *,
    rounds: int,
    nbytes: int = 1 << 30,
    tmp: str | None = None,
    modes: Sequence[str] = MODES,
) -> None:
    samples = {mode: one_mode(mode, nbytes, rounds, tmp) for mode in modes}
    for mode, found in samples.items():
        rates = [nbytes / 1e6 / each for each in found["flush_s"]]
        floors = [nbytes / 1e6 / each for each in found["floor_s"]]
        print(
            f"flush, compression {mode}: {spread(rates, 0)} MB/s, write + fsync {spread(floors, 0)} MB/s, stored"
            f" {statistics.median(found['stored']):.3f} of raw, CPU {spread(found['cpu_s'], 2)} s, beside the arena at"
            f" most {max(found['memory_mb']):.0f} MB, {statistics.median(found['requests_per_gb']):.1f} requests/GB",
            flush=True,
        )
        for name in (key for key in found if key.endswith(" save")):
            print(
                f"{name}, synced: {spread([nbytes / 1e6 / each for each in found[name]], 0)} MB/s", flush=True
            )
        report.samples[f"flush {mode}"] = found
    memory = max(max(found["memory_mb"]) for found in samples.values())
    report.claim("daemon beside the arena", memory, MEMORY_LIMIT_MB, "MB", f"state of {nbytes / 1e9:.1f} GB")
    if not {"off", "auto"} <= set(samples):
        return
    raw = [
        ours / floor for ours, floor in zip(samples["off"]["flush_s"], samples["off"]["floor_s"], strict=True)
    ]
    report.claim(
        "directory flush, raw / write + fsync", statistics.median(raw), RAW_LIMIT, "x time", spread(raw, 2)
    )
    ratio = statistics.median(samples["auto"]["flush_s"]) / statistics.median(samples["off"]["flush_s"])
    report.claim("directory flush, auto / raw", ratio, AUTO_LIMIT, "x time", "medians of both")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="0: one flush of each mode, in half the memory")
    parser.add_argument("--nbytes", type=int, default=1 << 30)
    parser.add_argument("--tmp", default=None)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    report = Report("tiers_flush", {"rounds": args.rounds, "nbytes": args.nbytes})
    flush(report, rounds=args.rounds, nbytes=args.nbytes, tmp=args.tmp, modes=args.modes)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
