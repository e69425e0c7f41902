"""What a restore by another number of ranks reads from the tier, and what room it takes in the arena.

    python bench/elastic.py [--layers 16]

One machine. A model under FSDP2 on four ranks with AdamW is saved to a directory; then everything but the directory is
lost, and a fresh daemon serves: two ranks of FSDP2, two of DDP (which both need all of it), and one rank that asks only
for the model's weights. Printed: bytes that the daemon read from files, the arena's growth while it restored, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.node import Node  # noqa: E402

WIDTH = 1024
CASES = [
    ("fsdp, all", 2, "fsdp", "all"),
    ("ddp, all", 2, "ddp", "all"),
    ("weights alone", 1, "plain", "weights"),
]


@dataclass
class Watch:
    """What the daemon reads from files, and its arena, while somebody restores."""

    node: Node
    read_nbytes: int = 0
    arena_nbytes: list[int] = field(default_factory=list)

    def arena_now(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.node.arena.rglob("*") if path.is_file())

    def _rchar(self) -> int:
        text = Path(f"/proc/{self.node.pid}/io").read_text()
        return int(text.split("rchar: ")[1].split()[0])

    @contextmanager
    def on(self) -> Iterator[None]:
        before, stop = self._rchar(), threading.Event()

        def sample() -> None:
            while not stop.wait(0.02):
                self.arena_nbytes.append(self.arena_now())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.read_nbytes = self._rchar() - before


def torchrun(node: Node, count: int, *arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, **node.env(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*command, __file__, "--trainer", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line.split("said ")[1]) for line in done.stdout.splitlines() if "said " in line]


def train(kind: str, what: str, layers: int) -> None:
    import torch
    import torch.distributed as dist
    from snapd_client import Snapshotter
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    torch.manual_seed(1)
    inner = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model: nn.Module = inner
    if kind == "fsdp":
        for layer in inner:
            fully_shard(layer)
        fully_shard(inner)
    elif kind == "ddp":
        model = DistributedDataParallel(inner)
    state: dict[str, Any] = {"model": model}
    if what != "weights":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        state["optimizer"] = optimizer
    snap = Snapshotter(state, job="elastic", interval=1)
    dist.barrier()
    began = time.monotonic()
    step = snap.restore(allow_partial=["optimizer*"] if what == "weights" else [])
    seconds = time.monotonic() - began
    if what == "save":
        model(torch.randn(4, WIDTH)).square().mean().backward()
        optimizer.step()
        snap.step(1)
        snap.wait("durable", timeout=120.0)
    print("said " + json.dumps({"step": step, "seconds": seconds}), flush=True)
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    if options.trainer:
        kind, what, layers = options.trainer
        train(kind, what, int(layers))
        return
    layers = str(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        tier = {"SNAPD_TIER_SHARED": folder, "SNAPD_TIER_EVERY_STEPS": "1", "SNAPD_TIER_COMPRESSION": "off"}
        with Node("snapd-bench-elastic", env=tier) as node:
            torchrun(node, 4, "fsdp", "save", layers)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        print(f"saved by 4 ranks, {stored / 2**20:.0f} MiB in the tier")
        for name, count, kind, what in CASES:
            with Node("snapd-bench-elastic", env=tier) as node:
                watch = Watch(node)
                with watch.on():
                    said = torchrun(node, count, kind, what, layers)
                assert all(one["step"] == 1 for one in said), said
                print(
                    f"{name:14} {count} ranks: read {watch.read_nbytes / 2**20:6.0f} MiB,"
                    f" arena at most {max(watch.arena_nbytes) / 2**20:6.0f} MiB,"
                    f" {max(one['seconds'] for one in said):5.2f} s"
                )


if __name__ == "__main__":
    main()
