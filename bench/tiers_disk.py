"""The node's own disk: what writing to it costs the training step, and how fast it is beside plain write and fsync.

    python bench/tiers_disk.py                        # both parts, a core is free
    python bench/tiers_disk.py steps --ranks 2        # both cores train

`flush`: a daemon keeps a snapshot on its disk as fast as it goes, against the same bytes from the same memory with
large `write` and fsync, in turns; and the CPU time of reading it again. `steps`: a training that captures every step;
steps while a snapshot is being written, at the default `tier.node_rate`, against steps while none is, in turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import Report, percentile, spread

CHUNK_NBYTES = 4 << 20
FLUSH_LIMIT = 1 / 0.70  # of the time of write and fsync
STEP_LIMIT = 1.05  # of a step while nothing is written
SCRUB_CPU_LIMIT = 1.0  # % of a core at RATE_MIN, on which all but huge disks are read again
SCRUB_S = 6.0


def flush(report: Report, args: argparse.Namespace) -> None:
    from snapd_proto import admin_pb2, trainer_pb2
    from tiers_flush import BigTrainer, cpu_s, floor_s

    from tests.support.daemon_process import daemon_folders

    samples: dict[str, list[float]] = {"floor_s": [], "flush_s": [], "cpu_s": []}
    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=args.tmp))
    (folder / "disk").mkdir()
    settings = {
        "SNAPD_TIER_NODE": str(folder / "disk"), "SNAPD_TIER_NODE_EVERY": "0", "SNAPD_TIER_NODE_RATE": "0",
        "SNAPD_TIER_NODE_KEEP": "1", "SNAPD_TIER_NODE_SCRUB": "0", "SNAPD_ARENA_SLOTS": "2",
        "SNAPD_ARENA_HEADROOM": "0", "SNAPD_ARENA_CHUNK_BYTES": str(CHUNK_NBYTES),
    }  # fmt: skip
    try:
        with daemon_folders(**settings) as node:
            node.start()
            assert node.process is not None
            trainer = BigTrainer(node.runtime)
            trainer.open(job="a", state_bytes_estimate=64 << 20, chunk_bytes=CHUNK_NBYTES, slots=2)
            request = trainer_pb2.ReserveRequest(
                session_id=trainer.session.session_id, state_bytes=args.nbytes
            )
            trainer.call("Reserve", request, timeout_s=300.0)
            trainer.fetch()
            for step in range(1, args.rounds + 2):  # the first does not count
                trainer.capture(step, 0, args.nbytes // CHUNK_NBYTES)
                wanted = admin_pb2.GetSnapshotRequest(job="a", has_step=True, step=step)
                record = node.admin("GetSnapshot", wanted).shards[0]
                floor = floor_s(trainer, record, folder / "floor") if step % 2 else 0.0
                cpu = cpu_s(node.process.pid)
                while not node.admin("Flush", admin_pb2.FlushRequest(job="a", timeout_s=10.0)).is_durable:
                    pass
                last = node.job("a").disk.last
                assert last.step == step
                spent_s = cpu_s(node.process.pid) - cpu
                floor = floor or floor_s(trainer, record, folder / "floor")
                if step > 1:
                    for key, value in {"floor_s": floor, "flush_s": last.seconds, "cpu_s": spent_s}.items():
                        samples[key].append(value)
            _scrub(report, node, args.nbytes)
    finally:
        shutil.rmtree(folder)
    ratios = [a / b for a, b in zip(samples["flush_s"], samples["floor_s"], strict=True)]
    rates = {
        key: spread([args.nbytes / 1e6 / each for each in samples[key]], 0) for key in ("flush_s", "floor_s")
    }
    print(
        f"node's disk: {rates['flush_s']} MB/s, write + fsync {rates['floor_s']} MB/s, CPU"
        f" {spread(samples['cpu_s'], 2)} s for {args.nbytes / 1e9:.2f} GB",
        flush=True,
    )
    report.claim(
        "node's disk / write + fsync", statistics.median(ratios), FLUSH_LIMIT, "x time", spread(ratios, 2)
    )
    report.samples["flush"] = samples


def _scrub(report: Report, node: Any, nbytes: int) -> None:
    """CPU time of reading again, as fast as is ever allowed where nothing bounds the rate: 64 MiB/s."""
    from tiers_flush import cpu_s

    node.kill()
    node.start(SNAPD_TIER_NODE_SCRUB="0.2")
    deadline = time.monotonic() + 60 + 3 * nbytes / (64 << 20)
    while not node.events("disk.scrubbed") and time.monotonic() < deadline:
        time.sleep(0.05)
    began, cpu, before = time.monotonic(), cpu_s(node.process.pid), len(node.events("disk.scrubbed"))
    while len(node.events("disk.scrubbed")) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    spent_s, seconds = cpu_s(node.process.pid) - cpu, time.monotonic() - began
    read = sum(event["read_nbytes"] for event in node.events("disk.scrubbed")[before:])
    share = 100 * spent_s / (read / (1 << 20))  # percent of a core at 1 MiB/s
    detail = f"read {read / 1e9:.2f} GB in {seconds:.1f} s, CPU {spent_s:.2f} s"
    report.claim("scrub at 1 MiB/s, CPU", share, SCRUB_CPU_LIMIT, "% core", detail)


# steps


def worker(args: argparse.Namespace) -> None:
    from snapd_client import Snapshotter
    from snapd_proto import admin_pb2
    from workload import Workload, now

    from tests.cluster.harness.asking import Asker

    work = Workload(args.size)
    snap = Snapshotter(work.state(), job="disk", interval=1, strict=True)
    snap.restore()
    asker = Asker(Path(os.environ["SNAPD_RUNTIME_DIR"]))

    def is_writing() -> bool:
        return any(job.disk.nbytes_total > 0 for job in asker.status("disk").jobs)

    def step() -> float:
        began = now()
        work.compute()
        work.update()
        snap.step(work.steps_done)
        return now() - began

    for _ in range(4):
        step()
    turns: list[dict[str, Any]] = []
    for turn in range(2 * args.turns):
        if turn % 2 == 0:
            if work.rank == 0:
                asker.ask("Flush", admin_pb2.FlushRequest(job="disk", timeout_s=0.0))
                time.sleep(0.05)
        elif work.rank == 0:
            while is_writing():
                time.sleep(0.05)
        work.barrier()
        for _ in range(args.steps):
            before = is_writing()
            seconds = step()
            turns.append({"seconds": seconds, "writing": before and is_writing(), "calm": not before})
    result = {"nbytes": work.nbytes(), "turns": turns, "skipped": snap.health()["skipped"]}
    publish(result)
    snap.close()
    asker.forget()


def steps(report: Report, args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=args.tmp))
    options = ["--tier-node", str(folder), "--tier-node-every", "0"]
    try:
        with daemon(*options) as node:
            own = [
                __file__,
                "--worker",
                "--size",
                args.size,
                "--turns",
                str(args.turns),
                "--steps",
                str(args.steps),
            ]
            results = run_worker(own, ranks=args.ranks, env=node.env())
    finally:
        shutil.rmtree(folder)
    turns = results[0]["turns"]
    busy = [turn["seconds"] for turn in turns if turn["writing"]]
    calm = [turn["seconds"] for turn in turns if turn["calm"] and not turn["writing"]]
    name = "both cores train" if args.ranks > 1 else "a core free"
    print(
        f"steps ({name}), state of {results[0]['nbytes'] / 1e9:.2f} GB a rank: {len(busy)} while a snapshot is written"
        f" {spread(busy)} s, p95 {percentile(busy, 0.95):.3f}; {len(calm)} while none is {spread(calm)} s, p95"
        f" {percentile(calm, 0.95):.3f}; {results[0]['skipped']} skipped",
        flush=True,
    )
    ratio = statistics.median(busy) / statistics.median(calm)
    report.claim(f"step while the disk is written ({name})", ratio, STEP_LIMIT, "x", "medians, in turns")
    report.samples[f"steps {args.ranks}"] = turns


PARTS = {"flush": flush, "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=7, help="of `flush`")
    parser.add_argument("--nbytes", type=int, default=1 << 30, help="the state of `flush`")
    parser.add_argument(
        "--turns", type=int, default=10, help="of `steps`: so many with a write, as many without"
    )
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--size", default="small", choices=["tiny", "small", "medium"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tmp", default=None, help="where the disk's folder is: a real disk")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return 0
    report = Report(
        "tiers_disk", {key: value for key, value in vars(args).items() if key not in ("tmp", "worker")}
    )
    for name in args.parts or PARTS:
        PARTS[name](report, args)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
