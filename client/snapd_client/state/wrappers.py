"""Names under wrappers that come and go between runs: DDP's `module`, torch.compile's, activation checkpointing's.

A run that was saved under such a wrapper may go on without it, and the other way round. The wrapper says nothing about
the state, so names are brought to what the live module shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from snapd_proto import format_pb2 as pb
from torch import nn

from .names import Names, entries
from .resharding import value_at

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")


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
        live = {name for name, _ in (*bound.parameters, *bound.buffers, *bound.extra)}
        bare_live = {_bare(name): name for name in live}
        if len(bare_live) != len(live):
            continue  # a module of its own is called as a wrapper is
        saved = _names_below(layout, path)
        count = Counter(map(_bare, saved))  # two with one bare name are no wrapper's doing
        renames = {
            name: bare_live[_bare(name)]
            for name in saved - live
            if _bare(name) in bare_live and count[_bare(name)] == 1
        }
        if renames:
            found[path] = renames
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _names_below(layout: pb.ShardLayout, path: str) -> set[str]:
    """All names of a module's parameters (a tied one has several), buffers and own states."""
    value = value_at(layout.skeleton, path)
    if value is None or value.opaque.how != "module":
        return set()
    mapping = value.opaque.fields.mapping
    return {
        key.text
        for key, item in zip(mapping.keys, mapping.values, strict=True)
        if item.WhichOneof("kind") != "tensor" or not _is_gradient(layout, item.tensor)
    }


def _is_gradient(layout: pb.ShardLayout, number: int) -> bool:
    return number < len(layout.tensors) and layout.tensors[number].role == "gradient"


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
