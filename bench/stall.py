"""Stall, stall + tax, CPU time and window of warm snapshots; the first snapshot.

    python bench/stall.py --size medium --snapshots 200              # a core is free
    python bench/stall.py --size medium --snapshots 60 --ranks 2     # both cores train

Each turn: a memcpy of the state every few turns, `snap.step` at a step's end, a step that overlaps with
the copy, a calm step. Stall = the call of `snap.step` + an explicit fence right before the update. Tax =
overlapped step - calm step, beyond the stall. Everything is also given in memcpys of the rank's bytes,
measured in the same turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import Report, percentile, spread

MEMCPY_EVERY = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="medium", choices=["tiny", "small", "medium"])
    parser.add_argument("--snapshots", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(args: argparse.Namespace) -> None:
    from node import Asker
    from snapd_client import Snapshotter
    from workload import Memcpy, Workload, cpu_seconds, now, thread_cpu_seconds

    work = Workload(args.size)
    memcpy = Memcpy(work)
    work.step()
    began = now()
    snap = Snapshotter(work.state(), job="stall", interval=1, strict=True)
    snap.restore()
    opened = now() - began
    asker = Asker(Path(os.environ["SNAPD_RUNTIME_DIR"]))

    def overlapped() -> tuple[float, float]:
        """A step that fences explicitly: (its seconds, the fence's)."""
        start = now()
        work.compute()
        at_fence = now()
        snap.fence()
        fence = now() - at_fence
        work.update()
        return now() - start, fence

    result: dict[str, Any] = {"nbytes": work.nbytes(), "parameters": work.parameter_count(), "open_s": opened}
    turns: list[dict[str, float]] = []
    copies = [memcpy() for _ in range(4)][1:]
    cpu: list[float] = []
    for turn in range(args.snapshots + 1):
        if turn % MEMCPY_EVERY == 1:
            copies.append(memcpy())
        if turn == 1:
            cpu.append(thread_cpu_seconds("snapd-") + cpu_seconds(args.worker))
        start = now()
        snap.step(work.steps_done)
        call = now() - start
        step, fence = overlapped()
        snap.wait("captured", timeout=60)
        calm = work.step()
        window = 0.0
        for job in asker.status("stall").jobs:
            for session in job.sessions:
                if session.rank == work.rank:
                    window = session.last_window_s
        turns.append({"call": call, "fence": fence, "step": step, "calm": calm, "window": window})
    cpu.append(thread_cpu_seconds("snapd-") + cpu_seconds(args.worker))
    health = snap.health()
    result |= {"turns": turns, "memcpy": copies, "cpu_s": (cpu[1] - cpu[0]) / args.snapshots}
    result["health"] = {key: value for key, value in health.items() if not isinstance(value, list)}
    publish(result)
    snap.close()
    asker.forget()


def judge(report: Report, results: list[dict[str, Any]], ranks: int) -> None:
    busy = ranks > 1
    unit = statistics.median(c for result in results for c in result["memcpy"])
    first = max(result["turns"][0]["call"] + result["turns"][0]["fence"] for result in results)
    warm = [turn for result in results for turn in result["turns"][1:]]
    stalls = [(turn["call"] + turn["fence"]) / unit for turn in warm]
    taxed = [(turn["call"] + turn["step"] - turn["calm"]) / unit for turn in warm]
    windows = [turn["window"] / unit for turn in warm if turn["window"] > 0]
    failed = sum(result["health"]["skipped"] + result["health"]["discarded"] for result in results)
    copies = [seconds for result in results for seconds in result["memcpy"]]
    print(
        f"{results[0]['parameters'] / 1e6:.0f} M parameters, {results[0]['nbytes'] / 1e9:.2f} GB a rank, "
        f"{ranks} rank(s), {len(warm)} warm snapshots, {failed} skipped or discarded; "
        f"memcpy {spread(copies)} s, calm step {spread([t['calm'] for t in warm])} s"
    )
    name = "both cores busy" if busy else "a core free"
    report.claim(
        f"stall, median ({name})",
        statistics.median(stalls),
        1.1 if busy else 0.02,
        "memcpy",
        spread(stalls, 4),
    )
    report.claim(f"stall, p99 ({name})", percentile(stalls, 0.99), 2.2 if busy else 0.15, "memcpy")
    report.claim(f"first snapshot's stall ({name})", first / unit, 0.10, "memcpy")
    report.claim(
        f"stall + tax, median ({name})",
        statistics.median(taxed),
        1.5 if busy else 1.0,
        "memcpy",
        spread(taxed),
    )
    cpu = statistics.fmean(result["cpu_s"] for result in results) / unit
    if not busy:  # with several ranks the daemon's time is in every rank's figure
        report.claim(f"CPU of client threads and daemon ({name})", cpu, 2.0, "memcpy")
        report.claim(
            f"window until captured ({name})", statistics.median(windows), 1.5, "memcpy", spread(windows)
        )
    else:
        print(f"window until captured: {spread(windows)} memcpy")
    report.claim("snapshots skipped or discarded", failed, 0, "")


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    report = Report("stall", vars(args))
    with daemon() as node:
        options = ["--size", args.size, "--snapshots", str(args.snapshots), "--worker", str(node.pid)]
        results = run_worker([__file__, *options], ranks=args.ranks, env=node.env())
    judge(report, results, args.ranks)
    report.samples = {"results": results}
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
