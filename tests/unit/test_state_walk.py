"""What a walk notices, what it refuses, and when a layout may be used again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from snapd_client.errors import CaptureError
from torch import nn

from tests.support.loopback import Loopback, make_tree, restore
from tests.support.trees import Slotted, Thing


def linear_world() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_unchanged_structure_keeps_signature_and_names() -> None:
    model, optimizer = linear_world()
    tree = make_tree({"model": model, "optimizer": optimizer})
    step(model, optimizer)
    first = tree.walk()
    step(model, optimizer)
    second = tree.walk()
    assert first.signature == second.signature
    assert first.names is second.names
    assert len(second.buffers) == len(second.outers) == len(second.names)


def test_new_optimizer_state_changes_the_signature() -> None:
    model, optimizer = linear_world()
    tree = make_tree({"model": model, "optimizer": optimizer})
    before = tree.walk()
    step(model, optimizer)
    assert tree.walk().signature != before.signature


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: optimizer.param_groups[0].update(extra=1),
        lambda model, optimizer: setattr(optimizer, "extra", 1),
        lambda model, optimizer: model.append(nn.Linear(4, 4)),
        lambda model, optimizer: model[0].register_buffer("extra", torch.zeros(3)),
        lambda model, optimizer: setattr(model[0], "weight", nn.Parameter(torch.zeros(8, 8))),
        lambda model, optimizer: optimizer.state[model[0].weight].update(exp_avg=torch.zeros(3)),
        lambda model, optimizer: optimizer.state.pop(model[0].weight),
    ],
)
def test_changes_of_structure_are_noticed(change: Any) -> None:
    model, optimizer = linear_world()
    step(model, optimizer)
    loopback = Loopback(make_tree({"model": model, "optimizer": optimizer}))
    loopback.capture()
    change(model, optimizer)
    snapshot = loopback.capture()
    if loopback.layouts_built == 1:
        pytest.fail("the layout was kept")
    fresh, fresh_optimizer = linear_world()
    if change.__code__.co_names[:1] == ("append",):
        fresh.append(nn.Linear(4, 4))
    if "register_buffer" in change.__code__.co_names:
        fresh[0].register_buffer("extra", torch.ones(3))
    if "Parameter" in change.__code__.co_names:
        return  # the new parameter is in no optimizer: another world
    restore(make_tree({"model": fresh, "optimizer": fresh_optimizer}), snapshot)
    for one, other in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: optimizer.param_groups[0].update(lr=0.5),
        lambda model, optimizer: optimizer.state[model[0].weight].update(exp_avg=torch.full((8, 8), 3.0)),
        lambda model, optimizer: setattr(model[0].weight, "data", torch.full((8, 8), 4.0)),
        lambda model, optimizer: model[1].register_buffer("running_mean", torch.full((8,), 5.0)),
    ],
)
def test_new_values_and_new_addresses_need_no_new_layout(change: Any) -> None:
    model, optimizer = linear_world()
    step(model, optimizer)
    loopback = Loopback(make_tree({"model": model, "optimizer": optimizer}))
    loopback.capture()
    change(model, optimizer)
    snapshot = loopback.capture()
    assert loopback.layouts_built == 1
    fresh, fresh_optimizer = linear_world()
    restore(make_tree({"model": fresh, "optimizer": fresh_optimizer}), snapshot)
    assert fresh_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for one, other in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    moments = optimizer.state[model[0].weight]["exp_avg"], fresh_optimizer.state[fresh[0].weight]["exp_avg"]
    assert torch.equal(*moments)


def test_plain_values_in_the_mapping() -> None:
    state: dict[str, Any] = {
        "epoch": 3,
        "best": 0.25,
        "history": [1, 2],
        "nested": {"name": "a", "seen": {1, 2}},
    }
    snapshot = Loopback(make_tree(state)).capture()
    live: dict[str, Any] = {
        "epoch": 0,
        "best": 9.0,
        "history": [],
        "nested": {"name": "", "seen": set(), "more": 1},
    }
    history, nested = live["history"], live["nested"]
    tree = make_tree(live)
    pending = restore(tree, snapshot)
    assert pending.values == {"epoch": 3, "best": 0.25} == tree.restored_values
    assert live == state and live["history"] is history and live["nested"] is nested


def test_bare_tensors_and_parameters_in_the_mapping() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    state = {"weight": weight, "average": torch.full((5,), 2.0), "optimizer": optimizer}
    snapshot = Loopback(make_tree(state)).capture()
    with torch.no_grad():
        weight.zero_()
        state["average"].zero_()
    restore(make_tree(state), snapshot)
    assert weight.tolist() == [1.0] * 3 and state["average"].tolist() == [2.0] * 5


class Keeper(torch.optim.SGD):
    """An optimizer with an attribute that a test chooses."""

    def __init__(self, model: nn.Module, kept: Any) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.kept = kept


@pytest.mark.parametrize(
    "kept", [threading.Lock(), print, nn.Linear(2, 2), torch, lambda: 1, threading.Event()]
)
def test_functions_locks_and_modules_in_attributes_are_left_where_they_are(kept: Any) -> None:
    model = nn.Linear(2, 2)
    snapshot = Loopback(make_tree({"model": model, "optimizer": Keeper(model, kept)})).capture()
    live = nn.Linear(2, 2)
    optimizer = Keeper(live, kept)
    restore(make_tree({"model": live, "optimizer": optimizer}), snapshot)
    assert optimizer.kept is kept


def test_slotted_objects_are_read_afresh_and_rebuilt() -> None:
    model = nn.Linear(2, 2)
    optimizer = Keeper(model, Slotted(torch.ones(2), 1))
    loopback = Loopback(make_tree({"model": model, "optimizer": optimizer}))
    loopback.capture()
    optimizer.kept.second = 7
    snapshot = loopback.capture()
    assert loopback.layouts_built == 1
    live = nn.Linear(2, 2)
    fresh = Keeper(live, None)
    restore(make_tree({"model": live, "optimizer": fresh}), snapshot)
    assert (
        isinstance(fresh.kept, Slotted) and fresh.kept.second == 7 and fresh.kept.first.tolist() == [1.0, 1.0]
    )


def test_objects_of_foreign_packages_need_a_voucher() -> None:
    import collections
    import uuid

    model = nn.Linear(2, 2)
    optimizer = Keeper(model, uuid.SafeUUID.safe)
    make_tree({"model": model, "optimizer": optimizer}).walk()  # an enum member is an atom
    foreign = type("Foreign", (), {"__module__": "somewhere.else"})()
    optimizer.kept = foreign
    with pytest.raises(
        CaptureError, match=r"optimizer\.kept.*somewhere\.else:Foreign.*trust=\['somewhere'\]"
    ):
        make_tree({"model": model, "optimizer": optimizer}).walk()
    make_tree({"model": model, "optimizer": optimizer}, trust=["somewhere"]).walk()
    optimizer.kept = collections.Counter("ab")  # its class reduces itself, so its fields are not all of it
    with pytest.raises(CaptureError, match=r"optimizer\.kept"):
        make_tree({"model": model, "optimizer": optimizer}).walk()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"thing is of a class that nobody has vouched for.*builtins:object.*state_dict"),
        (Thing(1, 2), r"thing is of a class that nobody has vouched for.*tests\.support\.trees:Thing"),
        (torch.eye(3).to_sparse(), r"thing has layout torch\.sparse_coo"),
        (torch.empty(3, device="meta"), r"thing is on the meta device"),
        (nn.LazyLinear(3), r"thing\.weight is not initialised yet"),
        ({"a": {"b": [1, iter([])]}}, r"thing\.a\.b\.1"),
    ],
)
def test_what_cannot_be_captured_is_named(value: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        make_tree({"thing": value}).walk()


def test_an_emptied_storage_is_an_error_not_a_snapshot() -> None:
    model, optimizer = linear_world()
    step(model, optimizer)
    moment = optimizer.state[model[0].weight]["exp_avg"]
    moment.untyped_storage().resize_(0)
    with pytest.raises(CaptureError, match=r"0\.weight\.exp_avg has an empty storage"):
        make_tree({"model": model, "optimizer": optimizer}).walk()


def test_a_tensor_that_moves_to_another_device_is_noticed() -> None:
    model, optimizer = linear_world()
    tree = make_tree({"model": model, "optimizer": optimizer})
    tree.walk()
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.empty(8, 8, device="meta")))
    with pytest.raises(CaptureError, match=r"model\.0\.weight is on the meta device"):
        tree.walk()


def test_too_deep_a_tree_is_refused() -> None:
    tree: Any = 1
    for _ in range(60):
        tree = [tree]
    with pytest.raises(CaptureError, match="nested too deeply"):
        make_tree({"tree": tree}).walk()


def test_a_walk_does_not_change_when_the_state_does() -> None:
    model, optimizer = linear_world()
    step(model, optimizer)
    tree = make_tree({"model": model, "optimizer": optimizer})
    walk = tree.walk()
    buffers, early = list(walk.buffers), walk.encode_early(1, 1)
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(8, 8)
    later = tree.walk()
    assert all(one is other for one, other in zip(buffers, walk.buffers, strict=True))
    assert any(one is not other for one, other in zip(later.buffers, walk.buffers, strict=True))
    assert early[20:] == walk.encode_early(1, 1)[20:]  # behind the wall clock


def test_replaced_tensors_are_let_go() -> None:
    import weakref

    model, optimizer = linear_world()
    step(model, optimizer)
    tree = make_tree({"model": model, "optimizer": optimizer})
    walk = tree.walk()
    old = weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(8, 8)
    tree.walk()
    assert old() is not None, "the first walk should hold it"
    del walk
    assert old() is None


def test_optimizers_are_found_at_any_depth_and_share_fences_with_their_parameters() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    first = torch.optim.SGD(one.parameters(), lr=0.1)
    second = torch.optim.SGD(two.parameters(), lr=0.1)
    third = torch.optim.SGD([one.weight, two.weight], lr=0.1)
    tree = make_tree({"models": {"one": one, "two": two}, "optimizers": [first, [second]]})
    assert tree.optimizers == [first, second]
    assert [tree.fence_group(i) for i in range(2)] == [1, 2]
    tree = make_tree({"models": [one, two], "optimizers": [first, second, {"third": third}]})
    assert len({tree.fence_group(i) for i in range(3)}) == 1


def test_more_optimizers_than_fence_groups() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(150))
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    tree = make_tree({"model": model, "optimizers": optimizers})
    groups = [tree.fence_group(i) for i in range(len(optimizers))]
    assert len(groups) == 300 and min(groups) == 1 and max(groups) == 255
    layout = Loopback(tree).fit(tree.walk())[0]
    assert set(layout.region_group) == set(groups)
