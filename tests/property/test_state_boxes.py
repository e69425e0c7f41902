"""Boxes: whatever two of them have in common is copied, and nothing else, checked against numpy's own slicing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from snapd_client.state.boxes import Box, common_runs, contiguous

ITEMSIZE = 4


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))

    def box() -> Box:
        offset, extent = [], []
        for size in shape:
            start = draw(st.integers(0, size - 1))
            offset.append(start)
            extent.append(draw(st.integers(0, size - start)))
        return Box(tuple(offset), tuple(extent))

    return shape, box(), box()


def cut(whole: np.ndarray, box: Box) -> np.ndarray:
    return whole[(..., *(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True)))]


@given(two_boxes(), st.booleans())
def test_what_both_have_arrives_where_it_belongs(
    boxes: tuple[tuple[int, ...], Box, Box], is_transposed: bool
) -> None:
    shape, saved, wanted = boxes
    whole = np.arange(1, 1 + int(np.prod(shape)), dtype=np.int32).reshape(shape)
    source = cut(whole, saved)
    source = source.copy(order="F" if is_transposed else "C")
    strides = [stride // ITEMSIZE for stride in source.strides] if source.size else contiguous(saved.shape)
    memory = source.T.reshape(-1) if is_transposed and source.ndim > 1 else source.reshape(-1)
    there = memory.view(np.uint8) if memory.size else np.empty(0, np.uint8)
    here = np.zeros(wanted.size * ITEMSIZE, dtype=np.uint8)
    runs = common_runs(saved, strides, wanted, ITEMSIZE)
    for source_at, target_at in zip(runs.there, runs.here, strict=True) if runs else ():
        a, b = int(source_at), int(target_at)
        assert not here[b : b + runs.nbytes].any()  # each byte once
        here[b : b + runs.nbytes] = there[a : a + runs.nbytes]
    mask = np.zeros(shape, dtype=bool)
    cut(mask, saved)[...] = True
    expected = cut(np.where(mask, whole, 0).astype(np.int32), wanted)
    assert np.array_equal(here.view(np.int32).reshape(wanted.shape), expected)


@given(two_boxes())
def test_whole_rows_are_one_run(boxes: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, _, _ = boxes
    box = Box((0,) * len(shape), shape)
    runs = common_runs(box, contiguous(shape), box, ITEMSIZE)
    assert runs is not None and len(runs.there) == 1 and runs.nbytes == box.size * ITEMSIZE
