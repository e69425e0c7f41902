"""The checks of `make gpu-check` that train, with a daemon: resuming, careless writes, CUDA graphs, a lost device."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch

from .hook import Snapshotter
from .stage_driver import Driver

WIDTH = 4096
ONE_LAYER = "torch.nn.Linear(4096, 4096).cuda()"


@dataclass
class Report:
    """What was found, for the eye and as JSON."""

    lines: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, holds: bool, **facts: object) -> None:
        self.lines.append({"check": name, "holds": holds, **facts})
        shown = " ".join(f"{key}={value}" for key, value in facts.items())
        print(f"{'PASS' if holds else 'FAIL'} {name} {shown}", flush=True)


class Trial:
    """A model with dropout and its optimizer, trained on batches that follow from the step's number."""

    def __init__(self, seed: int, *, layers: int = 4, capturable: bool = False) -> None:
        torch.manual_seed(seed)
        parts = [
            torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Dropout(0.1)) for _ in range(layers)
        ]
        self.model = torch.nn.Sequential(*parts).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, capturable=capturable)
        self.snap: Snapshotter | None = None

    def open(self, job: str) -> Snapshotter:
        state = {"model": self.model, "optimizer": self.optimizer}
        self.snap = Snapshotter(state, job=job, strict=True)
        return self.snap

    def step(self, step: int) -> torch.Tensor:
        batch = self.batch(step)
        loss = self.compute(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.snap is not None:
            self.snap.step(step + 1)
        return loss

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(step)
        return torch.randn(64, WIDTH, device="cuda", generator=generator)

    def compute(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.model(batch) - batch).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def train(self, steps: range) -> list[float]:
        return [float(loss) for loss in [self.step(step) for step in steps]]

    def tensors(self) -> list[torch.Tensor]:
        found = [parameter.detach() for parameter in self.model.parameters()]
        for fields in self.optimizer.state.values():
            found += [value for value in fields.values() if isinstance(value, torch.Tensor)]
        return found

    def copies(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def equals(self, others: list[torch.Tensor]) -> bool:
        mine = self.tensors()
        return len(mine) == len(others) and all(map(torch.equal, mine, others))


def check_resume(report: Report) -> None:
    """Train on the device, lose the process state, restore, and go on bit for bit."""
    expected = Trial(1).train(range(20))
    trial = Trial(1)
    snap = trial.open("gpu-resume")
    first = trial.train(range(10))
    snap.wait("captured")
    health = snap.health()
    snap.close()
    again = Trial(2)
    snap = again.open("gpu-resume")
    start = snap.restore()
    resumed = first + again.train(range(start, 20))
    snap.close(final=True)
    report.add(
        "resume on the device, bit for bit",
        start == 10 and resumed == expected and health["committed"] == 10,
        start=start,
        committed=health["committed"],
        discarded=health["discarded"],
        early_bytes=health["early_bytes"],
        lazy_bytes=health["lazy_bytes"],
    )


def check_side_stream(report: Report) -> None:
    """A write that the fence does not know of, on a stream of the user's own, is found and never committed."""
    trial = Trial(1)
    snap = trial.open("gpu-side")
    trial.train(range(2))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    snap.step(3)
    with torch.cuda.stream(side):
        for tensor in trial.tensors():
            if tensor.dim():
                tensor.data.add_(1)
    torch.cuda.synchronize()
    snap.close()
    health = snap.health()
    again = Trial(2)
    snap = again.open("gpu-side")
    start = snap.restore()
    snap.close(final=True)
    report.add(
        "a write on a side stream",
        health["discarded"] == 1 and start == 2,
        discarded=health["discarded"],
        last_discard=health["last_discard"],
        newest=start,
    )


def check_graph(report: Report) -> None:
    """An update inside a CUDA graph calls no hook: right with snap.fence(), never wrongly committed without."""
    trial = Trial(1, capturable=True)
    inputs = trial.batch(0)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            trial.compute(inputs)
            trial.optimizer.step()
            trial.optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    snap = trial.open("gpu-graph")
    graph = torch.cuda.CUDAGraph()
    snap.step(1)
    with torch.cuda.graph(graph):  # while the first snapshot is being copied
        trial.compute(inputs)
        trial.optimizer.step()
        trial.optimizer.zero_grad()
    snap.wait("captured")
    for step in range(1, 5):
        snap.fence()
        graph.replay()
        snap.step(step + 1)
    kept = trial.copies()
    snap.wait("captured")
    fenced = snap.health()
    snap.fence()
    graph.replay()
    torch.cuda.synchronize()
    snap.step(6)
    graph.replay()  # not fenced, and nothing says so but the samples
    torch.cuda.synchronize()
    snap.close()
    health = snap.health()
    is_careful = health["discarded"] == 1 and health["last_committed_step"] == 5
    again = Trial(2, capturable=True)
    snap = again.open("gpu-graph")
    start = snap.restore(step=5)
    equal = again.equals(kept)
    snap.close(final=True)
    report.add(
        "an update in a CUDA graph",
        equal and start == 5 and fenced["discarded"] == 0 and is_careful,
        with_fence_equal=equal,
        with_fence_discarded=fenced["discarded"],
        without_fence_discarded=health["discarded"],
    )


def check_refused_pin_in_a_run(report: Report) -> None:
    """The driver refuses to pin the arena: training and snapshots go on, from pageable memory."""
    trial = Trial(1)
    refused: list[int] = []
    register = Driver.register

    def refuse(driver: Driver, address: int, nbytes: int) -> str:
        refused.append(nbytes)
        return register(driver, address, nbytes + (1 << 46))  # more than there is: the driver's own refusal

    Driver.register = refuse  # type: ignore[method-assign, assignment]
    try:
        snap = trial.open("gpu-refused")
        losses = trial.train(range(6))
        snap.wait("captured")
    finally:
        Driver.register = register  # type: ignore[method-assign]
    kept = trial.copies()
    health = snap.health()
    snap.close()
    again = Trial(2)
    snap = again.open("gpu-refused")
    start = snap.restore()
    equal = again.equals(kept)
    snap.close(final=True)
    report.add(
        "a whole run without pinned memory",
        bool(refused) and equal and start == 6 and losses == Trial(1).train(range(6)),
        refused_segments=len(refused),
        equal=equal,
        committed=health["committed"],
        failures=health["failures"],
    )


DOOMED = f"""
import torch
from snapd_client import Snapshotter
model = {ONE_LAYER}
optimizer = torch.optim.AdamW(model.parameters())
snap = Snapshotter({{"model": model, "optimizer": optimizer}}, job="gpu-doomed")
for step in range(3):
    model(torch.ones(8, 4096, device="cuda")).sum().backward()
    optimizer.step()
    snap.step(step + 1)
snap.wait("captured")
snap.step(4)
table = torch.zeros(8, device="cuda")
table[torch.full((4,), 1 << 20, device="cuda")].sum()  # an assertion on the device: the context is lost
torch.cuda.synchronize()
"""


def check_lost_device(report: Report) -> None:
    """A kernel of the user's kills the context in mid-copy: the process ends with its error, what is captured stays."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DOOMED], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, timeout=120
    )
    seconds = time.monotonic() - began
    model = torch.nn.Linear(WIDTH, WIDTH).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    snap = Snapshotter({"model": model, "optimizer": optimizer}, job="gpu-doomed", strict=True)
    start = snap.restore()
    snap.close(final=True)
    report.add(
        "a device that fails in mid-copy",
        done.returncode not in (0, -6) and b"device-side assert" in done.stderr and start in (3, 4),
        exit_status=done.returncode,
        seconds=round(seconds, 1),
        newest=start,
    )


RUNS = (check_resume, check_side_stream, check_graph, check_refused_pin_in_a_run, check_lost_device)
