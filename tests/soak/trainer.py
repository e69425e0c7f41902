"""A small trainer for kill tests, and the nursery that forks trainers quickly.

Importing torch takes seconds and a kill test starts hundreds of trainers, so one process, the nursery,
imports torch (and nothing of snapd, no threads, no RPC) and forks a child per trainer. Commands come in as
JSON lines, the ends of children go out as JSON lines; the nursery ends, with all of its children, when its
input does.

A trainer's state is a function of (rank, step): each step's digest is written to a log before `snap.step`
is called, so whatever is restored can be compared with an uninterrupted run.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import selectors
import signal
import struct
import sys
import time
import traceback
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, for half a second in every trainer
import torch.distributed as dist
import torch.distributed.tensor
import xxhash
from torch import nn

PHASES = ("starting", "restoring", "computing", "updating", "handing over", "ending")
_BEAT = struct.Struct("<QQ")
WIDTH = 256


class Beat:
    """Step and phase, in a file that the killer reads."""

    def __init__(self, path: str) -> None:
        with open(path, "w+b") as file:
            file.write(_BEAT.pack(0, 0))
            file.flush()
            self._map = mmap.mmap(file.fileno(), _BEAT.size)

    def at(self, step: int, phase: str) -> None:
        _BEAT.pack_into(self._map, 0, step, PHASES.index(phase))


class Training:
    """Two layers, AdamW, all three random generators in use; 8 MB of state. Several ranks: replicas, sharing out."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.world_size = world_size
        torch.manual_seed(1)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(WIDTH, 5 * WIDTH), nn.GELU(), nn.Linear(5 * WIDTH, WIDTH)
        )
        if world_size > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        torch.manual_seed(100 + rank)
        np.random.seed(100 + rank)
        random.seed(100 + rank)

    def backward(self) -> None:
        scale = float(np.random.random()) + random.random()
        x = torch.rand(8, WIDTH) * scale
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.mse_loss(self.model(x), x.roll(1)).backward()

    def all_agree(self, mine: bool) -> bool:
        """Whether it is so on every rank."""
        votes = torch.tensor(int(mine))
        if self.world_size > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes)

    def digest(self) -> str:
        """Of everything that a restore has to bring back."""
        hasher = xxhash.xxh3_128()
        for parameter in self.model.parameters():
            hasher.update(parameter.detach().numpy().data)
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                hasher.update(key.encode())
                hasher.update(
                    value.detach().numpy().tobytes() if value.dim() == 0 else value.detach().numpy().data
                )
        hasher.update(repr(random.getstate()).encode())
        _, keys, *rest = np.random.get_state()
        hasher.update(keys.data)
        hasher.update(repr(rest).encode())
        hasher.update(torch.get_rng_state().numpy().data)
        return hasher.hexdigest()


class Log:
    """One JSON line per event in one write: it survives a SIGKILL, torn at most at the end."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, what: str, **fields: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "t": time.monotonic()} | fields)
        os.write(self._fd, line.encode() + b"\n")


def train(order: dict[str, Any]) -> None:
    """Run one rank until `order["steps"]`. Without a job: the reference, no snapshots."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    beat, log = Beat(order["beat"]), Log(order["log"])
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{order['store']}", rank=rank, world_size=world_size
        )
    training = Training(rank, world_size)
    start, snap = 0, None
    if order["job"]:
        from snapd_client import Snapshotter

        state = {"model": training.model, "optimizer": training.optimizer}
        snap = Snapshotter(state, job=order["job"], interval=1)
        beat.at(0, "restoring")
        start = snap.restore()
        log("restored", step=start, digest=training.digest(), generation=snap.generation)
    else:
        log("reference", step=0, digest=training.digest())
    for step in range(start + 1, order["steps"] + 1):
        beat.at(step, "computing")
        training.backward()
        beat.at(step, "updating")
        training.optimizer.step()
        log("step", step=step, digest=training.digest())
        beat.at(step, "handing over")
        if snap is not None:
            handle = snap.step(step)
            if order["is_hurried"]:
                snap.fence()  # while the copy is under way
            if order["rollback_every"] and step % order["rollback_every"] == 0:
                if training.all_agree(handle is not None and handle.is_handed_over):
                    _roll_back(snap, training, step, log)
    beat.at(order["steps"], "ending")
    if snap is not None:
        log("health", **{k: v for k, v in snap.health().items() if not isinstance(v, list)})
        snap.close()
    log("ended")


def _roll_back(snap: Any, training: Training, step: int, log: Log) -> None:
    """Spoil the state, and get it back in place."""
    snap.wait("captured", timeout=20)
    with torch.no_grad():
        next(training.model.parameters()).zero_()
    random.random()
    found = snap.rollback(step)
    log("rolled back", step=found, digest=training.digest(), generation=snap.generation)


# ---- the nursery


def _child(order: dict[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    status = 1
    try:
        train(order)
        status = 0
    finally:
        error = sys.exception()
        if error is not None:
            Log(order["log"])(
                "failed", error=f"{type(error).__name__}: {error}", kind=getattr(error, "kind", "")
            )
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no exit handlers: torch's may wait for a peer that was killed


def _reap(children: set[int]) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"pid": pid, "status": code}), flush=True)


def nursery() -> None:
    children: set[int] = set()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _reap(children)
                continue
            data = os.read(0, 1 << 16)
            if not data:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _child(order)
                children.add(pid)
                print(json.dumps({"pid": pid, "began": order["id"]}), flush=True)


if __name__ == "__main__":
    nursery()
