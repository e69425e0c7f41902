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
from pathlib import Path

import torch
from snapd_native import Mapping

from .gpu_check_runs import RUNS, Report
from .stage import Copy, DeviceStage, DeviceTransfer, DeviceWork, Gather

STATE_BYTES = 1 << 30


def _arena(nbytes: int) -> Mapping:
    descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix="snapd-gpu-check-")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return Mapping(descriptor, nbytes, True)
    finally:
        os.unlink(path)
        os.close(descriptor)


class Bench:
    """A pinned segment, the stage, and one tensor that goes there."""

    def __init__(self, state: torch.Tensor) -> None:
        self.state, self.nbytes = state, state.numel() * state.element_size()
        self.mapping = _arena(self.nbytes)
        self.stage = DeviceStage()
        self.stage.register(self.mapping.address, self.nbytes)
        torch.cuda.synchronize()

    def submit(self, now: Gather | None = None, source: torch.Tensor | None = None) -> DeviceTransfer:
        address = (self.state if source is None else source).data_ptr()
        copy = Copy(1, self.mapping.address, address, self.nbytes)
        return self.stage.submit([DeviceWork(self.state.device, [now or Gather()], [], [copy])])

    def arrived(self) -> torch.Tensor:
        return torch.frombuffer(self.mapping.view(0, self.nbytes), dtype=self.state.dtype)


def check_pinned_copy(report: Report) -> None:
    """Registered shared memory takes device copies at the speed of pinned memory, and exactly."""
    source = torch.randint(0, 255, (STATE_BYTES,), dtype=torch.uint8, device="cuda")
    began = time.perf_counter()
    bench = Bench(source)
    register_s = time.perf_counter() - began
    pinned = torch.empty(STATE_BYTES, dtype=torch.uint8, pin_memory=True)
    into_pinned = _seconds(lambda: pinned.copy_(source, non_blocking=True))
    into_arena = _seconds(lambda: bench.submit().wait())
    equal = bool(torch.equal(bench.arrived(), pinned))
    report.add(
        "pinned copy into the arena",
        equal and into_arena < 1.2 * into_pinned and bench.stage.pageable_bytes == 0,
        arena_over_pinned=round(into_arena / into_pinned, 3),
        gb_per_s=round(STATE_BYTES / into_arena / 1e9, 1),
        back_and_register_s=round(register_s, 2),
        equal=equal,
    )
    bench.stage.close()


def check_fence(report: Report) -> None:
    """An update behind the fence does not reach the copy; the host does not wait for either."""
    state = torch.arange(STATE_BYTES // 4, dtype=torch.int32, device="cuda")
    expected = state.cpu()
    bench = Bench(state)
    bench.submit().wait()
    state.add_(0)  # kernels are loaded at their first use, and that waits
    torch.cuda.synchronize()
    started = time.perf_counter()
    transfer = bench.submit()
    transfer.fence(1)
    state.add_(1)
    host_s = time.perf_counter() - started
    was_under_way = not transfer.is_done()
    transfer.wait()
    torch.cuda.synchronize()
    equal = bool(torch.equal(bench.arrived(), expected))
    report.add(
        "fence on the device, none on the host",
        equal and was_under_way and host_s < 0.005,
        host_ms=round(host_s * 1e3, 3),
        equal=equal,
        was_under_way=was_under_way,
    )
    bench.stage.close()


def check_without_fence(report: Report) -> None:
    """The same without a fence must tear: else the check above proves nothing."""
    bench = Bench(torch.zeros(STATE_BYTES // 4, dtype=torch.int32, device="cuda"))
    transfer = bench.submit()
    bench.state.add_(1)
    transfer.wait()
    report.add("the same without a fence tears", bool(bench.arrived().any()))
    bench.stage.close()


def check_arrival_and_early(report: Report) -> None:
    """The descriptor becomes readable, and what was gathered keeps the value that it had."""
    bench = Bench(torch.ones(1 << 18, dtype=torch.float32, device="cuda"))
    memory = torch.empty_like(bench.state)
    transfer = bench.submit(Gather([memory], [bench.state]), memory)
    bench.state.zero_()
    is_readable = bool(select.select([transfer.fileno()], [], [], 10)[0])
    report.add("arrival and early part", is_readable and bool((bench.arrived() == 1).all()))
    transfer.close()
    bench.stage.close()


def check_graph_capture(report: Report) -> None:
    """A CUDA graph may be captured while our thread waits for a copy, and its fence touches nothing."""
    bench = Bench(torch.ones(STATE_BYTES // 4, dtype=torch.float32, device="cuda"))
    counter = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    counter.add_(0)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    transfer = bench.submit()
    with torch.cuda.stream(stream):  # `with torch.cuda.graph` would wait for the copy first
        graph.capture_begin()
        counter.add_(1)
        is_waited_for = transfer.fence(1)
        transfer.wait()  # it ends meanwhile: our thread's calls fall into the capture
        counter.add_(1)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    report.add(
        "a graph captured during a copy",
        not is_waited_for and counter.item() == 2 and not transfer.is_cancelled,
        counter=counter.item(),
        fence_did_nothing=not is_waited_for,
    )
    bench.stage.close()


def check_refused_pin(report: Report) -> None:
    """A segment that the driver will not pin: no error is left for the user's next kernel, the copy is right."""
    state = torch.randint(0, 1 << 20, (STATE_BYTES // 8,), dtype=torch.int32, device="cuda")
    bench = Bench(state)
    bench.stage.close()  # unpins
    bench.stage = DeviceStage()
    bench.stage.register(bench.mapping.address, 1 << 46)  # more than there is
    is_refused = bench.stage.pageable_bytes == 1 << 46
    after = torch.ones(4, device="cuda").add_(1).sum().item()
    seconds = _seconds(lambda: bench.submit().wait())
    equal = bool(torch.equal(bench.arrived(), state.cpu()))
    report.add(
        "a segment that cannot be pinned",
        is_refused and after == 8 and equal,
        is_refused=is_refused,
        equal=equal,
        gb_per_s=round(bench.nbytes / seconds / 1e9, 1),
    )
    bench.stage.close()


def _seconds(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
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
    check_graph_capture,
    check_refused_pin,
    *RUNS,
)


def main() -> int:
    """Run all checks; print the report as JSON last."""
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SNAPD_RUNTIME_DIR"] = str(Path(folder) / "run")
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
