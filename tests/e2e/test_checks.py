"""Which check finds which careless write, as a table; what docs/checks.md promises is never committed, is not.

Every write happens right after `snap.step` returned, before the bytes that it changes were copied: the test asserts
that the copy was still under way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snapd_client import Snapshotter
from snapd_native import ZERO_FILL, CopyEngine, CopyPlan

from demo.node import Node

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 1024, 2
KEPT: list[Any] = []  # what keeps the copy thread busy
AUDITS = ("counters", "sampled", "full")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node("snapd-test-checks") as node:
        os.environ.update(node.env())
        yield node
        for name in node.env():
            del os.environ[name]


def victim(model: torch.nn.Module) -> torch.Tensor:
    """The parameter that is copied last."""
    return list(model.parameters())[-1]


def in_place(model: torch.nn.Module) -> None:
    with torch.no_grad():
        victim(model).add_(1)


def through_data(model: torch.nn.Module) -> None:
    victim(model).data.add_(1)


def through_numpy(model: torch.nn.Module) -> None:
    victim(model).detach().numpy()[:] += 1


def raw_pointer(model: torch.nn.Module) -> None:
    tensor = victim(model)
    ctypes.memset(tensor.data_ptr(), 7, tensor.numel() * 4)


def fused_optimizer(model: torch.nn.Module) -> None:
    """One that is not in the mapping: no fence, and its kernel raises no counter."""
    tensor = victim(model)
    tensor.grad = torch.ones_like(tensor)
    torch.optim.AdamW([tensor], lr=0.1, fused=True).step()


def other_storage(model: torch.nn.Module) -> None:
    tensor = victim(model)
    tensor.data = tensor.data + 1


def one_element(model: torch.nn.Module) -> None:
    """Outside every window that this capture samples (4 KiB of 4 MiB)."""
    victim(model).data.view(-1)[WIDTH * WIDTH // 2] += 1


WRITES: dict[str, Callable[[torch.nn.Module], None]] = {
    "in place (`p.add_`)": in_place,
    "through `p.data`": through_data,
    "through a numpy view": through_numpy,
    "by raw pointer": raw_pointer,
    "fused optimizer outside the mapping": fused_optimizer,
    "`p.data = other`": other_storage,
    "one element through `p.data`": one_element,
}

# what each audit finds, and by what; "-": committed although it was changed
EXPECTED = {
    "in place (`p.add_`)": ("counter", "counter", "counter"),
    "through `p.data`": ("-", "sample", "comparison"),
    "through a numpy view": ("-", "sample", "comparison"),
    "by raw pointer": ("-", "sample", "comparison"),
    "fused optimizer outside the mapping": ("-", "sample", "comparison"),
    "`p.data = other`": ("address", "address", "address"),
    "one element through `p.data`": ("-", "-", "comparison"),
}
REASONS = {1: "counter", 2: "sample", 4: "comparison"}


def outcome(write: Callable[[torch.nn.Module], None], audit: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a capture that is disturbed by `write` ends in."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snap = Snapshotter(
        {"model": model, "optimizer": optimizer}, job="checks", audit=audit, fresh=True, strict=True
    )
    try:
        snap.step(1, wait="captured")
        hold_copies(monkeypatch, snap)
        snap.step(2)
        inflight = snap._capturer._inflight
        assert inflight is not None and not inflight.is_settled
        address = victim(model).data_ptr()
        write(model)
        snap.fence()
        assert inflight.is_settled
        health = snap.health()
        if health["discarded"]:
            assert health["last_discard"] == [f"model.{LAYERS - 1}.weight"]
            assert snap.last() == 1, "what a check found was committed all the same"
            is_moved = victim(model).data_ptr() != address and inflight.reason == 1
            return "address" if is_moved else REASONS[inflight.reason]
        assert snap.wait("captured") == "captured" and snap.last() == 2
        return "-"
    finally:
        release_copies(monkeypatch)
        snap.close(final=True)


def hold_copies(monkeypatch: pytest.MonkeyPatch, snap: Snapshotter) -> None:
    """The copy thread is kept busy elsewhere: only the fence copies, so the write surely comes first."""

    def not_told(*_: object) -> None:
        """The control thread does not learn of this ticket."""

    engine = CopyEngine(1)
    room, count = torch.zeros(64 << 20, dtype=torch.uint8), 256
    columns = (
        [ZERO_FILL] * count,
        [0] * count,
        [0] * count,
        [0] * count,
        [room.numel()] * count,
        [0] * count,
    )
    KEPT[:] = [room, engine, engine.submit(CopyPlan(*columns), [], [room.data_ptr()])]
    monkeypatch.setattr(snap._capturer, "_engine", engine)
    monkeypatch.setattr(snap._control, "watch", not_told)


def release_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    if KEPT:
        KEPT[2].cancel()
        KEPT[1].close()
        KEPT.clear()
    monkeypatch.undo()


def table(found: dict[str, tuple[str, ...]]) -> str:
    """As docs/checks.md shows it."""
    lines = [
        "| a write between `snap.step` and the copy | `counters` | `sampled` (default) | `full` |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in found.items()]
    return "\n".join(lines)


def test_what_each_audit_finds(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        name: tuple(outcome(write, audit, monkeypatch) for audit in AUDITS) for name, write in WRITES.items()
    }
    print(table(found))
    assert found == EXPECTED
    assert table(EXPECTED) in (ROOT / "docs" / "checks.md").read_text()


def test_an_average_updated_late_costs_two_snapshots_not_all(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An EMA that is updated right after `snap.step`: found twice, then taken early, by name, with one warning."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1024, 1024, bias=False)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "ema": average, "optimizer": optimizer}
    snap = Snapshotter(state, job="late-ema", fresh=True, strict=True)
    hold_copies(monkeypatch, snap)
    at_step: dict[int, torch.Tensor] = {}
    for step in range(1, 7):
        model(torch.randn(4, 1024)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        at_step[step] = average.module.weight.detach().clone()
        snap.step(step)
        average.update_parameters(model)
    assert snap.wait("captured") == "captured"
    health = snap.health()
    assert health["discarded"] == 2 and health["committed"] == 4
    warnings = [record.getMessage() for record in caplog.records if "changes outside" in record.getMessage()]
    assert len(warnings) == 1 and "ema.module.weight" in warnings[0]
    assert snap.rollback() == 6
    assert torch.equal(average.module.weight, at_step[6])
    release_copies(monkeypatch)
    snap.close(final=True)
