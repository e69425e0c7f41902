"""Device memory to the arena: a side stream, events, and segments registered as pinned memory.

With `stage_driver`, the only code that touches CUDA. It has the shape of the copy engine (submit -> something to wait
on), so that the capture pipeline does not know which of the two moves a region. The differences that matter:

- `submit` records an event on the current stream and lets the side stream wait for it: the copy sees the state as it
  is after the update, and neither the host nor the current stream waits;
- the fence is a stream-side wait on an event: the host runs ahead, the update's kernels do not;
- the early part and the samples are gathered on the current stream, and leave from there;
- nothing here waits on the training thread but `DeviceTransfer.wait`, and that without a call into CUDA: a thread
  learns of the end, and says so. So the user may capture a CUDA graph whenever he likes.

What ran on hardware, and what it printed, is in docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .stage_driver import Driver

_log = logging.getLogger(__name__)


class DeviceApi(Protocol):
    """What is used of `torch.cuda` and the driver; unit tests put a recorder in its place."""

    def Stream(self, device: torch.device) -> Any: ...
    def Event(self) -> Any: ...
    def current_stream(self, device: torch.device) -> Any: ...
    def use(self, device: torch.device) -> AbstractContextManager[Any]: ...
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...
    def is_capturing(self) -> bool: ...
    def unconfined(self) -> AbstractContextManager[None]: ...
    def register(self, address: int, nbytes: int) -> str: ...
    def unregister(self, address: int) -> None: ...
    def pinned(self, nbytes: int) -> torch.Tensor: ...
    def gather(self, into: list[torch.Tensor], sources: list[torch.Tensor]) -> None: ...
    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: Any) -> None: ...
    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: Any) -> None: ...


class CudaApi:
    """`torch.cuda`, and the driver for what it does not offer. Made on the training thread."""

    def __init__(self) -> None:
        self._driver = Driver()
        torch.cuda.current_stream().query()  # the context exists from here on
        self._context = self._driver.context()

    def Stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def Event(self) -> Any:
        """Whoever waits for it sleeps; by default torch's events keep a core busy."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def use(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    @contextlib.contextmanager
    def unconfined(self) -> Any:
        """For threads of ours: with a context, and out of the way of the user's graph captures."""
        if not self._driver.context():
            self._driver.use(self._context)
        with self._driver.unconfined():
            yield

    def register(self, address: int, nbytes: int) -> str:
        """Pin pages that the daemon has allocated; the driver's word for why not."""
        with self.unconfined():
            return self._driver.register(address, nbytes)

    def unregister(self, address: int) -> None:
        with self.unconfined():
            self._driver.unregister(address)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def gather(self, into: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """One kernel for many small copies within the device."""
        torch._foreach_copy_(into, sources)

    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: Any) -> None:
        self._driver.copy_to_host(destination, source, nbytes, stream.cuda_stream)

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: Any) -> None:
        self._driver.copy_to_device(destination, source, nbytes, stream.cuda_stream)


def flat_bytes(tensor: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """`nbytes` bytes of the tensor's storage, from `offset` bytes after its first element, as flat uint8."""
    start = tensor.storage_offset() * tensor.element_size() + offset
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (nbytes,), (1,))


class Copy(NamedTuple):
    """Bytes of the device at `source` to host memory at `destination`; `group` is that of the fence."""

    group: int
    destination: int
    source: int
    nbytes: int


@dataclass
class Gather:
    """Small pieces of device memory that are brought together on the device: `sources[i]` into `into[i]`."""

    into: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)


@dataclass
class DeviceWork:
    """What one capture copies from one device.

    `now` is gathered on the current stream, before anything that the training thread does next (early part, samples);
    `later` on the side stream (small tensors of the lazy part). `copies`, in order of group, leave after both.
    """

    device: torch.device
    now: list[Gather]
    later: list[Gather]
    copies: list[Copy]


