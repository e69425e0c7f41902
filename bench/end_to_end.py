"""What snapshots cost a whole run: blocks with and without them, in turn, in one process with real compute.

    python bench/end_to_end.py --size small --pairs 10

For interval I the run may take 1 + 1.3 x memcpy / (I x step) times as long; what is held against it is the
lower bound of the 95 % interval of the mean ratio (Student's t over the pairs' logarithms).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import Report, spread

T_975 = {7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 13: 2.160, 15: 2.131, 19: 2.093, 24: 2.064, 29: 2.045}
INTERVALS = (1, 5)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", choices=["tiny", "small", "medium"])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block", type=int, default=10, help="steps of a block; a multiple of 5")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(args: argparse.Namespace) -> None:
    from snapd_client import Snapshotter
    from workload import Memcpy, Workload, now

    work = Workload(args.size)
    memcpy = Memcpy(work)
    snap = Snapshotter(work.state(), job="e2e", interval=1, strict=True)
    snap.restore()

    def block(interval: int) -> float:
        """Seconds of one block, up to the last fence; interval 0: no snapshots."""
        start = now()
        for step in range(args.block):
            work.compute()
            work.update()
            if interval and (step + 1) % interval == 0:
                snap.step(work.steps_done)
        if interval:
            snap.fence()
        seconds = now() - start
        if interval:
            snap.wait("captured", timeout=60)
        return seconds

    block(1)
    pairs: dict[str, list[tuple[float, float]]] = {str(interval): [] for interval in INTERVALS}
    copies = [memcpy() for _ in range(4)][1:]
    for turn in range(args.pairs):
        for interval in INTERVALS:
            order = (0, interval) if turn % 2 == 0 else (interval, 0)
            times = {which: block(which) for which in order}
            pairs[str(interval)].append((times[0], times[interval]))
            copies.append(memcpy())
    publish(
        {
            "pairs": pairs,
            "memcpy": copies,
            "nbytes": work.nbytes(),
            "health_skipped": snap.health()["skipped"],
        }
    )
    snap.close()


def lower_bound(ratios: list[float]) -> tuple[float, float]:
    """(lower bound of the 95 % interval of the mean, the mean), both geometric."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    degrees = len(logs) - 1
    t = T_975[
        min((d for d in T_975 if d >= degrees), default=29)
    ]  # never a wider interval than the samples allow
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean)


def judge(report: Report, result: dict[str, Any], block: int) -> None:
    unit = statistics.median(result["memcpy"])
    calm = statistics.median(pair[0] / block for pairs in result["pairs"].values() for pair in pairs)
    print(f"{result['nbytes'] / 1e9:.2f} GB, step {calm:.3f} s, memcpy {spread(result['memcpy'])} s")
    for interval in INTERVALS:
        ratios = [with_ / without for without, with_ in result["pairs"][str(interval)]]
        low, mean = lower_bound(ratios)
        limit = 1 + 1.3 * unit / (interval * calm)
        report.claim(
            f"end to end, interval {interval}, lower bound",
            low,
            limit,
            "x",
            f"mean {mean:.3f}, {spread(ratios)}",
        )
    report.claim("snapshots skipped", result["health_skipped"], 0, "")


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    if args.pairs < 8 or args.block % 5:
        raise SystemExit("at least 8 pairs, and blocks of a multiple of 5 steps")
    report = Report("end_to_end", vars(args))
    with daemon() as node:
        options = ["--size", args.size, "--pairs", str(args.pairs), "--block", str(args.block), "--worker"]
        (result,) = run_worker([__file__, *options], env=node.env())
    judge(report, result, args.block)
    report.samples = result
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
