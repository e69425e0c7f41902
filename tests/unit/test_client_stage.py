"""The device stage against a recorder: order of events, fences without host waits, pinning, failures, descriptors."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest
import torch
from snapd_client.stage import Copy, CudaApi, DeviceApi, DeviceStage, DeviceWork, Gather, flat_bytes
from snapd_client.stage_driver import Driver

from tests.support.fake_cuda import FakeCuda

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def api() -> FakeCuda:
    return FakeCuda(is_gated=True, stops_at_fence=True)


@pytest.fixture
def stage(api: FakeCuda) -> Iterator[DeviceStage]:
    stage = DeviceStage(api)
    yield stage
    api.open_gate()
    stage.close()


KEPT: list[object] = []  # copies are by address: what is freed too early would be written to


class Bytes:
    """Device memory with numbers in it, and host memory that they go to."""

    def __init__(self, *, count: int = 64, group: int = 1, device: torch.device = FIRST) -> None:
        KEPT.append(self)
        self.source = torch.arange(count, dtype=torch.uint8)
        self.target = torch.zeros(count, dtype=torch.uint8)
        self.group, self.device = group, device

    def copy(self) -> Copy:
        return Copy(self.group, self.target.data_ptr(), self.source.data_ptr(), self.source.numel())

    def work(self, *others: Bytes, now: Gather | None = None) -> DeviceWork:
        return DeviceWork(self.device, [now or Gather()], [], [one.copy() for one in (self, *others)])

    def has_arrived(self) -> bool:
        return torch.equal(self.source, self.target)


def test_the_side_stream_waits_for_the_update_and_nobody_waits_for_it(
    api: FakeCuda, stage: DeviceStage
) -> None:
    one = Bytes()
    transfer = stage.submit([one.work()])
    assert api.log == [
        "on device 0",
        "record 0 on training 0",
        "side 0 waits for 0",
        "record 1 on side 0",
    ]
    assert not transfer.is_done() and not one.has_arrived()
    assert transfer.fence(1)
    assert api.log[-1] == "training 0 waits for 1"
    assert one.has_arrived()


def test_a_fence_waits_for_its_own_group_only(api: FakeCuda, stage: DeviceStage) -> None:
    one, other = Bytes(group=1), Bytes(group=2)
    transfer = stage.submit([one.work(other)])
    transfer.fence(1)
    assert one.has_arrived() and not other.has_arrived()
    transfer.fence(-1)
    assert other.has_arrived()


def test_each_device_has_a_stream_of_its_own(api: FakeCuda, stage: DeviceStage) -> None:
    """State on cuda:1 is not copied on a stream of cuda:0, and its fence is on cuda:1's stream."""
    one, other = Bytes(device=FIRST), Bytes(device=SECOND)
    transfer = stage.submit([one.work(), other.work()])
    assert "record 3 on side 1" in api.log and "side 1 waits for 2" in api.log
    api.log.clear()
    transfer.fence(1)
    assert api.log == ["training 0 waits for 1", "training 1 waits for 3"]


def test_what_is_gathered_now_keeps_its_value(api: FakeCuda, stage: DeviceStage) -> None:
    """The early part and the samples: a change right after `submit` does not reach the copy."""
    small = torch.full((8,), 3, dtype=torch.uint8)
    one = Bytes(count=8)
    gather = Gather([one.source], [small])
    transfer = stage.submit([one.work(now=gather)])
    assert api.log[1] == "gather 1 on training" and api.log[2] == "record 0 on training 0"
    small.zero_()
    api.open_gate()
    transfer.wait()
    assert one.target.tolist() == [3] * 8


def test_the_descriptor_becomes_readable_when_the_copies_are_done(api: FakeCuda, stage: DeviceStage) -> None:
    transfer = stage.submit([Bytes(count=12).work()])
    assert select.select([transfer.fileno()], [], [], 0)[0] == []
    assert transfer.progress() == (0, 12)
    api.open_gate()
    assert select.select([transfer.fileno()], [], [], 5)[0] == [transfer.fileno()]
    assert transfer.is_done() and transfer.finished_ns > 0 and transfer.progress() == (12, 12)
    transfer.close()


