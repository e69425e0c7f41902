"""The device stage against a recorder of the stream API: order of events, fences without host waits, pinning."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from snapd_client.stage import DevicePiece, DeviceStage, flat_bytes


class FakeEvent:
    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number = log, number
        self.gate = threading.Event()

    def record(self, stream: FakeStream) -> None:
        self.log.append(f"record {self.number} on {stream.name}")

    def query(self) -> bool:
        return self.gate.is_set()

    def synchronize(self) -> None:
        assert self.gate.wait(5)


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for {event.number}")


class FakeApi:
    """Copies happen at once (they are CPU tensors); events stay unset until the test opens them."""

    def __init__(self, pins: bool = True) -> None:
        self.log: list[str] = []
        self.events: list[FakeEvent] = []
        self.training = FakeStream(self.log, "training")
        self.pins = pins
        self.unpinned: list[int] = []

    def Stream(self) -> FakeStream:
        return FakeStream(self.log, "side")

    def Event(self) -> FakeEvent:
        event = FakeEvent(self.log, len(self.events))
        self.events.append(event)
        return event

    def current_stream(self) -> FakeStream:
        return self.training

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")

    def host_register(self, address: int, nbytes: int) -> bool:
        return self.pins

    def host_unregister(self, address: int) -> None:
        self.unpinned.append(address)

    def open_events(self) -> None:
        for event in self.events:
            event.gate.set()


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def stage(api: FakeApi) -> Iterator[DeviceStage]:
    stage = DeviceStage(api)
    yield stage
    api.open_events()
    stage.close()


def piece(values: torch.Tensor, group: int = 0, is_early: bool = False) -> DevicePiece:
    nbytes = values.numel() * values.element_size()
    return DevicePiece(flat_bytes(values, 0, nbytes), torch.zeros(nbytes, dtype=torch.uint8), group, is_early)


def test_the_side_stream_waits_for_the_update_and_nobody_waits_for_it(
    api: FakeApi, stage: DeviceStage
) -> None:
    source = piece(torch.arange(5.0), group=1)
    transfer = stage.submit([source])
    assert api.log == [
        "record 0 on training",
        "side waits for 0",
        "enter side",
        "record 1 on side",
        "leave side",
    ]
    assert not transfer.is_done()
    transfer.fence(1)
    assert api.log[-1] == "training waits for 1"
    assert source.destination.view(torch.float32).tolist() == [0, 1, 2, 3, 4]


def test_groups_are_fenced_one_by_one_in_order(api: FakeApi, stage: DeviceStage) -> None:
    transfer = stage.submit([piece(torch.ones(2), group=2), piece(torch.ones(2), group=1)])
    records = [line for line in api.log if line.endswith("on side")]
    assert records == ["record 1 on side", "record 2 on side"]
    api.events[1].gate.set()
    assert transfer.is_done(1) and not transfer.is_done(2) and not transfer.is_done()


def test_the_descriptor_becomes_readable_when_the_copies_are_done(api: FakeApi, stage: DeviceStage) -> None:
    transfer = stage.submit([piece(torch.ones(3))])
    assert select.select([transfer.fileno()], [], [], 0)[0] == []
    api.open_events()
    assert select.select([transfer.fileno()], [], [], 5)[0] == [transfer.fileno()]
    assert transfer.finished_ns > 0 and transfer.progress() == (12, 12)
    os.close(transfer.fileno())


def test_early_tensors_leave_from_a_clone(stage: DeviceStage) -> None:
    """Whatever happens to the source after `submit` returned does not reach the copy: there was a clone."""
    values = torch.arange(4.0)
    source = piece(values, is_early=True)
    transfer = stage.submit([source])
    assert transfer._keep[0].data_ptr() != values.data_ptr()


def test_a_sample_finds_a_copy_that_is_not_what_was_handed_over(api: FakeApi, stage: DeviceStage) -> None:
    good, torn = piece(torch.arange(100.0)), piece(torch.arange(100.0))
    sample = stage.sample([good, torn], turn=0)
    stage.submit([good, torn])
    torn.destination[7] ^= 1
    assert sample.differing() == [1]


def test_flat_bytes_begins_where_the_view_begins() -> None:
    base = torch.arange(10, dtype=torch.int32)
    assert flat_bytes(base[3:], 4, 8).view(torch.int32).tolist() == [4, 5]


def test_a_segment_that_cannot_be_pinned_is_counted_not_fatal(caplog: pytest.LogCaptureFixture) -> None:
    stage = DeviceStage(FakeApi(pins=False))
    stage.register(4096, 1000)
    stage.register(8192, 1000)
    assert stage.pageable_bytes == 2000
    assert sum("cannot be pinned" in record.getMessage() for record in caplog.records) == 1
    stage.close()


def test_segments_are_pinned_once_and_unpinned_at_close(api: FakeApi) -> None:
    stage = DeviceStage(api)
    stage.register(4096, 10)
    stage.register(4096, 10)
    stage.close()
    stage.close()
    assert api.unpinned == [4096]
    assert stage.pageable_bytes == 0


def test_unused_api_shape_matches_torch() -> None:
    """The names that CudaApi calls exist in this torch, device or not."""
    cuda: Any = torch.cuda
    for name in ("Stream", "Event", "current_stream", "stream", "cudart"):
        assert hasattr(cuda, name)
