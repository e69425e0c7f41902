"""What leaves a device lies in the arena byte for byte as the host's copy engine would have put it there."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
import snapd_native as native
import torch
from snapd_client.device import (
    WINDOW_BYTES,
    DeviceCapture,
    DevicePlan,
    Part,
    Sampling,
    Staging,
    choose_windows,
)
from snapd_client.errors import CaptureError
from snapd_client.lanes import Placement
from snapd_client.stage import DeviceStage
from snapd_client.state.layout import Binding, Layout
from snapd_client.state.tree import Walk

from tests.support.fake_cuda import FakeCuda, pretend
from tests.support.loopback import Loopback, make_tree

CHUNK_BYTES = 4096


class Scene:
    """A trained model whose tensors all pretend to lie on a device, and an arena with its frames in disorder."""

    def __init__(self, api: FakeCuda, *, spread: bool, reused: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(96, 127), torch.nn.BatchNorm1d(127), torch.nn.Linear(127, 150)
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.model(torch.randn(4, 96)).square().sum().backward()
        optimizer.step()
        self.loopback = Loopback(
            make_tree({"model": self.model, "optimizer": optimizer}), chunk_bytes=CHUNK_BYTES
        )
        self.expected = self.loopback.capture().data
        self.walk: Walk = self.loopback.tree.walk()
        self.layout: Layout
        self.binding: Binding
        self.layout, self.binding = self.loopback.fit(self.walk)
        count = len(self.layout.chunk_nbytes)
        frames = list(range(count))
        if spread:
            random.Random(5).shuffle(frames)
        self.arena = np.full(count * CHUNK_BYTES, 0xA5, dtype=np.uint8)
        addresses = array("Q", [self.arena.ctypes.data + frame * CHUNK_BYTES for frame in frames])
        flags = [native.ENTRY_REUSED if chunk in reused else 0 for chunk in range(count)]
        self.placement = Placement([0] * count, frames, flags, addresses)
        self.chunks = None if not reused else frozenset(range(count)) - reused
        self.stage = DeviceStage(api)
        self.plan = DevicePlan(self.layout, self.walk, CHUNK_BYTES)

    def start(self, turn: int = 0, *, is_on: bool = True, is_full: bool = False) -> DeviceCapture:
        return self.plan.start(
            self.stage, self.walk, self.binding, self.placement,
            chunks=self.chunks, sampling=Sampling(is_on, turn, is_full),
        )  # fmt: skip

    def shard(self) -> np.ndarray:
        """The arena in the shard's order; the alignment gaps, which the host fills, are zero."""
        size = CHUNK_BYTES
        found = np.concatenate([self.arena[frame * size :][:size] for frame in self.placement.frames])
        for arrays in (self.layout.early, self.layout.lazy):
            for source, _, chunk, at, nbytes, _ in zip(*arrays, strict=True):
                if source == native.ZERO_FILL:
                    found[chunk * size + at : chunk * size + at + nbytes] = 0
        return found

    def device_bytes(self) -> np.ndarray:
        """Which bytes of the shard come from tensors."""
        mask = np.zeros(len(self.arena), dtype=bool)
        for arrays in (self.layout.early, self.layout.lazy):
            for source, _, chunk, at, nbytes, _ in zip(*arrays, strict=True):
                if source != native.ZERO_FILL:
                    mask[chunk * CHUNK_BYTES + at :][:nbytes] = True
        return mask


@pytest.fixture
def api() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def scenes(api: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scene]]:
    pretend(monkeypatch, api)
    made: list[Scene] = []
    yield made
    for scene in made:
        scene.stage.close()


@pytest.mark.parametrize("spread", [False, True])
def test_every_byte_as_the_copy_engine_puts_it(api: FakeCuda, scenes: list[Scene], spread: bool) -> None:
    scene = Scene(api, spread=spread)
    scenes.append(scene)
    capture = scene.start()
    capture.transfer.wait()
    mask = scene.device_bytes()
    assert np.array_equal(scene.shard()[mask], scene.expected[mask])
    assert capture.early_nbytes > 0 and capture.lazy_nbytes > 0
    assert capture.differing(scene.placement, CHUNK_BYTES) == []


def test_bytes_that_no_tensor_has_stay_untouched_or_zero(api: FakeCuda, scenes: list[Scene]) -> None:
    """Gathered blocks carry the gaps between their tensors along: these must be zero, or equal state would differ."""
    scene = Scene(api, spread=True)
    scenes.append(scene)
    scene.start().transfer.wait()
    size = CHUNK_BYTES
    found = np.concatenate([scene.arena[frame * size :][:size] for frame in scene.placement.frames])
    assert set(np.unique(found[~scene.device_bytes()])) <= {0, 0xA5}


def test_neighbours_travel_together(api: FakeCuda, scenes: list[Scene]) -> None:
    """Frames side by side and small tensors next to each other: few copies, not one for each chunk and tensor."""
    scene = Scene(api, spread=False)
    scenes.append(scene)
    scene.start().transfer.wait()
    pieces = sum(source != native.ZERO_FILL for source in scene.layout.lazy.src_index)
    assert 0 < api.copies < pieces / 2


