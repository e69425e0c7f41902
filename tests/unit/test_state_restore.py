"""Restoring: what does not fit is said before anything is touched; what fits goes back in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snapd_client.errors import IntegrityError, RestoreMismatch
from snapd_client.state import apply
from snapd_client.state.apply import is_cut_alike, names_of, prepare_restore
from torch import nn

from tests.support.loopback import Loopback, Snapshot, make_tree, restore


def make_model(width: int = 8, layers: int = 2) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_world() -> tuple[dict[str, Any], Snapshot]:
    torch.manual_seed(1)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "epoch": 4}
    return state, Loopback(make_tree(state)).capture()


def live_world(**overrides: Any) -> dict[str, Any]:
    torch.manual_seed(2)
    model = make_model()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "epoch": 0, **overrides}


def contents(state: dict[str, Any]) -> list[Any]:
    found: list[Any] = [state.get("epoch"), torch.get_rng_state().tolist()]
    for item in state.values():
        if isinstance(item, nn.Module):
            found.extend(tensor.tolist() for tensor in item.state_dict().values())
        if isinstance(item, torch.optim.Optimizer):
            found.append(str(item.state_dict()))
    return found


def two_layers_more() -> dict[str, Any]:
    model = make_model(layers=3)
    return live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def wider() -> dict[str, Any]:
    model = make_model(width=9)
    return live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def other_dtype() -> dict[str, Any]:
    model = make_model().to(torch.bfloat16)
    return live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def tied() -> dict[str, Any]:
    model = make_model()
    model[1].weight = model[0].weight
    return live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def two_groups() -> dict[str, Any]:
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    return live_world(model=model, optimizer=torch.optim.AdamW(groups))


def other_order() -> dict[str, Any]:
    model = make_model()
    return live_world(model=model, optimizer=torch.optim.AdamW(reversed(list(model.parameters()))))


def other_optimizer() -> dict[str, Any]:
    model = make_model()
    return live_world(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def without(name: str) -> dict[str, Any]:
    state = live_world()
    del state[name]
    return state


def overlapping() -> dict[str, Any]:
    model = make_model()
    flat = torch.zeros(100)
    model[0].weight.data = flat[:64].view(8, 8)
    model[1].weight.data = flat[32:96].view(8, 8)
    return live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("make", "missing", "extra", "reshaped"),
    [
        (two_layers_more, [], ["model.2.bias", "model.2.weight"], ["optimizer.param_groups.0.params"]),
        (wider, [], [], ["model.0.bias", "model.0.weight", "model.1.bias", "model.1.weight"]),
        (other_dtype, [], [], ["model.0.bias", "model.0.weight", "model.1.bias", "model.1.weight"]),
        (tied, [], [], ["model.1.weight", "optimizer.param_groups.0.params"]),
        (two_groups, [], [], ["optimizer.param_groups"]),
        (other_order, [], [], ["optimizer.param_groups.0.params"]),
        (other_optimizer, [], [], ["optimizer"]),
        (overlapping, [], [], ["model.1.weight"]),
        (lambda: without("epoch"), ["epoch"], [], []),
        (lambda: without("optimizer"), ["optimizer"], [], []),
        (lambda: live_world(more=1), [], ["more"], []),
        (lambda: live_world(model=3), [], [], ["model"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(
    make: Any, missing: list[str], extra: list[str], reshaped: list[str]
) -> None:
    _, snapshot = saved_world()
    live = make()
    before = contents(live)
    with pytest.raises(RestoreMismatch) as caught:
        restore(make_tree(live), snapshot)
    assert contents(live) == before
    assert caught.value.missing == missing and caught.value.extra == extra
    assert [text.partition(" (")[0] for text in caught.value.reshaped] == reshaped


def test_differences_say_what_is_where() -> None:
    _, snapshot = saved_world()
    with pytest.raises(RestoreMismatch, match=r"model\.0\.bias \(shape \[8\] in the snapshot, \[9\] here\)"):
        restore(make_tree(wider()), snapshot)
    with pytest.raises(RestoreMismatch, match=r"\(dtype float32 in the snapshot, bfloat16 here\)"):
        restore(make_tree(other_dtype()), snapshot)
    with pytest.raises(RestoreMismatch, match=r"tied to another tensor here, not in the snapshot"):
        restore(make_tree(tied()), snapshot)


def test_a_tie_that_is_gone_is_a_difference() -> None:
    model = make_model()
    model[1].weight = model[0].weight
    snapshot = Loopback(make_tree({"model": model})).capture()
    text = r"model\.1\.weight \(tied to model\.0\.weight in the snapshot, not here\)"
    with pytest.raises(RestoreMismatch, match=text):
        restore(make_tree({"model": make_model()}), snapshot)


def test_allow_partial_lets_new_layers_be(caplog: pytest.LogCaptureFixture) -> None:
    state, snapshot = saved_world()
    live = two_layers_more()
    before = live["model"][2].weight.clone()
    pending = restore(make_tree(live), snapshot, allow_partial=("model.2.*", "optimizer.param_groups.*"))
    assert torch.equal(live["model"][0].weight, state["model"][0].weight)
    assert torch.equal(live["model"][2].weight, before)
    assert live["optimizer"].state[live["model"][1].bias]["step"].item() == 2
    assert len(live["optimizer"].param_groups[0]["params"]) == 6, "the new layer fell out of the optimizer"
    assert len(pending.report) == 3 and pending.report[0].startswith("extra: model.2.")
    assert "restored in part (3 names differ): extra: model.2." in caplog.text


def test_allow_partial_leaves_out_what_is_gone() -> None:
    _, snapshot = saved_world()
    model = make_model(layers=1)
    live = live_world(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    patterns = ("model.1.*", "optimizer.param_groups.*")
    pending = restore(make_tree(live), snapshot, allow_partial=patterns)
    assert len(live["optimizer"].state) == 2 and len(pending.report) == 3
    assert live["optimizer"].param_groups[0]["params"] == list(model.parameters())
    train(model, live["optimizer"])


def test_allow_partial_leaves_reshaped_tensors_and_other_kinds_as_they_are() -> None:
    _, snapshot = saved_world()
    live = wider()
    before = [tensor.clone() for tensor in live["model"].state_dict().values()]
    restore(make_tree(live), snapshot, allow_partial=("model.*",))
    assert all(
        torch.equal(one, other)
        for one, other in zip(before, live["model"].state_dict().values(), strict=True)
    )
    assert live["epoch"] == 4
    live = other_optimizer()
    restore(make_tree(live), snapshot, allow_partial=("optimizer",))
    assert not live["optimizer"].state and live["optimizer"].param_groups[0]["lr"] == 1.0


def test_objects_keep_their_identity() -> None:
    state, snapshot = saved_world()
    optimizer = state["optimizer"]
    state_object, groups, group = optimizer.state, optimizer.param_groups, optimizer.param_groups[0]
    moment = optimizer.state[state["model"][0].weight]["exp_avg"]
    address, counter = moment.data_ptr(), moment._version
    wanted = moment.clone()
    train(state["model"], optimizer)
    group["lr"] = 9.0
    restore(make_tree(state), snapshot)
    assert optimizer.state is state_object and optimizer.param_groups is groups and groups[0] is group
    assert optimizer.state[state["model"][0].weight]["exp_avg"] is moment
    assert moment.data_ptr() == address and torch.equal(moment, wanted) and group["lr"] == 0.5
    assert moment._version > counter, "writes behind the counter's back"


def test_state_that_came_later_is_gone_after_a_rollback() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    tree = make_tree({"model": model, "optimizer": optimizer})
    snapshot = Loopback(tree).capture()
    train(model, optimizer)
    restore(tree, snapshot)
    assert len(optimizer.state) == 0


def test_restored_views_share_storage_again() -> None:
    """State made anew is aliased as it was: one storage, the same offsets."""
    model = make_model(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat = torch.arange(200.0)
    optimizer.state[model[0].weight] = {"buffer": flat[8:72].view(8, 8), "same": flat, "apart": flat[100:]}
    optimizer.state[model[0].bias] = {"buffer": flat[72:80], "table": flat}
    snapshot = Loopback(make_tree({"model": model, "optimizer": optimizer})).capture()
    live = make_model(layers=1)
    fresh = torch.optim.SGD(live.parameters(), lr=0.1)
    restore(make_tree({"model": live, "optimizer": fresh}), snapshot)
    one, other = fresh.state[live[0].weight], fresh.state[live[0].bias]
    assert one["same"] is other["table"] and one["same"].tolist() == flat.tolist()
    base = one["same"].data_ptr()
    assert one["buffer"].data_ptr() == base + 32 and other["buffer"].data_ptr() == base + 288
    assert one["apart"].data_ptr() == base + 400
    assert one["buffer"].untyped_storage().data_ptr() == base


def test_disjoint_views_made_anew_share_one_storage() -> None:
    model = make_model(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat = torch.arange(200.0)
    optimizer.state[model[0].weight] = {"left": flat[10:60], "right": flat[100:110]}
    snapshot = Loopback(make_tree({"model": model, "optimizer": optimizer})).capture()
    live = make_model(layers=1)
    fresh = torch.optim.SGD(live.parameters(), lr=0.1)
    restore(make_tree({"model": live, "optimizer": fresh}), snapshot)
    fields = fresh.state[live[0].weight]
    assert fields["right"].data_ptr() - fields["left"].data_ptr() == 360
    assert fields["left"].untyped_storage()._cdata == fields["right"].untyped_storage()._cdata
    assert fields["right"].tolist() == list(range(100, 110))


def test_other_strides_are_copied_by_value() -> None:
    model = nn.Conv2d(3, 4, 3)
    snapshot = Loopback(make_tree({"model": model})).capture()
    live = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = live.weight.stride()
    restore(make_tree({"model": live}), snapshot)
    assert torch.equal(live.weight, model.weight) and live.weight.stride() == strides


def test_nan_bits_survive_wherever_they_go() -> None:
    raw = torch.tensor([0x7FA00001, -4194303, -2147483648], dtype=torch.int32)
    for live in (torch.zeros(3), torch.zeros(3, 2)[:, 0]):
        snapshot = Loopback(make_tree({"tensor": raw.view(torch.float32)})).capture()
        restore(make_tree({"tensor": live}), snapshot)
        assert live.contiguous().view(torch.int32).tolist() == raw.tolist()


def test_finish_comes_once() -> None:
    state, snapshot = saved_world()
    pending = restore(make_tree(state), snapshot)
    with pytest.raises(IntegrityError, match="finished before"):
        pending.finish()


def test_preparing_touches_nothing_and_may_be_repeated() -> None:
    """A round that meets a bad chunk is prepared again with another snapshot."""
    _, snapshot = saved_world()
    live = live_world()
    before = contents(live)
    for _ in range(3):
        prepare_restore(make_tree(live), snapshot.layout, snapshot.early)
    assert contents(live) == before


def test_names_are_found_once_for_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of tensors that is a good part of preparing."""
    _, snapshot = saved_world()
    tree = make_tree(live_world())
    names = names_of(tree)

    def again(*_: object) -> None:
        raise AssertionError("the names were known")

    monkeypatch.setattr(apply, "Names", again)
    assert is_cut_alike(tree, snapshot.layout, names)
    prepare_restore(tree, snapshot.layout, snapshot.early, names=names)
    with pytest.raises(AssertionError, match="were known"):
        prepare_restore(tree, snapshot.layout, snapshot.early)


