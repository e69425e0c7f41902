"""Putting strided bytes in order, against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snapd.export.strides import gather, is_row_major, row_major_strides, span_elements


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _span_of(tensor: torch.Tensor) -> bytes:
    storage = bytes(tensor.untyped_storage())
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    return storage[start : start + span_elements(tensor.shape, tensor.stride()) * size]


VIEWS = {
    "transposed": lambda: torch.randn(7, 5).t(),
    "column": lambda: torch.randn(6, 4)[:, 2],
    "steps": lambda: torch.arange(40).reshape(5, 8)[1::2, ::3],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "expanded scalar": lambda: torch.tensor(5.0).expand(2, 3),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted bf16": lambda: torch.randn(4, 3, 2).bfloat16().permute(2, 0, 1),
    "bool": lambda: torch.tensor([[True, False], [False, True]]).t(),
    "complex128": lambda: torch.randn(3, 4, dtype=torch.complex128).t(),
    "scalar": lambda: torch.tensor(3, dtype=torch.int16),
    "size one": lambda: torch.randn(1, 5)[:, ::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_gather_gives_the_bytes_of_a_contiguous_copy(name: str) -> None:
    tensor = VIEWS[name]()
    found = gather(_span_of(tensor), tensor.shape, tensor.stride(), tensor.element_size())
    assert bytes(found) == _bytes_of(tensor)


@given(
    st.permutations(range(4)),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.sampled_from([1, 2, 4, 8]),
)
def test_gather_of_any_permutation(order: list[int], sizes: list[int], itemsize: int) -> None:
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    base = torch.arange(torch.Size(sizes).numel()).to(types[itemsize]).reshape(sizes)
    view = base.permute(order)
    assert bytes(gather(_span_of(view), view.shape, view.stride(), itemsize)) == _bytes_of(view)


def test_is_row_major_agrees_with_torch() -> None:
    for make in VIEWS.values():
        tensor = make()
        assert is_row_major(tensor.shape, tensor.stride()) == tensor.is_contiguous()


def test_empty_tensors_have_no_span() -> None:
    assert span_elements([0, 3], [3, 1]) == 0
    assert is_row_major([0, 3], [9, 9])
    assert gather(b"", [0, 3], [3, 1], 4) == b""


def test_row_major_strides() -> None:
    assert row_major_strides([2, 3, 4]) == [12, 4, 1]
    assert row_major_strides([]) == []


@pytest.mark.parametrize(
    ("span", "shape", "strides", "itemsize", "text"),
    [
        (b"12345678", [2], [-1], 4, "negative stride"),
        (b"1234567", [2], [1], 4, "span of 7 bytes"),
        (b"123456", [2], [1], 3, "itemsize 3"),
    ],
)
def test_contradictions_are_refused(
    span: bytes, shape: list[int], strides: list[int], itemsize: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        gather(span, shape, strides, itemsize)
