"""Plain objects by class and fields, and which values are left where they are."""

from __future__ import annotations

import functools
import logging
import types
import weakref
from typing import Any

import torch
from torch import nn

_SKIPPED: tuple[type, ...] = (
    type,
    types.ModuleType,
    functools.partial,
    nn.Module,
    weakref.ref,
    logging.Logger,
    torch.futures.Future,
    torch.utils.hooks.RemovableHandle,
)
# by name, so that nothing has to be imported: locks, handles of the system, process groups, streams
_SKIPPED_NAMES = frozenset(
    {
        "_thread:lock", "_thread:RLock", "threading:Condition", "threading:Event",
        "threading:Semaphore", "threading:Thread",
        "torch.cuda.streams:Stream", "torch.cuda.streams:Event", "torch._C:_CudaEventBase",
        "torch.distributed.distributed_c10d:ProcessGroup", "torch._C._distributed_c10d:ProcessGroup",
        "torch._C._distributed_c10d:Work", "torch.distributed.device_mesh:DeviceMesh", "_io:TextIOWrapper",
        "concurrent.futures.thread:ThreadPoolExecutor", "queue:Queue",
    }
)  # fmt: skip


def is_skipped(value: object) -> bool:
    """Functions, modules, locks, streams, process groups, ...: not state, and nothing to write into a
    snapshot.
    """
    if isinstance(value, _SKIPPED) or callable(value):
        return True
    return any(f"{cls.__module__}:{cls.__qualname__}" in _SKIPPED_NAMES for cls in type(value).__mro__)


# Of these classes only the named fields are state; to ask a GradScaler for its state_dict would wait for the GPU.
_CHOSEN_FIELDS: dict[str, tuple[str, ...]] = {
    "torch.amp.grad_scaler:GradScaler": (
        "_enabled", "_init_scale", "_scale", "_growth_factor", "_backoff_factor", "_growth_interval",
        "_init_growth_tracker", "_growth_tracker",
    ),
}  # fmt: skip


def chosen_fields(value: object) -> dict[str, Any] | None:
    """The state of an object whose class is known here; None for all others."""
    for cls in type(value).__mro__:
        names = _CHOSEN_FIELDS.get(f"{cls.__module__}:{cls.__qualname__}")
        if names is not None:
            return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


def slot_names(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.extend([slots] if isinstance(slots, str) else slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def fields_of(value: object) -> dict[Any, Any] | None:
    """An object's fields: its `__dict__` itself (so that changes are seen), or a copy of its slots.

    None if it has neither, or if its class says itself how it is reduced (C extensions, containers): then
    its fields are not all of it.
    """
    chosen = chosen_fields(value)
    if chosen is not None:
        return chosen
    cls = type(value)
    is_plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    if not is_plain or isinstance(value, dict | list | set | tuple):
        return None
    slots = slot_names(cls)
    if hasattr(value, "__dict__"):
        if not slots:
            return vars(value)
        return {**vars(value), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
    if slots:
        return {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return None


def new_instance(cls: type) -> object:
    """An instance without running the class's constructor."""
    make: Any = cls.__new__
    return make(cls)
