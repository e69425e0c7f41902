"""Chunks of a restore that belong on a device: verified in the arena, and copied straight from there."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from .stage import CudaApi, DeviceApi
from .state.pieces import PlanArrays


class Row(NamedTuple):
    """`nbytes` bytes of a chunk, from `offset` on, to `address` on the device."""

    device: torch.device
    address: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Ways:
    """A restore plan in two: for the copy engine (as `PendingRestore` has it), and the rows for devices by chunk."""

    plan: PlanArrays
    pieces_of_chunk: list[tuple[int, int]]
    device_rows: dict[int, list[Row]]


def split_ways(
    plan: PlanArrays,
    pieces_of_chunk: list[tuple[int, int]],
    destinations: Sequence[int],
    device_of: Mapping[int, torch.device],
) -> Ways:
    """Pure. Without destinations on a device everything stays as it is."""
    if not device_of:
        return Ways(plan, pieces_of_chunk, {})
    devices = [device_of.get(address) for address in destinations]
    host = PlanArrays(*(array(column.typecode) for column in plan))
    counts: dict[int, int] = {}
    firsts: dict[int, int] = {}
    rows: dict[int, list[Row]] = {}
    for row in zip(*plan, strict=True):
        chunk, start, destination, offset, nbytes, _ = row
        device = devices[destination]
        if device is not None:
            rows.setdefault(chunk, []).append(Row(device, destinations[destination] + offset, start, nbytes))
            continue
        firsts.setdefault(chunk, len(host.nbytes))
        counts[chunk] = counts.get(chunk, 0) + 1
        for column, value in zip(host, row, strict=True):
            column.append(value)
    pieces = [(firsts.get(chunk, 0), counts.get(chunk, 0)) for chunk in range(len(pieces_of_chunk))]
    return Ways(host, pieces, rows)


class ToDevices:
    """Copies to devices, on a stream of each; all are over when the context is left. `copy` may be called anywhere.

    Nothing that was enqueued before it was made sees the copies, and everything enqueued after it was left does.
    """

    def __init__(self, devices: Iterable[torch.device], make_api: Callable[[], DeviceApi] = CudaApi) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._api: DeviceApi | None = None
        for device in devices:
            api = self._api = self._api or make_api()
            ready = api.Event()
            ready.record(api.current_stream(device))
            stream = self._streams[device] = api.Stream(device)
            stream.wait_event(ready)

    def copy(self, base: int, rows: Iterable[Row]) -> None:
        """Enqueue the rows of the chunk at `base`.

        Raises:
            CaptureError: the driver refused.
        """
        api = self._api
        if api is None:
            return
        with api.unconfined():
            for device, address, offset, nbytes in rows:
                with api.use(device):
                    api.copy_to_device(address, base + offset, nbytes, self._streams[device])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.synchronize()
