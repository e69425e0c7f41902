"""Names under wrappers that come and go between runs: DDP's `module`, torch.compile's `_orig_mod`.

A run that was saved under such a wrapper may go on without it, and the other way round. The wrapper says nothing about
the state, so names are brought to what the live module shows.
"""

from __future__ import annotations

from collections.abc import Mapping

from snapd_proto import format_pb2 as pb
from torch import nn

from .names import Names, entries
from .resharding import value_at

WRAPPERS = ("module", "_orig_mod")


def align_names(layout: pb.ShardLayout, state: Mapping[str, object], names: Names) -> None:
    """Rename the layout's tensors and parameters, and the keys of its modules, where only wrappers differ.

    Changes `layout` in place.
    """
    for path, renames in renames_for(layout, state, names).items():
        _rename(layout, path, renames)


def renames_for(
    layout: pb.ShardLayout, state: Mapping[str, object], names: Names
) -> dict[str, dict[str, str]]:
    """For each module of the mapping whose wrappers differ: saved name -> live name, without the module's path."""
    found: dict[str, dict[str, str]] = {}
    for path, item in entries(state, ""):
        bound = names.modules.get(id(item)) if isinstance(item, nn.Module) else None
        if bound is None:
            continue
        live = {name for name, _ in (*bound.parameters, *bound.buffers)}
        bare_live = {_bare(name): name for name in live}
        if len(bare_live) != len(live):
            continue  # a module of its own is called as a wrapper is
        saved = _names_below(layout, path) - live
        renames = {name: bare_live[_bare(name)] for name in saved if _bare(name) in bare_live}
        if renames:
            found[path] = renames
    return found


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
    value = value_at(layout.skeleton, path)
    if value is not None and value.opaque.how == "module":
        for key in value.opaque.fields.mapping.keys:
            key.text = _renamed(key.text, renames)


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    """The name itself, or that of its gradient or component."""
    if name in renames:
        return renames[name]
    head, dot, tail = name.rpartition(".")
    return f"{_renamed(head, renames)}.{tail}" if dot and tail in ("grad", "_local_tensor") else name
