"""Names under wrappers that come and go between runs: DDP's `module`, torch.compile's `_orig_mod`.

A run that was saved under such a wrapper may go on without it, and the other way round. The wrapper says nothing about
the state, so names are brought to what the live module shows.
"""

from __future__ import annotations

from collections.abc import Mapping

from snapd_proto import format_pb2 as pb
from torch import nn

from .names import Names, entries

WRAPPERS = ("module", "_orig_mod")


def align_names(layout: pb.ShardLayout, state: Mapping[str, object], names: Names) -> bool:
    """Rename the layout's tensors and parameters, and the keys of its modules, where only wrappers differ.

    Changes `layout` in place. Returns whether anything was renamed.
    """
    lives = {
        path: {name for name, _ in (*bound.parameters, *bound.buffers)}
        for path, item in entries(state, "")
        if isinstance(item, nn.Module) and (bound := names.modules.get(id(item))) is not None
    }
    is_renamed = False
    for path, live in lives.items():
        bare_live = {_bare(name): name for name in live}
        if len(bare_live) != len(live):
            continue  # a module of its own is called as a wrapper is
        renames: dict[str, str] = {}
        for saved in _names_below(layout, path):
            name = bare_live.get(_bare(saved))
            if saved not in live and name is not None:
                renames[saved] = name
        if renames:
            _rename(layout, path, renames)
            is_renamed = True
    return is_renamed


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _names_below(layout: pb.ShardLayout, path: str) -> set[str]:
    start = f"{path}."
    tensors = {tensor.name for tensor in layout.tensors if tensor.role in ("parameter", "buffer")}
    return {name.removeprefix(start) for name in tensors if name.startswith(start)}


def _rename(layout: pb.ShardLayout, path: str, renames: Mapping[str, str]) -> None:
    full = {f"{path}.{old}": f"{path}.{new}" for old, new in renames.items()}
    for tensor in layout.tensors:
        tensor.name = _renamed(tensor.name, full)
        tensor.parameter_name = full.get(tensor.parameter_name, tensor.parameter_name)
    for parameter in layout.parameters:
        parameter.name = full.get(parameter.name, parameter.name)
    for value in _modules(layout.skeleton, path):
        for key in value.opaque.fields.mapping.keys:
            key.text = _renamed(key.text, renames)


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    """The name itself, or that of its gradient or component."""
    if name in renames:
        return renames[name]
    head, dot, tail = name.rpartition(".")
    return f"{_renamed(head, renames)}.{tail}" if dot and tail in ("grad", "_local_tensor") else name


def _modules(skeleton: pb.Value, path: str) -> list[pb.Value]:
    """The module of the user's mapping at that path."""
    value = _child(skeleton, "state")
    for part in path.split("."):
        value = None if value is None else _child(value, part)
    return [value] if value is not None and value.opaque.how == "module" else []


def _child(value: pb.Value, name: str) -> pb.Value | None:
    if value.WhichOneof("kind") == "mapping":
        for key, item in zip(value.mapping.keys, value.mapping.values, strict=True):
            if key.text == name or (key.WhichOneof("kind") == "integer" and str(key.integer) == name):
                return item
    if value.WhichOneof("kind") == "sequence" and name.isdecimal() and int(name) < len(value.sequence.items):
        return value.sequence.items[int(name)]
    return None
