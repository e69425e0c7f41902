"""Resuming equals not having stopped, to the bit, for every optimizer of the matrix."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.support.loopback import Loopback, make_tree, restore
from tests.support.optimizer_matrix import MATRIX, Row, fingerprint, first_difference, make_world

STEPS_BEFORE, STEPS_AFTER = 5, 4
CASES = [
    pytest.param(row, dtype, id=f"{row.name}-{str(dtype).removeprefix('torch.')}")
    for row in MATRIX
    for dtype in row.dtypes
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _skip_unless_installed(row: Row) -> None:
    for name in row.imports:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_resume_equals_uninterrupted(row: Row, dtype: torch.dtype) -> None:
    _skip_unless_installed(row)
    world = make_world(row, seed=1, dtype=dtype)
    world.train(STEPS_BEFORE)
    loopback = Loopback(make_tree(world.state()))
    snapshot = loopback.capture(STEPS_BEFORE)
    at_capture = fingerprint(world)
    world.losses.clear()
    world.train(STEPS_AFTER)
    expected = fingerprint(world)

    resumed = make_world(row, seed=2, dtype=dtype)
    restore(make_tree(resumed.state()), snapshot)
    assert first_difference({**at_capture, "losses": []}, fingerprint(resumed)) == ""
    resumed.train(STEPS_AFTER)
    assert first_difference(expected, fingerprint(resumed)) == ""


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_rollback_in_place_equals_uninterrupted(row: Row, dtype: torch.dtype) -> None:
    """The same process goes back twice; the second time into state that exists already."""
    _skip_unless_installed(row)
    world = make_world(row, seed=1, dtype=dtype)
    loopback = Loopback(make_tree(world.state()))
    world.train(2)
    loopback.capture(2)
    world.train(STEPS_BEFORE - 2)
    snapshot = loopback.capture(STEPS_BEFORE)
    world.losses.clear()
    world.train(STEPS_AFTER)
    expected = fingerprint(world)
    for _ in range(2):
        restore(loopback.tree, snapshot)
        world.losses.clear()
        world.train(STEPS_AFTER)
        assert first_difference(expected, fingerprint(world)) == ""
