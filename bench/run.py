"""`make bench`: snapd beside torch.save and DCP async, on this machine, in one run.

    python bench/run.py --size small --times 2

Every system has a process of its own, the systems take turns. It leaves bench-out/bench.json (machine,
versions, commit, every sample) and bench-out/bench.png. What the systems call saved differs: snapd's
snapshot lies in memory that outlives the trainer, the others' in files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import OUT, machine, spread

SAVES = 6
BLOCK = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", choices=["tiny", "small", "medium"])
    parser.add_argument("--times", type=int, default=2, help="turns; each runs every system once")
    parser.add_argument(
        "--tmp", default=None, help="where files go: a real disk (default: the temporary folder)"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(args: argparse.Namespace) -> None:
    from systems import SYSTEMS
    from workload import Memcpy, Workload, now

    work = Workload(args.size)
    memcpy = Memcpy(work)
    work.step()
    system = SYSTEMS[args.worker](work, args.folder)
    rows, copies = [], [memcpy() for _ in range(4)][1:]
    for _ in range(SAVES + 1):
        began = now()
        system.save(work.steps_done)
        call = now() - began
        began = now()
        work.compute()
        at_fence = now()
        system.before_update()
        fence = now() - at_fence
        work.update()
        step = now() - began
        system.finish()
        rows.append({"stall": call + fence, "step": step, "calm": work.step()})
        copies.append(memcpy())
    began = now()
    for _ in range(BLOCK):
        work.step()
    calm_block = now() - began
    began = now()
    for _ in range(BLOCK):
        work.compute()
        system.before_update()
        work.update()
        system.save(work.steps_done)
    system.before_update()
    every_step = now() - began
    system.finish()
    publish(
        {"rows": rows[1:], "memcpy": copies, "every_step": every_step / calm_block, "nbytes": work.nbytes()}
    )


def run_system(args: argparse.Namespace, name: str) -> dict[str, Any]:
    base = "/dev/shm" if "/dev/shm" in name else args.tmp
    folder = tempfile.mkdtemp(prefix="snapd-bench-", dir=base)
    options = [__file__, "--size", args.size, "--worker", name, "--folder", folder]
    try:
        if name != "snapd":
            return run_worker(options)[0]
        with daemon() as node:
            return run_worker(options, env=node.env())[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """In memcpys of the same process."""
    found: dict[str, list[float]] = {"stall": [], "tax": [], "every_step": []}
    for result in results:
        unit = statistics.median(result["memcpy"])
        calm = statistics.median(row["calm"] for row in result["rows"])
        found["stall"] += [row["stall"] / unit for row in result["rows"]]
        found["tax"] += [(row["step"] - calm + row["stall"]) / unit for row in result["rows"]]
        found["every_step"].append(result["every_step"])
    return found


def plot(path: Path, rows: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("stall", "stall of the training thread (memcpys, log)", True),
        ("tax", "stall + what the next step loses (memcpys)", False),
        ("every_step", "a save after every step: run time / without", False),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    names = list(rows)[::-1]
    for axis, (key, title, is_log) in zip(axes, panels, strict=True):
        for at, name in enumerate(names):
            values = rows[name][key]
            middle = statistics.median(values)
            axis.barh(at, middle, color="#3a9a5b" if name == "snapd" else "#9db4cc")
            axis.plot([min(values), max(values)], [at, at], color="black", linewidth=1)
            axis.text(max(middle, max(values)), at, f" {middle:.2f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names if key == "stall" else [""] * len(names))
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.15)
        if is_log:
            axis.set_xscale("log")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    args = arguments()
    from systems import SYSTEMS

    if args.worker:
        worker(args)
        return 0
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    began = time.monotonic()
    for turn in range(args.times):
        for name, found in results.items():
            found.append(run_system(args, name))
            print(f"[{time.monotonic() - began:4.0f} s] turn {turn + 1}: {name}", flush=True)
    rows = {name: summary(found) for name, found in results.items()}
    nbytes = results["snapd"][0]["nbytes"]
    print(f"\n{nbytes / 1e9:.2f} GB of state; stall and tax in memcpys of it; medians [min..max]\n")
    print(f"{'system':<24}{'stall':>26}{'stall + tax':>28}{'every step, x':>26}")
    for name, row in rows.items():
        cells = spread(row["stall"]), spread(row["tax"], 2), spread(row["every_step"], 2)
        print(f"{name:<24}{cells[0]:>26}{cells[1]:>28}{cells[2]:>26}")
    OUT.mkdir(exist_ok=True)
    record = {
        "machine": machine(),
        "settings": {"size": args.size, "times": args.times},
        "summary": rows,
        "samples": results,
    }
    (OUT / "bench.json").write_text(json.dumps(record, indent=1))
    plot(OUT / "bench.png", {name: row for name, row in rows.items() if name != "no snapshots"})
    print(f"\nwritten: {OUT}/bench.json, {OUT}/bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