def _break_region(layout: Any) -> None:
    layout.tensors[0].region_offset = 1 << 40


def _break_shape(layout: Any) -> None:
    layout.tensors[0].shape[0] = 1 << 40


def _break_end(layout: Any) -> None:
    layout.regions[0].shard_offset = 1 << 50


def _break_dtype(layout: Any) -> None:
    layout.tensors[0].dtype = "float999"


def _break_strides(layout: Any) -> None:
    layout.tensors[0].strides[0] = -8


def _break_chunks(layout: Any) -> None:
    layout.chunk_bytes = 0


def _break_skeleton(layout: Any) -> None:
    layout.skeleton.Clear()


def _break_reference(layout: Any) -> None:
    layout.skeleton.mapping.values[0].mapping.values[2].scalar = 1 << 20


@pytest.mark.parametrize(
    "damage", [value for name, value in list(globals().items()) if name.startswith("_break_")]
)
def test_a_malformed_layout_is_refused_before_anything_is_addressed(damage: Any) -> None:
    _, snapshot = saved_world()
    layout = snapshot.layout
    damage(layout)
    live = live_world()
    before = contents(live)
    with pytest.raises(IntegrityError):
        prepare_restore(make_tree(live), layout, snapshot.early).finish()
    assert contents(live) == before
