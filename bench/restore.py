"""Restore: rollback into live tensors, and in a new process against its floor and safetensors in /dev/shm.

    python bench/restore.py --size medium --times 5

The floor of a new process is "allocate and fill fresh pages with the same bytes", measured in the same
process, next to the restore. Time counts from the call of `restore()` to its return; building the model is
the user's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import daemon, publish, run_worker
from report import Report, spread

JOB = "restore"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="medium", choices=["tiny", "small", "medium"])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--worker", choices=["save", "snapd", "safetensors"], help=argparse.SUPPRESS)
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def digest(work: Any) -> str:
    import xxhash

    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(work.flat().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).numpy().data)
    return hasher.hexdigest()


def save(args: argparse.Namespace) -> None:
    """Leave a snapshot and a safetensors file of the same state; roll back into live tensors."""
    from safetensors.torch import save_file
    from snapd_client import Snapshotter
    from workload import Memcpy, Workload, now

    work = Workload(args.size)
    memcpy = Memcpy(work)
    snap = Snapshotter(work.state(), job=JOB, strict=True)
    snap.restore()
    copies, rollbacks, exact = [memcpy() for _ in range(3)][1:], [], True
    for _ in range(args.times):
        work.step()
        wanted, step = digest(work), work.steps_done
        snap.step(step, wait="captured")
        work.step()
        began = now()
        found = snap.rollback(step)
        rollbacks.append(now() - began)
        exact &= found == step and digest(work) == wanted
        copies.append(memcpy())
    work.step()
    snap.step(work.steps_done, wait="captured")
    save_file({name: tensor.contiguous() for name, tensor in work.flat().items()}, args.file)
    publish({
        "memcpy": copies, "rollback": rollbacks, "exact": exact, "digest": digest(work),
        "nbytes": work.nbytes(), "step": work.steps_done,
    })  # fmt: skip
    snap.close()


def fresh(args: argparse.Namespace) -> None:
    """In a new process: one way of restoring, timed, then the floor."""
    from workload import Memcpy, Workload, now

    work = Workload(args.size, seed=99, with_state=False)
    if args.worker == "snapd":
        from snapd_client import Snapshotter

        snap = Snapshotter(work.state(), job=JOB, strict=True)
        began = now()
        snap.restore()
        seconds = now() - began
    else:
        began = now()
        load_safetensors(work, args.file)
        seconds = now() - began
    wanted = digest(work)
    began = now()
    copies = [tensor.clone() for tensor in work.flat().values()]  # all held: every page is a fresh one
    floor = now() - began
    copies.clear()
    memcpy = Memcpy(work)
    memcpy()
    publish({"seconds": seconds, "floor": floor, "memcpy": memcpy(), "digest": wanted})


def load_safetensors(work: Any, file: str) -> None:
    """Straight into the live parameters; optimizer state into new tensors, as it does not exist yet."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as source, torch.no_grad():
        for name, parameter in work.model.named_parameters():
            parameter.copy_(source.get_tensor(f"model.{name}"))
            prefix = f"optimizer.{name}."
            work.optimizer.state[parameter] = {
                key: source.get_tensor(prefix + key).clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }


def judge(report: Report, saved: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    unit = statistics.median(saved["memcpy"])
    rollbacks = [seconds / unit for seconds in saved["rollback"]]
    report.claim(
        "rollback into live tensors, median", statistics.median(rollbacks), 1.5, "memcpy", spread(rollbacks)
    )
    ratios = [row["seconds"] / row["floor"] for row in rows["snapd"]]
    report.claim("restore in a new process, median", statistics.median(ratios), 1.2, "floor", spread(ratios))
    snapd = [row["seconds"] for row in rows["snapd"]]
    tensors = [row["seconds"] for row in rows["safetensors"]]
    ratio = statistics.median(snapd) / statistics.median(tensors)
    report.claim(
        "restore / safetensors from /dev/shm",
        ratio,
        1.0,
        "x",
        f"{spread(snapd)} s against {spread(tensors)} s",
    )
    wrong = (not saved["exact"]) + sum(
        row["digest"] != saved["digest"] for kind in rows.values() for row in kind
    )
    report.claim("restores that were not exact", wrong, 0, "")


def main() -> int:
    args = arguments()
    if args.worker:
        save(args) if args.worker == "save" else fresh(args)
        return 0
    report = Report("restore", vars(args))
    with daemon() as node, tempfile.TemporaryDirectory(prefix="snapd-bench-", dir="/dev/shm") as folder:
        file = os.path.join(folder, "state.safetensors")
        common = [__file__, "--size", args.size, "--times", str(args.times), "--file", file, "--worker"]
        (saved,) = run_worker([*common, "save"], env=node.env())
        rows: dict[str, list[dict[str, Any]]] = {"snapd": [], "safetensors": []}
        for _ in range(args.times):
            for kind, found in rows.items():
                found += run_worker([*common, kind], env=node.env())
    print(f"{saved['nbytes'] / 1e9:.2f} GB, memcpy {spread(saved['memcpy'])} s")
    judge(report, saved, rows)
    report.samples = {"saved": saved, "fresh": rows}
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
