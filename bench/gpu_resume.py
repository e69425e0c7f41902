"""Kill a trainer on the device while its snapshot is being copied, resume, and compare with a run that nobody killed.

    python bench/gpu_resume.py                       # every way to train of gpu_worlds.py
    python bench/gpu_resume.py --kinds fused,fsdp2
    python bench/gpu_resume.py --through directory   # memory is lost, too: what was durable comes back

For each way: a process trains some steps, hands over a snapshot after each, and sends itself SIGKILL right after
`snap.step` returned. A second process restores and trains to the end, then trains a fresh world from the beginning.
All losses and the bytes of all tensors must be equal. With `--through directory` the one before the last is waited for
until it is durable, and the daemon is killed and its memory removed before the second process starts: another daemon
serves that one. Exit code 0: they were equal; 1: some were not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS, KILLED_AT = 10, 6
WORKER_S = 400.0


def arguments() -> argparse.Namespace:
    from gpu_worlds import KINDS, SHAPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--size", default="small", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--through", default="memory", choices=["memory", "directory"])
    parser.add_argument("--at-once", type=int, default=3, help="ways that run side by side")
    parser.add_argument("--worker", default="", choices=["", "killed", "resumed"], help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the trainer --------------------------------------------------------------------------------------------------
def digest(world: Any) -> str:
    """One hash over names and bytes of all tensors."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(world.tensors().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def train(world: Any, snap: Any, start: int, *, killed_at: int, durable_at: int = 0) -> list[str]:
    losses = []
    for step in range(start, STEPS):
        loss = world.step(step, None if snap is None else snap.fence)
        if snap is not None:
            snap.step(step + 1)
            if step + 1 == durable_at:
                snap.wait("durable", timeout=120)
        if step + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        losses.append(loss)
    return [float(loss).hex() for loss in losses]


def worker(args: argparse.Namespace) -> None:
    import torch
    from gpu_worlds import World
    from snapd_client import Snapshotter

    torch.use_deterministic_algorithms(True, warn_only=args.kinds == "graph")

    def fresh(seed: int) -> World:
        world = World(args.kinds, args.size, batch=args.batch, seed=seed, device=args.device)
        world.wrap()
        torch.manual_seed(seed)
        return world

    is_killed = args.worker == "killed"
    world = fresh(1 if is_killed else 2)
    snap = Snapshotter(world.state(), job=args.kinds, strict=True)
    before = time.monotonic()
    start = snap.restore()
    restore_s = time.monotonic() - before
    durable_at = KILLED_AT - 1 if is_killed and args.through == "directory" else 0
    losses = train(world, snap, start, killed_at=KILLED_AT if is_killed else 0, durable_at=durable_at)
    snap.wait("captured", timeout=60)
    health = snap.health()
    resumed = digest(world)
    snap.close(final=True)
    world = fresh(1)
    expected = train(world, None, 0, killed_at=0)
    result = {
        "start": start,
        "is_equal": losses == expected[start:] and resumed == digest(world),
        "losses": losses,
        "expected": expected,
        "restore_s": restore_s,
        "health": {key: value for key, value in health.items() if not isinstance(value, list)},
        "nbytes": world.nbytes(),
        "tensors": len(world.tensors()),
    }
    Path(os.environ["SNAPD_GPU_RESULT"]).write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- who starts it ------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace, kind: str, role: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--worker", role, "--kinds", kind, "--size", args.size]
    command += ["--batch", str(args.batch), "--device", args.device, "--through", args.through]
    return subprocess.Popen(command, env=env, start_new_session=True)


class Case:
    """One way to train: its two processes, one after the other."""

    def __init__(self, args: argparse.Namespace, kind: str, folder: Path) -> None:
        self._args, self.kind, self._result = args, kind, folder / f"gpu-resume-{kind}.json"
        self._env = {**os.environ, "SNAPD_GPU_RESULT": str(self._result), "PYTHONWARNINGS": "ignore"}
        self.holds = self.is_running = False

    def begin(self, role: str, env: dict[str, str]) -> None:
        self._role, self._until, self.is_running = role, time.monotonic() + WORKER_S, True
        self._process = run(self._args, self.kind, role, self._env | env)

    def tend(self) -> None:
        status = self._process.poll()
        if status is None:
            if time.monotonic() > self._until:
                self._process.kill()
            return
        self.is_running = False
        if self._role == "killed" and status == -signal.SIGKILL and time.monotonic() < self._until:
            self._role = "was killed"
        elif status != 0:
            print(f"FAIL {self.kind}: the process to be {self._role} ended with {status}", flush=True)
        else:
            self._compare(json.loads(self._result.read_text()))

    @property
    def was_killed(self) -> bool:
        return self._role == "was killed"

    def _compare(self, found: dict[str, Any]) -> None:
        self.holds = found["is_equal"] and found["start"] in (KILLED_AT - 1, KILLED_AT)
        health = found["health"]
        print(
            f"{'PASS' if self.holds else 'FAIL'} {self.kind}: {found['nbytes'] / 1e6:.0f} MB in {found['tensors']} "
            f"tensors, killed after step {KILLED_AT} was handed over, resumed at {found['start']}, "
            f"to step {STEPS} bit for bit: {found['is_equal']}; restored in {found['restore_s']:.2f} s; "
            f"discarded {health['discarded']}, skipped {health['skipped']}, failures {health['failures']}",
            flush=True,
        )
        if not self.holds:
            print(f"     {found['losses']}\n     {found['expected']}\n     {health}", flush=True)


def run_all(cases: list[Case], role: str, env: dict[str, str], at_once: int) -> None:
    waiting, running = list(cases), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].begin(role, env)
        for case in running:
            case.tend()
        running = [case for case in running if case.is_running]
        time.sleep(0.05)


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    from processes import daemon

    with tempfile.TemporaryDirectory(prefix="snapd-gpu-") as folder:
        cases = [Case(args, kind, Path(folder)) for kind in args.kinds.split(",")]
        (Path(folder) / "tier").mkdir()
        options = ["--tier-shared", f"{folder}/tier", "--tier-every-steps", "1", "--tier-rate", "0"]
        with daemon(*(options if args.through == "directory" else [])) as node:
            run_all(cases, "killed", node.env(), args.at_once)
            left = [case for case in cases if case.was_killed]
            if args.through == "memory":
                run_all(left, "resumed", node.env(), args.at_once)
            else:
                node.kill()  # and its memory goes with it
        if args.through == "directory":
            with daemon(*options) as other:
                run_all(left, "resumed", other.env(), args.at_once)
    return 0 if all(case.holds for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
