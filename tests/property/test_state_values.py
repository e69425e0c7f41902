"""Typed trees: whatever can be written is read back as the same value, of the same types, aliased alike."""

from __future__ import annotations

import math
import random
import struct
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings
from snapd_client.state.classes import Vouched
from snapd_client.state.decode import Decoder
from snapd_client.state.encode import encode_plain
from snapd_proto.format_pb2 import Value
from torch import nn

from tests.support.loopback import Loopback, make_tree, restore
from tests.support.trees import Point, Shade, Thing, same

EXAMPLES = settings(max_examples=150, deadline=None)

floats = st.builds(lambda raw: struct.unpack("<d", raw)[0], st.binary(min_size=8, max_size=8))
texts = st.one_of(st.text(max_size=8), st.just("\ud800 alone"))
numpy_scalars = st.sampled_from(
    [np.float64(0.1), np.int8(-3), np.bool_(True), np.float16(2.5), np.datetime64("2024-01-01")]
)
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), floats, st.complex_numbers(), texts,
    st.binary(max_size=8), st.sampled_from(list(Shade)), st.sampled_from([torch.bfloat16, torch.float8_e4m3fn]),
    st.datetimes(), st.timedeltas(), st.fractions(), st.decimals(allow_nan=False), st.uuids(), st.just(Path("/a b")),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:3")]), numpy_scalars, st.just(torch.Size([2, 3])),
    st.sampled_from([torch.strided, torch.channels_last, Ellipsis, NotImplemented, slice(1, None, 2), range(3)]),
)  # fmt: skip
hashables = st.one_of(
    st.integers(), texts, st.booleans(), st.floats(allow_nan=False), st.tuples(st.integers(), texts)
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(floats, min_size=64, max_size=66),
        st.lists(st.integers(-(2**64), 2**64), min_size=64, max_size=66),
        st.lists(st.integers(0, 9), min_size=64, max_size=66),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, inner, max_size=3).map(lambda d: defaultdict(list, d)),
        st.builds(lambda items: deque(items, maxlen=5), st.lists(inner, max_size=5)),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
        st.builds(Point, inner, inner),
        st.binary(max_size=4).map(bytearray),
        st.builds(lambda: torch.randn(2, 3).to(torch.bfloat16)),
        st.builds(lambda: np.arange(6, dtype=np.int16).reshape(2, 3)),
    )


trees = st.recursive(atoms, containers, max_leaves=12)
things = st.recursive(
    atoms, lambda inner: st.one_of(containers(inner), st.builds(Thing, inner, inner)), max_leaves=8
)


@EXAMPLES
@given(trees)
def test_plain_trees_round_trip(tree: Any) -> None:
    raw = encode_plain(tree, Vouched(), "tree").SerializeToString()
    same(tree, Decoder().decode(Value.FromString(raw)), "tree")


class Holder(torch.optim.Optimizer):
    """An optimizer that keeps whatever a test gives it, in all three places."""

    def __init__(self, params: Any, tree: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        if tree is not None:
            self.state[self.param_groups[0]["params"][0]]["tree"] = tree[0]
            self.param_groups[0]["tree"] = tree[1]
            self.kept = tree[2]
            self.state["not a parameter"] = tree[0]


@EXAMPLES
@given(st.tuples(things, things, things), st.tuples(things, things, things))
def test_optimizers_may_hold_any_tree(tree: Any, other: Any) -> None:
    """Into a fresh optimizer that holds nothing, and into one that holds something else."""
    saved = Holder([nn.Parameter(torch.ones(3))], tree)
    snapshot = Loopback(make_tree({"optimizer": saved})).capture()
    for live in (Holder([nn.Parameter(torch.zeros(3))], None), Holder([nn.Parameter(torch.zeros(3))], other)):
        restore(make_tree({"optimizer": live}), snapshot)
        parameter = live.param_groups[0]["params"][0]
        assert torch.equal(parameter, torch.ones(3))
        same(tree[0], live.state[parameter]["tree"], "state")
        same(tree[1], live.param_groups[0]["tree"], "group")
        same(tree[2], live.kept, "attribute")
        assert live.state["not a parameter"] is live.state[parameter]["tree"] or _is_immutable(tree[0])


def _is_immutable(value: object) -> bool:
    mutable = list | dict | set | deque | bytearray | np.ndarray | torch.Tensor | Thing
    return not isinstance(value, mutable | tuple)


def test_aliases_and_cycles_are_kept() -> None:
    shared = [1, [2]]
    cycle: dict[str, Any] = {"shared": shared, "again": (shared, shared[1])}
    cycle["self"] = cycle
    raw = encode_plain(cycle, Vouched(), "tree").SerializeToString()
    read = Decoder().decode(Value.FromString(raw))
    assert (
        read["self"] is read and read["again"][0] is read["shared"] and read["again"][1] is read["shared"][1]
    )

    saved = Holder([nn.Parameter(torch.ones(3))], (cycle, shared, [shared, cycle]))
    snapshot = Loopback(make_tree({"optimizer": saved})).capture()
    live = Holder([nn.Parameter(torch.zeros(3))], None)
    restore(make_tree({"optimizer": live}), snapshot)
    tree = live.state["not a parameter"]
    assert tree["self"] is tree and tree["shared"] is live.param_groups[0]["tree"]
    assert live.kept[0] is tree["shared"] and live.kept[1] is tree and tree["again"][1] is tree["shared"][1]


def test_nan_payloads_and_negative_zero() -> None:
    for raw in (
        b"\x01\x00\x00\x00\x00\x00\xf0\x7f",
        b"\xef\xbe\xad\xde\x00\x00\xf8\xff",
        struct.pack("<d", -0.0),
    ):
        value = struct.unpack("<d", raw)[0]
        read = Decoder().decode(encode_plain(value, Vouched(), "x"))
        assert struct.pack("<d", read) == raw, (raw, math.copysign(1, read))


@EXAMPLES
@given(st.integers(0, 50), st.sampled_from(["python", "torch", "numpy", "legacy"]))
def test_generators_go_on(draws: int, kind: str) -> None:
    def make(seed: int) -> Any:
        return {
            "python": lambda: random.Random(seed),
            "torch": lambda: torch.Generator().manual_seed(seed),
            "numpy": lambda: np.random.default_rng(seed),
            "legacy": lambda: np.random.RandomState(seed),
        }[kind]()

    def draw(generator: Any) -> Any:
        if kind == "torch":
            return torch.randn(3, generator=generator).tolist()
        return generator.random() if kind != "legacy" else generator.rand()

    generator = make(1)
    for _ in range(draws):
        draw(generator)
    snapshot = Loopback(make_tree({"generators": {"mine": generator}})).capture()
    expected = [draw(generator) for _ in range(3)]
    live = make(2)
    restore(make_tree({"generators": {"mine": live}}), snapshot)
    assert [draw(live) for _ in range(3)] == expected


def test_named_tuples_of_a_function_are_refused_at_restore() -> None:
    hidden = namedtuple("hidden", "a")  # cannot be found by name
    value = encode_plain(hidden(1), Vouched(), "x")
    try:
        Decoder().decode(value)
    except Exception as error:
        assert "no class here" in str(error)
    else:
        raise AssertionError("a class that cannot be found was found")
