"""`make gpu-check`: prove on a machine with a GPU what CI can only run against stubs.

Each check prints one line and what it measured. Exit code 0: all held; 1: one did not; 2: there is no device.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from snapd_native import Mapping

from .stage import DevicePiece, DeviceStage, flat_bytes

STATE_BYTES = 1 << 30


@dataclass
class Report:
    """What was found, for the eye and as JSON."""

    lines: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, holds: bool, **facts: object) -> None:
        self.lines.append({"check": name, "holds": holds, **facts})
        shown = " ".join(f"{key}={value}" for key, value in facts.items())
        print(f"{'PASS' if holds else 'FAIL'} {name} {shown}", flush=True)


def _arena(nbytes: int) -> Mapping:
    descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix="snapd-gpu-check-")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return Mapping(descriptor, nbytes, True)
    finally:
        os.unlink(path)
        os.close(descriptor)


def _over(mapping: Mapping, offset: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mapping.view(offset, nbytes), dtype=torch.uint8)


def check_pinned_copy(report: Report) -> None:
    """Registered shared memory takes device copies at the speed of pinned memory, and exactly."""
    mapping = _arena(STATE_BYTES)
    stage = DeviceStage()
    stage.register(mapping.address, STATE_BYTES)
    source = torch.randint(0, 255, (STATE_BYTES,), dtype=torch.uint8, device="cuda")
    pinned = torch.empty(STATE_BYTES, dtype=torch.uint8, pin_memory=True)
    into_pinned = _seconds(lambda: pinned.copy_(source, non_blocking=True))
    destination = _over(mapping, 0, STATE_BYTES)
    into_arena = _seconds(lambda: destination.copy_(source, non_blocking=True))
    equal = bool(torch.equal(destination, source.cpu()))
    report.add(
        "pinned copy into the arena",
        equal and into_arena < 1.2 * into_pinned and stage.pageable_bytes == 0,
        arena_over_pinned=round(into_arena / into_pinned, 3),
        gb_per_s=round(STATE_BYTES / into_arena / 1e9, 1),
        equal=equal,
    )
    stage.close()


def check_fence(report: Report) -> None:
    """An update behind the fence does not reach the copy; the host does not wait for either."""
    mapping = _arena(STATE_BYTES)
    stage = DeviceStage()
    stage.register(mapping.address, STATE_BYTES)
    state = torch.arange(STATE_BYTES // 4, dtype=torch.int32, device="cuda")
    expected = state.cpu().view(torch.uint8)
    destination = _over(mapping, 0, STATE_BYTES)
    torch.cuda.synchronize()
    started = time.perf_counter()
    transfer = stage.submit([DevicePiece(flat_bytes(state, 0, STATE_BYTES), destination, 1)])
    transfer.fence(1)
    state.add_(1)
    host_s = time.perf_counter() - started
    transfer.wait()
    torch.cuda.synchronize()
    report.add(
        "fence on the device, none on the host",
        bool(torch.equal(destination, expected)) and host_s < 0.005,
        host_ms=round(host_s * 1e3, 3),
    )
    stage.close()


def check_without_fence(report: Report) -> None:
    """The same without a fence must tear: else the check above proves nothing."""
    mapping = _arena(STATE_BYTES)
    stage = DeviceStage()
    stage.register(mapping.address, STATE_BYTES)
    state = torch.zeros(STATE_BYTES // 4, dtype=torch.int32, device="cuda")
    destination = _over(mapping, 0, STATE_BYTES)
    torch.cuda.synchronize()
    transfer = stage.submit([DevicePiece(flat_bytes(state, 0, STATE_BYTES), destination, 1)])
    state.add_(1)
    transfer.wait()
    report.add("the same without a fence tears", bool(destination.any()))
    stage.close()


def check_arrival_and_early(report: Report) -> None:
    """The descriptor becomes readable, and an early tensor keeps the value that it had."""
    mapping = _arena(1 << 20)
    stage = DeviceStage()
    state = torch.ones(1 << 18, dtype=torch.float32, device="cuda")
    destination = _over(mapping, 0, 1 << 20)
    transfer = stage.submit([DevicePiece(flat_bytes(state, 0, 1 << 20), destination, 0, is_early=True)])
    state.zero_()
    is_readable = bool(select.select([transfer.fileno()], [], [], 10)[0])
    exact = bool((destination.view(torch.float32) == 1).all())
    report.add("arrival and early clone", is_readable and exact)
    stage.close()


def check_sample(report: Report) -> None:
    """A copy that is not what was handed over is found."""
    mapping = _arena(1 << 20)
    stage = DeviceStage()
    state = torch.ones(1 << 18, dtype=torch.float32, device="cuda")
    piece = DevicePiece(flat_bytes(state, 0, 1 << 20), _over(mapping, 0, 1 << 20), 1)
    sample = stage.sample([piece], turn=0)
    stage.submit([piece]).wait()
    clean = sample.differing()
    piece.destination[5] ^= 1
    report.add("sample", clean == [] and sample.differing() == [0])
    stage.close()


def check_resume(report: Report) -> None:
    """Train on the device, lose the process state, restore, and go on bit for bit."""
    from .hook import Snapshotter

    def world(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(256, 1024), torch.nn.Dropout(0.1), torch.nn.Linear(1024, 256)
        ).cuda()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, snap: Snapshotter | None
    ) -> list[float]:
        losses = []
        for step in steps:
            batch = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if snap is not None:
                snap.step(step + 1)
        return losses

    with tempfile.TemporaryDirectory() as folder:
        os.environ["SNAPD_RUNTIME_DIR"] = str(Path(folder) / "run")
        model, optimizer = world(1)
        expected = train(model, optimizer, range(20), None)
        model, optimizer = world(1)
        snap = Snapshotter({"model": model, "optimizer": optimizer}, job="gpu-check")
        first = train(model, optimizer, range(10), snap)
        snap.wait("captured")
        snap.close()
        model, optimizer = world(2)
        snap = Snapshotter({"model": model, "optimizer": optimizer}, job="gpu-check")
        start = snap.restore()
        resumed = first + train(model, optimizer, range(start, 20), snap)
        snap.close(final=True)
    report.add("resume on the device, bit for bit", start == 10 and resumed == expected, start=start)


def _seconds(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


CHECKS = (
    check_pinned_copy,
    check_fence,
    check_without_fence,
    check_arrival_and_early,
    check_sample,
    check_resume,
)


def main() -> int:
    """Run all checks; print the report as JSON last."""
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    report = Report()
    for check in CHECKS:
        try:
            check(report)
        except Exception as error:
            report.add(check.__name__, False, error=f"{type(error).__name__}: {error}")
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": report.lines}
    print(json.dumps(facts))
    return 0 if all(line["holds"] for line in report.lines) else 1


if __name__ == "__main__":
    sys.exit(main())
