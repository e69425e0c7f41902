"""The trainer of the cluster's rounds, one process per host under torchrun: FSDP2 over gloo, a snapshot each step.

Everything that a restore must bring back goes into a digest after each step, written to a file of the rank. Beside the
sharded model each rank has a private one; on the rank `--heavy` it makes the whole state three times as large.
Without `--job` it is the uninterrupted reference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

PRIVATE_WIDTH = 24
BATCH = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the ranks' logs")
    parser.add_argument("--job", default="")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--heavy", type=int, default=-1, help="rank with three times the others' bytes; -1: none"
    )
    parser.add_argument("--step-seconds", type=float, default=0.0, help="least time of a step")
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument(
        "--no-digests", action="store_true", help="for measurements: they cost more than the step"
    )
    return parser.parse_args()


class Log:
    """One JSON line per event in one write: it survives a SIGKILL, torn at most at the end."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, what: str, **fields: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "t": time.monotonic()} | fields)
        os.write(self._fd, line.encode() + b"\n")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Training:
    """All state, and how it moves on: a pure function of the seed, the step and the rank."""

    def __init__(self, args: argparse.Namespace, rank: int, world_size: int) -> None:
        seed_everything(args.seed)
        self.width = args.width
        layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
        self.model = nn.Sequential(*layers, nn.Dropout(0.1))
        sharded = sum(p.numel() for p in self.model.parameters()) // world_size
        fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        rows = max(1, 2 * sharded // PRIVATE_WIDTH) if rank == args.heavy else 8
        self.private = nn.Linear(PRIVATE_WIDTH, rows)
        self.private_optimizer = torch.optim.AdamW(self.private.parameters(), lr=1e-3)
        seed_everything(args.seed * 1000 + rank)

    def state(self) -> dict[str, object]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "private": self.private,
            "private_optimizer": self.private_optimizer,
        }

    def step(self) -> None:
        scale = float(np.random.random()) + random.random()
        x = torch.rand(BATCH, self.width) * scale
        loss = nn.functional.mse_loss(self.model(x), x.roll(1))
        own = self.private(torch.rand(BATCH, PRIVATE_WIDTH)).square().mean()
        (loss + own).backward()
        self.optimizer.step()
        self.private_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.private_optimizer.zero_grad(set_to_none=True)

    def digest(self) -> str:
        """Of everything that a restore has to bring back on this rank."""
        hasher = xxhash.xxh3_128()
        for module, optimizer in ((self.model, self.optimizer), (self.private, self.private_optimizer)):
            for parameter in module.parameters():
                hasher.update(_bytes(parameter))
                for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                    hasher.update(key.encode() + _bytes(value))
        hasher.update(repr(random.getstate()).encode())
        hasher.update(repr([np.array(part).tolist() for part in np.random.get_state()[1:]]).encode())
        hasher.update(torch.get_rng_state().numpy().tobytes())
        return hasher.hexdigest()


def _bytes(value: Any) -> bytes:
    local = value.to_local() if hasattr(value, "to_local") else value
    return bytes(local.detach().contiguous().numpy().tobytes())


def train(args: argparse.Namespace, log: Log) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training = Training(args, rank, world_size)
    start, snap = 0, None
    if args.job:
        from snapd_client import Snapshotter

        snap = Snapshotter(training.state(), job=args.job, interval=args.interval)
        began = time.monotonic()
        start = snap.restore()
        seconds = time.monotonic() - began
        digest = training.digest()
        log("restored", step=start, digest=digest, generation=snap.generation, seconds=seconds)
    else:
        log("reference", step=0, digest=training.digest())
    for step in range(start + 1, args.steps + 1):
        began = time.monotonic()
        training.step()
        trained = time.monotonic()
        digest = "" if args.no_digests else training.digest()
        handed = time.monotonic()
        handle = snap.step(step) if snap is not None else None
        ended = time.monotonic()
        is_handed = handle is not None and handle.is_handed_over
        log(
            "step",
            step=step,
            digest=digest,
            seconds=trained - began,
            hook=ended - handed,
            is_handed=is_handed,
        )
        time.sleep(max(0.0, args.step_seconds - (time.monotonic() - began)))
    if snap is not None:
        log(
            "health",
            health={k: v for k, v in snap.health().items() if isinstance(v, (int, str, float, bool))},
        )
        snap.close()
    log("ended")


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    log = Log(args.out / f"rank-{os.environ['RANK']}.jsonl")
    log("begun")
    dist.init_process_group("gloo")
    try:
        train(args, log)
    except Exception as error:
        log("failed", error=f"{error}", type=type(error).__name__, kind=getattr(error, "kind", ""))
        raise
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
