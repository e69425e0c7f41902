"""Bytes of a strided tensor, put in row-major order without numpy or torch.

Torch knows no negative strides; a stride of 0 (an expanded dimension) repeats its elements.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

_FORMAT_BY_ITEMSIZE: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def span_elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements between the first and the last one of the tensor, both included; 0 for an empty tensor."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one behind the other in the order of their indexes."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def row_major_strides(shape: Sequence[int]) -> list[int]:
    """Strides, in elements, of a tensor of this shape without gaps."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return strides


def gather(
    span: bytes | bytearray | memoryview, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> bytearray:
    """The tensor's elements in row-major order.

    Args:
        span: the bytes from the tensor's first element to its last, both included.
        shape, strides: of the tensor; strides in elements, none negative.
        itemsize: bytes per element: 1, 2, 4, 8, or a multiple of 8.
    Raises:
        ValueError: a stride is negative, the span is not as long as shape and strides say, or the size of the
            elements is none of the above; names the values.
    """
    if any(stride < 0 for stride in strides):
        raise ValueError(f"negative stride in {list(strides)}")
    if len(span) != span_elements(shape, strides) * itemsize:
        form = f"shape {list(shape)}, strides {list(strides)}, itemsize {itemsize}"
        raise ValueError(f"span of {len(span)} bytes for {form}")
    if itemsize not in _FORMAT_BY_ITEMSIZE:
        if itemsize % 8:
            raise ValueError(f"itemsize {itemsize} is not 1, 2, 4, 8 or a multiple of 8")
        words = itemsize // 8  # a wide element is a last dimension of 8-byte words
        return gather(span, [*shape, words], [*(stride * words for stride in strides), 1], 8)
    result = bytearray(math.prod(shape) * itemsize)
    if result:
        code = _FORMAT_BY_ITEMSIZE[itemsize]
        _copy_lines(memoryview(span).cast("B").cast(code), memoryview(result).cast(code), shape, strides)
    return result


def _copy_lines(source: memoryview, target: memoryview, shape: Sequence[int], strides: Sequence[int]) -> None:
    """Copy line by line along the longest dimension that a memoryview can step through (stride above 0)."""
    target_strides = row_major_strides(shape)
    movable = [axis for axis in range(len(shape)) if strides[axis] > 0]
    line_axis = max(movable, key=lambda axis: shape[axis], default=None)
    outer = [axis for axis in range(len(shape)) if axis != line_axis]
    for index in itertools.product(*(range(shape[axis]) for axis in outer)):
        start = sum(i * strides[axis] for i, axis in zip(index, outer, strict=True))
        target_start = sum(i * target_strides[axis] for i, axis in zip(index, outer, strict=True))
        if line_axis is None:
            target[target_start] = source[start]
            continue
        length, step, target_step = shape[line_axis], strides[line_axis], target_strides[line_axis]
        stop = start + (length - 1) * step + 1
        target_stop = target_start + (length - 1) * target_step + 1
        target[target_start:target_stop:target_step] = source[start:stop:step]
