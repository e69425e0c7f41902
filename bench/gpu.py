"""What snapshots cost on a device, in copies of the same bytes into pinned memory by plain `copy_`, in the same run.

    python bench/gpu.py                              # 211 M parameters, 2.5 GB of state
    python bench/gpu.py --kind bf16 --batch 4
    python bench/gpu.py --durable-every 5            # every fifth goes on to a directory while training goes on

Floor: every tensor of the state with `copy_(..., non_blocking=True)` into (restore: from) pinned memory of torch's own.
Host: how long the call of `snap.step` keeps the training thread. Stream: what it adds to the training stream (the early
part and the samples are gathered there). Fence: how long the stream waits before the update, beyond the work that was
queued. Step time: blocks of steps in alternating pairs, without snapshots and with one at every step, or every fifth.
SNAPD_CAPTURE_HASH_THREADS reaches the daemon.
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

FLOOR_TURNS = 7


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="fused", choices=["fused", "foreach", "bf16", "fsdp2", "eightbit"])
    parser.add_argument("--size", default="large", choices=["small", "large"])
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--snapshots", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block", type=int, default=10, help="steps in one half of a pair")
    parser.add_argument("--every", default="1,5", help="steps between snapshots, separated by commas")
    parser.add_argument("--durable-every", type=int, default=0, help="steps between durable ones; 0: none")
    parser.add_argument("--tier-rate", default="256MiB", help="as tier.rate")
    parser.add_argument("--slots", type=int, default=0, help="as of Snapshotter")
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


class Trial:
    """The world, the Snapshotter, and the measurements, each of which returns seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from gpu_worlds import World
        from workload import now

        self.torch, self.now, self.args = torch, now, args
        self.world = World(args.kind, args.size, batch=args.batch, seed=1)
        self.number = 0
        for _ in range(3):
            self.train()
        torch.cuda.synchronize()
        self.plain_bytes = torch.cuda.memory_allocated()
        self.pinned = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            for name, tensor in self.world.tensors().items()
        }
        began = now()
        self.snap = self.open()
        self.open_s = now() - began
        self.snap.restore()

    def open(self) -> Any:
        from snapd_client import Snapshotter

        state, slots = self.world.state(), self.args.slots
        return Snapshotter(state, job="gpu", strict=True, wait_max_s=20.0, slots=slots)

    def event(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def train(self) -> None:
        self.world.step(self.number)
        self.number += 1

    def floor(self, to_device: bool = False) -> float:
        """All tensors between the device and pinned memory, one `copy_` each."""
        live = self.world.tensors()
        self.torch.cuda.synchronize()
        began = self.now()
        for name, pinned in self.pinned.items():
            source, target = (pinned, live[name]) if to_device else (live[name], pinned)
            with self.torch.no_grad():
                target.copy_(source, non_blocking=True)
        self.torch.cuda.synchronize()
        return float(self.now() - began)

    def snapshot(self) -> dict[str, float]:
        """One snapshot of a device that has nothing else to do, then a step that overlaps with it, then a calm one."""
        torch, now, snap = self.torch, self.now, self.snap
        torch.cuda.synchronize()
        began = now()
        snap.step(self.number)
        host = now() - began
        loss = self.world.compute(self.number)
        at_fence, fence_began = self.event(), now()
        snap.fence()
        fence_host = now() - fence_began
        behind_fence = self.event()
        self.world.update()
        self.number += 1
        snap.wait("captured", timeout=60)
        captured = now() - began
        torch.cuda.synchronize()
        del loss
        windows = snap.health()["commit_window_s"]
        return {
            "host": host,
            "fence_host": fence_host,
            "fence_stream": at_fence.elapsed_time(behind_fence) / 1e3,
            "commit": windows[-1],
            "captured": captured,
        }

    def stream_cost(self) -> float:
        """What `snap.step` adds to the training stream, while that is busy, so that the host does not show."""
        torch = self.torch
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # some 50 ms
        before = self.event()
        self.snap.step(self.number)
        after = self.event()
        self.train()
        self.snap.wait("captured", timeout=60)
        torch.cuda.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def block(self, every: int) -> dict[str, float]:
        """Seconds per step of one block, on the training stream and on the host's clock; and skipped snapshots."""
        torch, snap = self.torch, self.snap
        skipped = snap.health()["skipped"]
        torch.cuda.synchronize()
        first, began = self.event(), self.now()
        for step in range(self.args.block):
            self.train()
            if every and (step + 1) % every == 0:
                snap.step(self.number)
        last = self.event()
        torch.cuda.synchronize()
        wall = self.now() - began
        if every:
            snap.wait("captured", timeout=60)
        return {
            "stream": first.elapsed_time(last) / 1e3 / self.args.block,
            "wall": wall / self.args.block,
            "skipped": snap.health()["skipped"] - skipped,
        }

    def pairs(self, every: int) -> list[tuple[dict[str, float], dict[str, float]]]:
        """(without, with), the order changing from pair to pair."""
        found = []
        for turn in range(self.args.pairs):
            order = (0, every) if turn % 2 == 0 else (every, 0)
            done = {interval: self.block(interval) for interval in order}
            found.append((done[0], done[every]))
        return found

    def restore(self) -> dict[str, float]:
        """A new world, whose optimizer has no state yet, as after a restart: opening the session, and the restore."""
        from gpu_worlds import World

        self.train()
        self.snap.step(self.number, wait="captured")
        self.snap.close()
        before = self.world
        self.world = World(self.args.kind, self.args.size, batch=self.args.batch, seed=2)
        self.torch.cuda.synchronize()
        began = self.now()
        self.snap = self.open()
        opened = self.now()
        self.snap.restore()
        self.torch.cuda.synchronize()
        done = self.now()
        mine, other = self.world.tensors(), before.tensors()
        is_equal = mine.keys() == other.keys() and all(self.torch.equal(mine[n], other[n]) for n in mine)
        return {"open": opened - began, "restore": done - opened, "is_equal": float(is_equal)}


def worker(args: argparse.Namespace) -> None:
    from workload import anonymous_bytes, cpu_seconds

    trial = Trial(args)
    torch = trial.torch
    result: dict[str, Any] = {
        "nbytes": trial.world.nbytes(),
        "tensors": len(trial.world.tensors()),
        "parameters": sum(parameter.numel() for parameter in trial.world.model.parameters()),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "open_s": trial.open_s,
        "first": trial.snapshot(),
    }
    for _ in range(3):
        trial.snapshot()
    torch.cuda.reset_peak_memory_stats()
    result["floor"] = [trial.floor() for _ in range(FLOOR_TURNS + 1)][1:]
    result["floor_back"] = [trial.floor(to_device=True) for _ in range(FLOOR_TURNS + 1)][1:]
    cpu = cpu_seconds(args.worker)
    result["turns"] = [trial.snapshot() for _ in range(args.snapshots)]
    result["daemon_cpu_s"] = (cpu_seconds(args.worker) - cpu) / args.snapshots
    result["stream"] = [trial.stream_cost() for _ in range(10)]
    result["memory"] = {"plain": trial.plain_bytes, "now": torch.cuda.memory_allocated()}
    result["every"] = {every: trial.pairs(int(every)) for every in args.every.split(",")}
    if args.durable_every:
        began = trial.now()
        trial.snap.wait("durable", timeout=300)
        result["durable_wait_s"] = trial.now() - began
    health = trial.snap.health()
    result["health"] = {key: value for key, value in health.items() if not isinstance(value, list)}
    before = anonymous_bytes()
    result["restores"] = [trial.restore() for _ in range(4)]
    result["restore_host_bytes"] = anonymous_bytes() - before
    trial.snap.close(final=True)
    publish(result)


def show(report: Report, result: dict[str, Any]) -> None:
    nbytes, turns = result["nbytes"], result["turns"]
    print("bench/gpu.py", *(f"{key}={value}" for key, value in report.settings.items() if key != "worker"))
    floor, back = statistics.median(result["floor"]), statistics.median(result["floor_back"])
    print(
        f"{result['device']}, torch {result['torch']}; {result['parameters'] / 1e6:.0f} M parameters, "
        f"{nbytes / 1e9:.2f} GB in {result['tensors']} tensors; {len(turns)} snapshots; median [min..max]"
    )
    print(
        f"floor to the host   {spread(scaled(result['floor'], 1e3), 1)} ms  {nbytes / floor / 1e9:.1f} GB/s"
    )
    print(
        f"floor to the device {spread(scaled(result['floor_back'], 1e3), 1)} ms  {nbytes / back / 1e9:.1f} GB/s"
    )

    def column(name: str) -> list[float]:
        return [turn[name] for turn in turns]

    for name, text in (
        ("host", "snap.step on the host"),
        ("fence_host", "fence on the host"),
        ("fence_stream", "fence on the stream"),
        ("commit", "window until the commit word"),
        ("captured", "until captured (hashed by the daemon)"),
    ):
        values = column(name)
        ratio = statistics.median(values) / floor
        print(f"{text:<38} {spread(scaled(values, 1e3), 2)} ms  {ratio:.3f} floor")
    print(f"{'snap.step on the stream':<38} {spread(scaled(result['stream'], 1e3), 3)} ms")
    first = result["first"]
    print(
        f"first snapshot: host {first['host'] * 1e3:.1f} ms, captured after {first['captured'] * 1e3:.1f} ms"
    )
    print(f"opening the session {result['open_s']:.2f} s")
    for every, pairs in result["every"].items():
        show_pairs(report, int(every), pairs)
    health, memory = result["health"], result["memory"]
    print(
        f"early {health['early_bytes']} B, lazy {health['lazy_bytes']} B; committed {health['committed']}, "
        f"skipped {health['skipped']}, discarded {health['discarded']}, failures {health['failures']}"
    )
    if "durable_wait_s" in result:
        print(
            f"newest durable {health['durable_step']}, {result['durable_wait_s']:.1f} s after the last step"
        )
    print(f"device memory: {(memory['now'] - memory['plain']) / 1e6:.1f} MB more than without snapd")
    print(f"CPU per snapshot: daemon {result['daemon_cpu_s'] * 1e3:.0f} ms")
    restores = result["restores"]
    values = [turn["restore"] for turn in restores]
    print(
        f"restore {spread(values)} s, {nbytes / statistics.median(values) / 1e9:.1f} GB/s, "
        f"{statistics.median(values) / back:.2f} floor; opening {spread([turn['open'] for turn in restores])} s; "
        f"equal: {all(turn['is_equal'] for turn in restores)}; "
        f"host memory {result['restore_host_bytes'] / 1e6:+.0f} MB"
    )
    report.claim("window until the commit word", statistics.median(column("commit")) / floor, 1.5, "floor")


def show_pairs(report: Report, every: int, pairs: list[Any]) -> None:
    for clock in ("stream", "wall"):
        without = [calm[clock] * 1e3 for calm, _ in pairs]
        ratios = [taken[clock] / calm[clock] for calm, taken in pairs]
        text = f"step time, snapshot every {every}, {clock}"
        print(f"{text:<38} {spread(ratios, 4)} of {spread(without, 1)} ms without, {len(pairs)} pairs")
    print(f"{'':<38} skipped {sum(taken['skipped'] for _, taken in pairs):.0f}")


def scaled(values: list[float], by: float) -> list[float]:
    return [value * by for value in values]


def tier_options(args: argparse.Namespace, folder: str) -> list[str]:
    """Of the daemon; nothing but what goes by its step becomes durable."""
    if not args.durable_every:
        return []
    every = ["--tier-every-steps", str(args.durable_every), "--tier-every", "0"]
    return ["--tier-shared", folder, "--tier-rate", args.tier_rate, *every]


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        return 2
    report = Report("gpu", vars(args))
    with tempfile.TemporaryDirectory(prefix="snapd-gpu-") as tier, daemon(*tier_options(args, tier)) as node:
        names = ("kind", "size", "batch", "snapshots", "pairs", "block", "every", "slots", "durable-every")
        options = [
            text for name in names for text in (f"--{name}", str(getattr(args, name.replace("-", "_"))))
        ]
        env = node.env() | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
        results = run_worker([__file__, *options, "--worker", str(node.pid)], env=env)
    show(report, results[0])
    report.samples = {"results": results}
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
