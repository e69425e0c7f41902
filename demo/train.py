"""The demo's trainer, one process per rank under torchrun: FSDP2 over gloo, a snapshot after every step.

The part that concerns snapd is what a user would write; it is marked. Everything random is in play on
purpose (dropout from torch, noise from NumPy, the crop from Python's `random`, shuffling in the loader),
because all of it has to come back to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from corpus import Windows, read_corpus
from final import write_final
from heartbeat import Heart
from model import Shape, Transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of this run's logs and final state")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--epoch-steps", type=int, default=15, help="batches per epoch: epochs end within the run"
    )
    parser.add_argument(
        "--job", default="", help="snapshot to this job after every step; empty: no snapshots"
    )
    return parser.parse_args()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(args: argparse.Namespace, rank: int, world_size: int) -> dict[str, object]:
    """Model, optimizer, scheduler and loader. All ranks start from the same weights."""
    shape = Shape()
    seed_everything(args.seed)
    model = Transformer(shape)
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 10, (10 / (n + 1)) ** 0.5)
    )
    seed_everything(args.seed * 1000 + rank)  # from here on every rank has its own dropout, noise and order
    windows = Windows(
        read_corpus(),
        context=shape.context,
        rank=rank,
        world_size=world_size,
        count=args.batch * args.epoch_steps,
    )
    loader = StatefulDataLoader(windows, batch_size=args.batch, shuffle=True, num_workers=2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}


def endless(loader: StatefulDataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def noisy(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop to a random length and flip a few input bytes; the targets stay what they are."""
    length = random.choice((96, 112, 128))
    tokens, targets = batch[:, :length].clone(), batch[:, 1 : length + 1]
    hit = torch.from_numpy(np.random.random(tokens.shape) < 0.02)
    tokens[hit] = torch.from_numpy(np.random.randint(0, 256, int(hit.sum())))
    return tokens, targets


def train_step(parts: dict[str, object], batch: torch.Tensor, heart: Heart, step: int) -> float:
    model, optimizer, scheduler = parts["model"], parts["optimizer"], parts["scheduler"]
    heart.at(step, "forward")
    loss = model(*noisy(batch))
    heart.at(step, "backward")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    heart.at(step, "update")
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def train(args: argparse.Namespace, rank: int, world_size: int, log: TextIO) -> None:
    def note(what: str, **fields: object) -> None:
        print(json.dumps({"what": what, "t": time.monotonic(), "rank": rank} | fields), file=log, flush=True)

    heart = Heart(args.out / f"heartbeat-{rank}")
    note("begun", pid=os.getpid())
    parts = build(args, rank, world_size)
    loader = parts["loader"]
    start, snap = 0, None
    if args.job:
        # ---- the part that concerns snapd: begin
        from snapd_client import Snapshotter

        snap = Snapshotter({**parts, "loader": loader}, job=args.job, interval=1)
        before = time.monotonic()
        start = snap.restore()
        note("restored", start=start, seconds=time.monotonic() - before)
        # ---- end
    batches = endless(loader)
    for step in range(start, args.steps):
        began = time.monotonic()
        heart.at(step + 1, "data")
        loss = train_step(parts, next(batches), heart, step + 1)
        stepped = time.monotonic()
        heart.at(step + 1, "snapshot")
        if snap is not None:
            snap.step(step + 1)  # ---- and this line, after the update
        note("step", step=step + 1, loss=loss.hex(), began=began, stepped=stepped, ended=time.monotonic())
    heart.at(args.steps, "ended")
    write_final(
        args.out / f"final-{rank}.safetensors", parts
    )  # before close(): nothing may disturb the RNG states
    if snap is not None:
        snap.wait("captured", timeout=60)
        note("health", health=snap.health())
        snap.close()
    note("ended")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"rank-{rank}.jsonl", "a", encoding="utf-8") as log:
        train(args, rank, world_size, log)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
