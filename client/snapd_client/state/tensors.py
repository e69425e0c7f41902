"""What a tensor consists of: the plain buffers under subclasses and DTensors, and facts about each.

A wrapper (DTensor, or a subclass with `__tensor_flatten__`) has no bytes of its own; its components do, at
any depth. They are read afresh at each capture through `component`, since a wrapper may get new ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CaptureError

LOCAL = "_local_tensor"

dtype_names: dict[torch.dtype, str] = {
    value: str(value).removeprefix("torch.")
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
dtypes: dict[str, torch.dtype] = {name: dtype for dtype, name in dtype_names.items()}


def component_names(tensor: torch.Tensor) -> list[str]:
    """Attributes that hold the components of a wrapper; empty for a plain tensor."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return []
    if isinstance(tensor, DTensor):
        return [LOCAL]
    # cast: to mypy no tensor can be of the protocol that this asks for
    if is_traceable_wrapper_subclass(cast(Any, tensor)):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        return list(names)
    return []


def subclass_context(tensor: torch.Tensor) -> object:
    """What `__tensor_flatten__` returns beside the attribute names."""
    _, context = cast(Any, tensor).__tensor_flatten__()
    return context


def component(tensor: torch.Tensor, name: str) -> torch.Tensor:
    return cast(torch.Tensor, getattr(tensor, name))


def check_plain(tensor: torch.Tensor, path: str) -> None:
    """Refuse what has no bytes to copy.

    Raises:
        CaptureError: names the path and what the tensor is.
    """
    what = ""
    if tensor.layout is not torch.strided:
        what = f"has layout {tensor.layout}; only strided tensors can be captured"
    elif tensor.device.type == "meta":
        what = "is on the meta device and has no bytes"
    elif tensor.is_nested:
        what = "is a nested tensor"
    elif tensor.is_quantized:
        what = "is a quantised tensor of the old kind (torch.quantize_per_tensor)"
    elif tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        what = "has an empty storage: its values have been swapped out or freed by an offloading framework"
    if what:
        raise CaptureError(f"{path} {what}", type=type(tensor).__name__)


def span_nbytes(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Bytes from the first to the last element of a strided tensor, holes included. Strides are never
    negative.
    """
    last = 0
    for count, stride in zip(shape, strides, strict=True):
        if count == 0:
            return 0
        last += (count - 1) * stride
    return (last + 1) * itemsize
