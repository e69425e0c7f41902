"""Memory: the arena against the state, anonymous memory of the trainer, a thousand snapshots that leak none.

python bench/memory.py                  # 124 M parameters for the sizes, 0.5 M for the leak test
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import Report

MB = 1e6
FLAT_MB = 2.0  # what an allocator may keep back
SIZES_SNAPSHOTS = 12


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="medium", choices=["tiny", "small", "medium"])
    parser.add_argument("--snapshots", type=int, default=1000, help="of the leak test")
    parser.add_argument("--leak-size", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--worker", choices=["sizes", "leak"], help=argparse.SUPPRESS)
    parser.add_argument("--daemon", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _job_status(job: str) -> Any:
    from node import Asker

    asker = Asker(Path(os.environ["SNAPD_RUNTIME_DIR"]))
    try:
        return next(found for found in asker.status(job).jobs if found.job == job)
    finally:
        asker.forget()


def sizes(args: argparse.Namespace) -> None:
    from snapd_client import Snapshotter
    from workload import Workload, anonymous_bytes

    work = Workload(args.size)

    def peak(hand_over: Callable[[int], object], fence: Callable[[], object]) -> int:
        """The most anonymous memory over some steps, seen after each hand-over and after each update."""
        most = 0
        for _ in range(SIZES_SNAPSHOTS):
            hand_over(work.steps_done)
            most = max(most, anonymous_bytes())
            work.compute()
            fence()
            work.update()
            most = max(most, anonymous_bytes())
        return most

    peak(lambda step: None, lambda: None)  # the allocator gets its share
    before = peak(lambda step: None, lambda: None)
    snap = Snapshotter(work.state(), job="sizes", strict=True)
    snap.restore()
    with_snapshots = peak(snap.step, snap.fence)
    snap.wait("captured")
    status = _job_status("sizes")
    publish({
        "state": work.nbytes(), "arena": status.arena_bytes, "arena_in_use": status.arena_bytes_in_use,
        "anonymous_before": before, "anonymous_after": anonymous_bytes(), "anonymous_peak": with_snapshots,
    })  # fmt: skip
    snap.close()


def leak(args: argparse.Namespace) -> None:
    from snapd_client import Snapshotter
    from workload import Workload, anonymous_bytes

    work = Workload(args.leak_size)
    snap = Snapshotter(work.state(), job="leak", strict=True)
    snap.restore()
    rows = []
    for turn in range(1, args.snapshots + 1):
        work.step()
        snap.step(work.steps_done)
        if turn % 50 == 0:
            snap.wait("captured")
            session = _job_status("leak").sessions[0]
            rows.append({
                "snapshot": turn, "trainer": anonymous_bytes(), "daemon": anonymous_bytes(args.daemon),
                "chunks": session.chunks_in_use, "fds": len(os.listdir("/proc/self/fd")),
                "daemon_fds": len(os.listdir(f"/proc/{args.daemon}/fd")),
            })  # fmt: skip
    health = snap.health()
    publish({"rows": rows, "committed": health["committed"], "skipped": health["skipped"]})
    snap.close()


def judge(report: Report, sized: dict[str, Any], leaked: dict[str, Any], wanted: int) -> None:
    report.claim("arena, two slots", sized["arena"] / sized["state"], 2.05, "x state")
    more = (sized["anonymous_peak"] - sized["anonymous_before"]) / MB
    report.claim("anonymous memory more in the trainer, peak", more, 64.0, "MB")
    rows = leaked["rows"]
    late = rows[len(rows) // 4 :]  # the first quarter fills the caches of allocators and of gRPC
    for side in ("trainer", "daemon"):
        growth = (late[-1][side] - late[0][side]) / MB
        report.claim(
            f"growth of the {side} over {late[-1]['snapshot'] - late[0]['snapshot']} snapshots",
            growth,
            FLAT_MB,
            "MB",
        )
    report.claim("growth of chunks in use", late[-1]["chunks"] - late[0]["chunks"], 0, "")
    for what in ("fds", "daemon_fds"):  # the question itself opens and closes two
        report.claim(f"growth of {what}", late[-1][what] - late[0][what], 2, "")
    report.claim("snapshots not taken", wanted - leaked["committed"], 0, "")


def main() -> int:
    args = arguments()
    if args.worker:
        sizes(args) if args.worker == "sizes" else leak(args)
        return 0
    report = Report("memory", vars(args))
    common = [
        __file__,
        "--size",
        args.size,
        "--snapshots",
        str(args.snapshots),
        "--leak-size",
        args.leak_size,
    ]
    with daemon() as node:
        (sized,) = run_worker([*common, "--worker", "sizes"], env=node.env())
    with daemon() as node:
        (leaked,) = run_worker([*common, "--worker", "leak", "--daemon", str(node.pid)], env=node.env())
    judge(report, sized, leaked, args.snapshots)
    report.samples = {"sizes": sized, "leak": leaked}
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