class DeviceTransfer:
    """Copies under way on the side streams."""

    def __init__(self, api: DeviceApi, nbytes: int, keep: object) -> None:
        self._api, self._nbytes, self._keep = api, nbytes, keep
        self._events: list[tuple[int, torch.device, Any]] = []  # (group, device, event), in order per device
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self.is_cancelled = False
        self.helped_bytes = 0
        self.finished_ns = 0

    def add_event(self, group: int, device: torch.device, event: Any) -> None:
        """All copies of the groups up to `group` on this device are before `event`."""
        self._events.append((group, device, event))

    def fence(self, group: int) -> bool:
        """Work submitted to the current streams from now on runs after the copies of `group` (-1: all).

        False: the current stream is being captured into a graph, so that nothing was done: a graph cannot wait
        for what is outside it, and its replays call no hooks.
        """
        if self._arrived.is_set():
            return True
        if self._api.is_capturing():
            return False
        for number, device, event in self._events:
            if group in (-1, number):
                self._api.current_stream(device).wait_event(event)
        return True

    def wait(self) -> None:
        """Wait on the host until everything is copied. No call into CUDA."""
        self._arrived.wait()

    def is_done(self) -> bool:
        """Whether everything is copied, and `wait` returns at once. No call into CUDA."""
        return self._arrived.is_set()

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
        """On the waiter's thread: block until the copies are done, then say so. Raises nothing.

        A device that has failed (an illegal address in somebody's kernel) ends the copy as cancelled.
        """
        try:
            for _, _, event in self._events:
                event.synchronize()
        except RuntimeError as error:
            self.is_cancelled = True
            _log.warning("snapd: the device failed while a snapshot was copied: %s", error)
        self.finished_ns = time.monotonic_ns()
        self._keep = None
        with (
            self._lock
        ):  # close() waits for this: a descriptor must not be written to that is somebody else's by then
            self._arrived.set()
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """After `wait`, or after `is_done` was true."""
        with self._lock:
            os.close(self._fd)


class DeviceStage:
    """Side streams, one per device, and the thread that learns when their copies are done."""

    def __init__(self, api: DeviceApi | None = None) -> None:
        self._api: DeviceApi = api if api is not None else CudaApi()
        self._streams: dict[torch.device, Any] = {}
        self._registered: dict[int, int] = {}
        self._is_warned = False
        self.pageable_bytes = 0
        self._arrivals: queue.SimpleQueue[DeviceTransfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._await_arrivals, name="snapd-device", daemon=True)
        self._thread.start()

    @property
    def api(self) -> DeviceApi:
        return self._api

    def register(self, address: int, nbytes: int) -> None:
        """Pin a segment, once. A refusal costs speed, not correctness: it is counted and said once. Any thread."""
        if address in self._registered:
            return
        refusal = self._api.register(address, nbytes)
        if not refusal:
            self._registered[address] = nbytes
            return
        self.pageable_bytes += nbytes
        if not self._is_warned:
            self._is_warned = True
            _log.warning(
                "snapd: the arena cannot be pinned (%s; memlock limit?); copies from the device will be slower, "
                "and snap.step waits for them",
                refusal,
            )

    def submit(self, works: Sequence[DeviceWork], keep: object = None) -> DeviceTransfer:
        """Start copying; returns without waiting, unless memory is not pinned.

        `keep`: is not freed before the copies are done.

        Raises:
            CaptureError, RuntimeError: CUDA refused; what had been enqueued is over by then.
        """
        transfer = DeviceTransfer(
            self._api, sum(copy.nbytes for work in works for copy in work.copies), (works, keep)
        )
        try:
            for work in works:
                with self._api.use(work.device):
                    self._enqueue(work, transfer)
        except Exception:
            self._drain()
            transfer.close()
            raise
        self._arrivals.put(transfer)
        return transfer

    def _enqueue(self, work: DeviceWork, transfer: DeviceTransfer) -> None:
        api, side = self._api, self.side_stream(work.device)
        for gather in work.now:
            if gather.into:
                api.gather(gather.into, gather.sources)
        ready = api.Event()
        ready.record(api.current_stream(work.device))
        side.wait_event(ready)
        with api.stream(side):
            for gather in work.later:
                if gather.into:
                    api.gather(gather.into, gather.sources)
        group, copy_to_host = -1, api.copy_to_host
        for number, destination, source, nbytes in work.copies:
            if group not in (-1, number):
                self._mark(transfer, group, work.device, side)
            group = number
            copy_to_host(destination, source, nbytes, side)
        self._mark(transfer, max(group, 0), work.device, side)

    def _mark(self, transfer: DeviceTransfer, group: int, device: torch.device, side: Any) -> None:
        event = self._api.Event()
        event.record(side)
        transfer.add_event(group, device, event)

    def side_stream(self, device: torch.device) -> Any:
        """The stream of ours on this device. Training thread."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = self._api.Stream(device)
        return stream

    def _drain(self) -> None:
        """Nothing of ours is under way on any device when this returns."""
        for stream in self._streams.values():
            with contextlib.suppress(RuntimeError):  # the device is lost: nothing is under way either
                stream.synchronize()

    def _await_arrivals(self) -> None:
        with self._api.unconfined():
            while (transfer := self._arrivals.get()) is not None:
                transfer.arrive()
                del transfer  # what it held is freed now, not when the next one comes

    def close(self) -> None:
        """Join and unpin. Idempotent."""
        if self._thread.is_alive():
            self._arrivals.put(None)
            self._thread.join(timeout=10.0)
        for address in self._registered:
            self._api.unregister(address)
        self._registered.clear()