def test_chunks_that_are_reused_are_not_written(api: FakeCuda, scenes: list[Scene]) -> None:
    whole = Scene(api, spread=False)
    reused = frozenset(range(2, len(whole.layout.chunk_nbytes), 3))
    scene = Scene(api, spread=True, reused=reused)
    scenes += [whole, scene]
    capture = scene.start()
    capture.transfer.wait()
    mask = scene.device_bytes()
    for chunk in range(len(scene.layout.chunk_nbytes)):
        bytes_of = slice(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES)
        found, expected = scene.shard()[bytes_of][mask[bytes_of]], scene.expected[bytes_of][mask[bytes_of]]
        assert (set(found) <= {0xA5}) if chunk in reused else np.array_equal(found, expected)
    assert capture.differing(scene.placement, CHUNK_BYTES) == []


def test_the_same_bytes_again_after_the_memory_has_moved(api: FakeCuda, scenes: list[Scene]) -> None:
    scene = Scene(api, spread=True)
    scenes.append(scene)
    scene.start().transfer.wait()
    with torch.no_grad():
        for parameter in scene.model.parameters():
            parameter.data = parameter.detach() + 1
    expected = scene.loopback.capture().data
    scene.walk = scene.loopback.tree.walk()
    scene.layout, scene.binding = scene.loopback.fit(scene.walk)
    scene.start().transfer.wait()
    mask = scene.device_bytes()
    assert np.array_equal(scene.shard()[mask], expected[mask])


def test_a_write_behind_the_fences_back_is_found_by_the_sample(scenes: list[Scene], api: FakeCuda) -> None:
    """On a side stream of the user's, say: the copy then holds what was there when it came by."""
    api.is_gated = True
    scene = Scene(api, spread=True)
    scenes.append(scene)
    capture = scene.start()
    scene.model[0].weight.data.add_(1)
    api.open_gate()
    capture.transfer.wait()
    regions = capture.differing(scene.placement, CHUNK_BYTES)
    assert [scene.layout.region_names[region] for region in regions] == ["model.0.weight"]


def test_an_early_tensor_keeps_its_value(scenes: list[Scene], api: FakeCuda) -> None:
    api.is_gated = True
    scene = Scene(api, spread=False)
    scenes.append(scene)
    capture = scene.start()
    scene.model[1].running_mean.fill_(7)
    api.open_gate()
    capture.transfer.wait()
    mask = scene.device_bytes()
    assert np.array_equal(scene.shard()[mask], scene.expected[mask])


def test_the_full_audit_finds_one_element(scenes: list[Scene], api: FakeCuda) -> None:
    api.is_gated = True
    scene = Scene(api, spread=False)
    scenes.append(scene)
    capture = scene.start(is_full=True)
    scene.model[2].weight.data.view(-1)[9000] += 1
    api.open_gate()
    capture.transfer.wait()
    regions = capture.differing(scene.placement, CHUNK_BYTES)
    assert [scene.layout.region_names[region] for region in regions] == ["model.2.weight"]


def test_without_samples_nothing_is_compared(scenes: list[Scene], api: FakeCuda) -> None:
    scene = Scene(api, spread=False)
    scenes.append(scene)
    capture = scene.start(is_on=False)
    capture.transfer.wait()
    scene.arena[:] = 0
    assert capture.differing(scene.placement, CHUNK_BYTES) == []


def test_windows_reach_every_byte_and_keep_to_their_share() -> None:
    parts = [Part(0, 0, 64, 70_000, 1), Part(1, 0, 80_064, 10, 1), Part(2, 0, 100_032, 9_000, 1)]
    seen = {number: np.zeros(part.nbytes, dtype=bool) for number, part in enumerate(parts)}
    for move in range(80):
        windows = choose_windows(parts, CHUNK_BYTES, move, is_full=False)
        assert sum(window.nbytes for window in windows) <= WINDOW_BYTES
        for window in windows:
            assert window.position % CHUNK_BYTES + window.nbytes <= CHUNK_BYTES
            assert window.position == parts[window.part].position + window.offset
            seen[window.part][window.offset : window.offset + window.nbytes] = True
    assert all(mask.all() for mask in seen.values())


def test_only_alignment_lies_between_the_parts_of_a_block() -> None:
    staging = Staging()
    for part in (Part(0, 0, 0, 4, 1), Part(1, 0, 64, 4, 1), Part(2, 0, 192, 4, 1), Part(3, 0, 256, 4, 2)):
        staging.add(part)
    assert [(block.position, block.nbytes, block.group) for block in staging.blocks] == [
        (0, 68, 1), (192, 4, 1), (256, 4, 2),
    ]  # fmt: skip
    assert staging.offsets == [0, 64, 128, 192]


def test_a_device_that_is_not_cudas_is_refused_by_name() -> None:
    scene = Loopback(make_tree({"bias": torch.ones(3)}))
    scene.capture()
    walk = scene.tree.walk()
    assert scene.layout is not None
    walk.buffers = [torch.ones(3, device="meta")]
    with pytest.raises(CaptureError, match="bias is on a device that cannot be captured"):
        DevicePlan(scene.layout, walk, CHUNK_BYTES)


def test_without_tensors_on_a_device_there_is_no_plan() -> None:
    scene = Loopback(make_tree({"bias": torch.ones(3)}))
    scene.capture()
    assert scene.layout is not None
    assert not DevicePlan(scene.layout, scene.tree.walk(), CHUNK_BYTES).regions
