"""Device memory to the arena: a side stream, events, and segments registered as pinned memory.

The only code that touches CUDA. It has the shape of the copy engine (submit -> something to wait on), so that the
capture pipeline does not know which of the two moves a region. The differences that matter:

- `submit` records an event on the current stream and lets the side stream wait for it: the copy sees the state as it
  is after the update, and neither the host nor the current stream waits;
- the fence is a stream-side wait on an event: the host runs ahead, the update's kernels do not;
- early tensors are cloned on the current stream and leave from the clone.

What was never run on hardware is listed in docs/gpu.md; `make gpu-check` runs it where there is a device.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_log = logging.getLogger(__name__)


class DeviceApi(Protocol):
    """What is used of `torch.cuda`; unit tests put a recorder in its place."""

    def Stream(self) -> Any: ...
    def Event(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...
    def host_register(self, address: int, nbytes: int) -> bool: ...
    def host_unregister(self, address: int) -> None: ...


class CudaApi:
    """`torch.cuda`, and the two calls of the runtime that it does not wrap."""

    _cuda: Any = torch.cuda

    def Stream(self) -> Any:
        return self._cuda.Stream()

    def Event(self) -> Any:
        return self._cuda.Event()

    def current_stream(self) -> Any:
        return self._cuda.current_stream()

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def host_register(self, address: int, nbytes: int) -> bool:
        """Pin pages that the daemon has allocated; False if the driver refuses."""
        return int(self._cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0

    def host_unregister(self, address: int) -> None:
        self._cuda.cudart().cudaHostUnregister(address)


@dataclass(frozen=True)
class DevicePiece:
    """`source` (flat uint8 on the device) to `destination` (flat uint8 over the arena, same length)."""

    source: torch.Tensor
    destination: torch.Tensor
    group: int
    is_early: bool = False


def flat_bytes(tensor: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """`nbytes` bytes of the tensor's storage, from `offset` bytes after its first element, as flat uint8."""
    start = tensor.storage_offset() * tensor.element_size() + offset
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (nbytes,), (1,))


class DeviceTransfer:
    """Copies under way on the side stream."""

    def __init__(self, api: DeviceApi, events: dict[int, Any], nbytes: int, keep: list[torch.Tensor]) -> None:
        self._api, self._events, self._nbytes, self._keep = api, events, nbytes, keep
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_cancelled = False
        self.helped_bytes = 0
        self.finished_ns = 0

    def fence(self, group: int) -> None:
        """Work submitted to the current stream from now on runs after the copies of `group` (-1: all)."""
        for number, event in self._events.items():
            if group in (-1, number):
                self._api.current_stream().wait_event(event)

    def wait(self, group: int = -1, help: bool = True, timeout_s: float = -1.0) -> bool:
        """Wait on the host. `help` changes nothing: a device copies by itself."""
        for number, event in self._events.items():
            if group in (-1, number):
                event.synchronize()
        return not self.is_cancelled

    def is_done(self, group: int = -1) -> bool:
        return all(event.query() for number, event in self._events.items() if group in (-1, number))

    def progress(self) -> tuple[int, int]:
        return (self._nbytes if self.is_done() else 0), self._nbytes

    def cancel(self) -> None:
        """A device copy cannot be called back: wait for it, and mark it."""
        self.wait()
        self.is_cancelled = True

    def fileno(self) -> int:
        """Readable when all is copied."""
        return self._fd

    def arrive(self) -> None:
        """On the waiter's thread: block until the copies are done, then make `fileno` readable."""
        self.wait()
        self.finished_ns = time.monotonic_ns()
        self._keep.clear()
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)


class DeviceSample:
    """A window of each source as it was at the hand-over, kept on the device until the copy is compared with it."""

    def __init__(self, kept: torch.Tensor, windows: list[tuple[int, torch.Tensor]]) -> None:
        self._kept, self._windows = kept, windows

    def differing(self) -> list[int]:
        """Indexes of the pieces whose kept bytes are not those of the copy. Waits for one small transfer."""
        kept = self._kept.cpu()
        wrong, start = [], 0
        for index, destination in self._windows:
            if not torch.equal(kept[start : start + destination.numel()], destination):
                wrong.append(index)
            start += destination.numel()
        return wrong


class DeviceStage:
    """The side stream of one device and the thread that learns when its copies are done."""

    def __init__(self, api: DeviceApi | None = None) -> None:
        self._api: DeviceApi = api if api is not None else CudaApi()
        self._stream = self._api.Stream()
        self._registered: dict[int, int] = {}
        self.pageable_bytes = 0
        self._arrivals: queue.SimpleQueue[DeviceTransfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._await_arrivals, name="snapd-device", daemon=True)
        self._thread.start()

    def register(self, address: int, nbytes: int) -> None:
        """Pin a segment, once. A refusal costs speed, not correctness: it is counted and said once."""
        if address in self._registered:
            return
        if self._api.host_register(address, nbytes):
            self._registered[address] = nbytes
        else:
            if not self.pageable_bytes:
                _log.warning(
                    "snapd: the arena cannot be pinned (memlock limit?); copies from the device will be slower"
                )
            self.pageable_bytes += nbytes

    def submit(self, pieces: Sequence[DevicePiece]) -> DeviceTransfer:
        """Start copying, in order of group; returns without waiting."""
        ready = self._api.Event()
        ordered = sorted(pieces, key=lambda piece: piece.group)
        sources = [piece.source.clone() if piece.is_early else piece.source for piece in ordered]
        ready.record(self._api.current_stream())
        self._stream.wait_event(ready)
        events: dict[int, Any] = {}
        with self._api.stream(self._stream):
            for piece, source in zip(ordered, sources, strict=True):
                piece.destination.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
                events[piece.group] = self._api.Event()
                events[piece.group].record(self._stream)
        nbytes = sum(piece.source.numel() for piece in ordered)
        transfer = DeviceTransfer(self._api, events, nbytes, sources)
        self._arrivals.put(transfer)
        return transfer

    def sample(self, pieces: Sequence[DevicePiece], turn: int, sample_bytes: int = 4096) -> DeviceSample:
        """Keep a window of each lazy piece on the device, in the order of the current stream."""
        kept: list[torch.Tensor] = []
        windows: list[tuple[int, torch.Tensor]] = []
        for index, piece in enumerate(pieces):
            size = min(sample_bytes, piece.source.numel())
            if piece.is_early or size == 0:
                continue
            start = (turn * sample_bytes) % max(1, piece.source.numel() - size + 1)
            kept.append(piece.source[start : start + size])
            windows.append((index, piece.destination[start : start + size]))
        empty = torch.empty(0, dtype=torch.uint8)
        return DeviceSample(torch.cat(kept) if kept else empty, windows)

    def _await_arrivals(self) -> None:
        while (transfer := self._arrivals.get()) is not None:
            transfer.arrive()

    def close(self) -> None:
        """Unpin and join. Idempotent."""
        if self._thread.is_alive():
            self._arrivals.put(None)
            self._thread.join(timeout=10.0)
        for address in self._registered:
            self._api.host_unregister(address)
        self._registered.clear()
