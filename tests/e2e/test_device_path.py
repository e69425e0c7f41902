"""The whole client with a daemon, and host memory that plays a device's: what `make gpu-check` does with a real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from snapd_client import Snapshotter

from demo.node import Node
from tests.support.fake_cuda import FakeCuda, pretend


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node("snapd-test-device") as node:
        os.environ.update(node.env())
        yield node
        for name in node.env():
            del os.environ[name]


class Run:
    """A model and its optimizer, a deterministic step, and the Snapshotter over the pretended device."""

    def __init__(self, job: str, seed: int, **options: object) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 700), torch.nn.BatchNorm1d(700), torch.nn.Linear(700, 64)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.snap = Snapshotter(
            {"model": self.model, "optimizer": self.optimizer}, job=job,
            **{"strict": True, **options},  # type: ignore[arg-type]
        )  # fmt: skip

    def train(self, first: int, last: int, between: Callable[[], None] = lambda: None) -> list[float]:
        losses = []
        for step in range(first, last):
            batch = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            loss = (self.model(batch) - batch).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.snap.step(step + 1)
            between()
        return losses


@pytest.mark.parametrize("is_gated", [False, True])
def test_what_a_device_held_comes_back(node: Node, monkeypatch: pytest.MonkeyPatch, is_gated: bool) -> None:
    """Gated: every copy happens only when the fence asks for it, after the next step's backward."""
    api = FakeCuda(is_gated=is_gated)
    pretend(monkeypatch, api)
    job = f"device-{is_gated}"
    run = Run(job, seed=1)
    expected = run.train(0, 4)
    api.open_gate()
    run.snap.wait("captured", timeout=10)
    health = run.snap.health()
    assert health["discarded"] == health["failures"] == 0 and health["committed"] == 4
    assert health["early_bytes"] + health["lazy_bytes"] > 1 << 18  # type: ignore[operator]
    assert api.pinned_bytes > 0 and api.copies > 4
    expected += run.train(4, 6)
    api.open_gate()
    run.snap.close()

    again = Run(job, seed=2)
    assert again.snap.restore(step=6) == 6
    for one, other in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)
    run.snap = again.snap
    api.is_gated = False
    assert again.train(6, 8) == Run.train(run, 6, 8)
    again.snap.close(final=True)


def test_a_write_on_a_side_stream_is_never_committed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeCuda(is_gated=True)
    pretend(monkeypatch, api)
    run = Run("device-side", seed=1)
    run.train(0, 1)

    def behind_the_fence() -> None:
        for parameter in run.model.parameters():
            parameter.data.add_(1)
        api.open_gate()

    run.train(1, 2, behind_the_fence)
    run.snap.close()
    health = run.snap.health()
    assert (health["committed"], health["discarded"]) == (1, 1)
    assert health["last_discard"]


def test_an_optimizer_waits_for_its_own_tensors_only(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeCuda(is_gated=True, stops_at_fence=True)
    pretend(monkeypatch, api)
    torch.manual_seed(1)
    models = [torch.nn.Linear(300, 300) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    snap = Snapshotter({"models": models, "optimizers": optimizers}, job="device-two", strict=True)
    snap.step(1)
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.ones(1, 300)).sum().backward()
        api.log.clear()
        optimizer.step()
        assert sum("waits for" in line for line in api.log) == 1
    api.open_gate()
    snap.close(final=True)


def test_inside_a_graph_capture_the_fence_only_warns(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = FakeCuda(is_gated=True)
    pretend(monkeypatch, api)
    run = Run("device-graph", seed=1)
    run.train(0, 1)
    before = len(api.log)
    api.is_graph = True
    run.snap.fence()
    run.snap.fence()
    assert api.log[before:] == []
    assert sum("captured in a CUDA graph" in record.getMessage() for record in caplog.records) == 1
    api.is_graph = False
    run.snap.fence()
    assert len(api.log) > before
    run.snap.close(final=True)


def test_a_refused_copy_costs_one_snapshot(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeCuda()
    pretend(monkeypatch, api)
    run = Run("device-refused", seed=1, strict=False)
    run.train(0, 1)
    api.refuses_copy_number = api.copies + 1
    run.train(1, 3)
    assert api.refused == 1
    run.snap.wait("captured", timeout=10)
    health = run.snap.health()
    assert health["committed"] == 2 and health["failures"] >= 1  # type: ignore[operator]
    run.snap.close(final=True)


def test_each_segment_is_pinned_before_it_is_used_and_unpinned_at_the_end(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeCuda()
    pretend(monkeypatch, api)
    run = Run("device-pins", seed=1)
    run.train(0, 3)
    run.snap.wait("captured", timeout=10)
    addresses = {mapping.address for mapping in run.snap._session.segments.values()}
    run.snap.close(final=True)
    assert set(api.unpinned) == addresses and addresses
