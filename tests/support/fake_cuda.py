"""A stand-in for `torch.cuda` and its driver: host memory plays the device's, and everything is written down.

Copies to the host happen when their stream gets there: at once, or, for a fake made with `is_gated`, when the test
opens the gate, so that what the training thread does in between reaches the copy unless something is done against it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from snapd_client import device as device_module
from snapd_client.stage import DeviceStage


class FakeStream:
    """Does what it is told in order; held back while the fake's gate is closed."""

    def __init__(self, api: FakeCuda, name: str) -> None:
        self.api, self.name = api, name
        self.waiting: list[Callable[[], None]] = []
        self.cuda_stream = id(self)

    def do(self, action: Callable[[], None]) -> None:
        if self.api.is_gated and self.name.startswith("side"):
            self.waiting.append(action)
        else:
            action()

    def wait_event(self, event: FakeEvent) -> None:
        """A training stream that waits lets the side streams go on first, as a device would."""
        self.api.log.append(f"{self.name} waits for {event.number}")
        if not self.name.startswith("side"):
            self.api.let_go(event)

    def synchronize(self) -> None:
        self.api.log.append(f"{self.name} is synchronised")
        self.api.open_gate()


class FakeEvent:
    def __init__(self, api: FakeCuda, number: int) -> None:
        self.api, self.number = api, number
        self.gate = threading.Event()

    def record(self, stream: FakeStream) -> None:
        self.api.log.append(f"record {self.number} on {stream.name}")
        stream.do(self.gate.set)

    def synchronize(self) -> None:
        assert self.gate.wait(10)
        if self.api.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeCuda:
    """`DeviceApi`.

    `stops_at_fence`: whoever is waited for does no more than he must; else he goes on to his end.
    `refusal`: the driver's word when memory is to be pinned.
    """

    def __init__(self, *, is_gated: bool = False, stops_at_fence: bool = False, refusal: str = "") -> None:
        self.log: list[str] = []
        self.is_gated, self.stops_at_fence, self.refusal = is_gated, stops_at_fence, refusal
        self.fails = self.is_graph = False
        self.refuses_copy_number = -1
        self.copies = self.refused = 0
        self.unpinned: list[int] = []
        self.pinned_bytes = 0
        self.unconfined_once = threading.Event()
        self._events = 0
        self._streams: list[FakeStream] = []
        self._lock = threading.Lock()

    # --- DeviceApi ----------------------------------------------------------------------------------------------
    def Stream(self, device: torch.device) -> FakeStream:
        self._streams.append(FakeStream(self, f"side {device.index or 0}"))
        return self._streams[-1]

    def Event(self) -> FakeEvent:
        self._events += 1
        return FakeEvent(self, self._events - 1)

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, f"training {device.index or 0}")

    @contextlib.contextmanager
    def use(self, device: torch.device) -> Iterator[None]:
        self.log.append(f"on device {device.index or 0}")
        yield

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current = stream
        yield
        del self._current

    def is_capturing(self) -> bool:
        return self.is_graph

    @contextlib.contextmanager
    def unconfined(self) -> Iterator[None]:
        self.unconfined_once.set()
        yield

    def register(self, address: int, nbytes: int) -> str:
        if not self.refusal:
            self.pinned_bytes += nbytes
        return self.refusal

    def unregister(self, address: int) -> None:
        self.unpinned.append(address)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def gather(self, into: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        stream = getattr(self, "_current", None)
        self.log.append(f"gather {len(into)} on {'training' if stream is None else stream.name}")
        if stream is None:
            torch._foreach_copy_(into, sources)
        else:
            stream.do(lambda: torch._foreach_copy_(into, sources))

    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: FakeStream) -> None:
        if self.copies == self.refuses_copy_number:
            self.refuses_copy_number, self.refused = -1, self.refused + 1
            raise RuntimeError("CUDA error: out of memory")
        self.copies += 1
        stream.do(lambda: _move(destination, source, nbytes))

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: FakeStream) -> None:
        self.copies += 1
        stream.do(lambda: _move(destination, source, nbytes))

    # --- the test's side ----------------------------------------------------------------------------------------
    def open_gate(self) -> None:
        """The side streams do all that they were told."""
        with self._lock:
            for stream in self._streams:
                while stream.waiting:
                    stream.waiting.pop(0)()

    def let_go(self, event: FakeEvent) -> None:
        """The training stream waits for `event`: the side streams go on."""
        with self._lock:
            for stream in self._streams:
                while stream.waiting and not (self.stops_at_fence and event.gate.is_set()):
                    stream.waiting.pop(0)()


def _move(destination: int, source: int, nbytes: int) -> None:
    ctypes.memmove(destination, source, nbytes)


def pretend(monkeypatch: pytest.MonkeyPatch, api: FakeCuda) -> None:
    """From now on the client takes the large tensors of the host's memory for a device's, and `api` for CUDA."""

    def on_device(layout: object, walk: object) -> dict[int, int]:
        first: dict[int, int] = {}
        for buffer, region in enumerate(layout.region_of):  # type: ignore[attr-defined]
            first.setdefault(region, buffer)
        return first

    monkeypatch.setattr(device_module, "first_buffers", on_device)
    monkeypatch.setattr("snapd_client.capture.DeviceStage", lambda: DeviceStage(api))