def test_who_waited_may_close_at_once(api: FakeCuda, stage: DeviceStage) -> None:
    """The waiter must not write to a descriptor that is closed, and may be somebody else's, by then."""
    for _ in range(300):
        transfer = stage.submit([Bytes(count=1).work()])
        api.open_gate()
        transfer.wait()
        assert transfer.finished_ns > 0
        transfer.close()
        reader, writer = os.pipe()  # the number that was just given back is taken
        assert select.select([reader], [], [], 0)[0] == []
        os.close(reader)
        os.close(writer)
    assert stage._thread.is_alive()


def test_a_device_that_fails_ends_the_copy_as_cancelled(api: FakeCuda, stage: DeviceStage) -> None:
    """An illegal address in a kernel of the user's: nobody waits for ever, nothing is committed, the thread lives."""
    api.fails = True
    transfer = stage.submit([Bytes().work()])
    api.open_gate()
    transfer.wait()
    assert transfer.is_cancelled
    api.fails = False
    again = stage.submit([Bytes().work()])
    api.open_gate()
    again.wait()
    assert not again.is_cancelled


def test_nothing_is_under_way_after_a_refused_copy(api: FakeCuda, stage: DeviceStage) -> None:
    """The frames go to somebody else: what had been enqueued into them must be over."""
    one, other = Bytes(), Bytes()
    api.refuses_copy_number = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        stage.submit([one.work(other)])
    assert one.has_arrived() and "side 0 is synchronised" in api.log


def test_inside_a_graph_capture_the_fence_touches_no_stream(api: FakeCuda, stage: DeviceStage) -> None:
    transfer = stage.submit([Bytes().work()])
    api.log.clear()
    api.is_graph = True
    assert not transfer.fence(1)
    assert api.log == []
    api.is_graph = False
    api.open_gate()
    transfer.wait()
    api.is_graph = True
    assert transfer.fence(1)  # all is copied: there is nothing to wait for


def test_a_thread_of_ours_does_not_disturb_graph_captures() -> None:
    api = FakeCuda()
    stage = DeviceStage(api)
    assert api.unconfined_once.wait(5)
    stage.close()


def test_flat_bytes_begins_where_the_view_begins() -> None:
    base = torch.arange(10, dtype=torch.int32)
    assert flat_bytes(base[3:], 4, 8).view(torch.int32).tolist() == [4, 5]


def test_a_segment_that_cannot_be_pinned_is_counted_not_fatal(caplog: pytest.LogCaptureFixture) -> None:
    stage = DeviceStage(FakeCuda(refusal="CUDA_ERROR_OUT_OF_MEMORY"))
    stage.register(4096, 1000)
    stage.register(8192, 1000)
    assert stage.pageable_bytes == 2000
    said = [record.getMessage() for record in caplog.records if "cannot be pinned" in record.getMessage()]
    assert len(said) == 1 and "CUDA_ERROR_OUT_OF_MEMORY" in said[0]
    stage.close()


def test_segments_are_pinned_once_and_unpinned_at_close(api: FakeCuda) -> None:
    stage = DeviceStage(api)
    stage.register(4096, 10)
    stage.register(4096, 10)
    stage.close()
    stage.close()
    assert api.unpinned == [4096] and api.pinned_bytes == 10
    assert stage.pageable_bytes == 0


def test_closing_joins_the_thread(api: FakeCuda) -> None:
    before = threading.active_count()
    stage = DeviceStage(api)
    stage.close()
    assert threading.active_count() == before


def test_the_calls_of_torch_exist() -> None:
    """The names that CudaApi uses exist in this torch, device or not."""
    names = ("Stream", "Event", "current_stream", "stream", "device", "is_current_stream_capturing")
    assert [name for name in names if not hasattr(torch.cuda, name)] == []
    offered = {name for name in vars(DeviceApi) if not name.startswith("_")}
    assert [name for name in offered if not hasattr(CudaApi, name)] == []


def test_without_cuda_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapd_client.stage_driver._LIBRARY", "libsnapd-no-such-driver.so.1")
    with pytest.raises(Exception, match="captured with CUDA only"):
        Driver()
