"""The exported state as plain nested values: dictionaries, lists, numbers, texts, tensors. For programs without snapd.

Modules become flat dictionaries of their names, optimizers what `get_optimizer_state_dict` of torch gives (parameters
by name). Objects become their fields; classes are named, never rebuilt.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from typing import Any

from .exported import Exported

_LISTS = ("list", "set", "frozenset", "deque")


def plain_state(exported: Exported) -> dict[str, Any]:
    """Rank 0's state, tensors as `Saved`, and each rank's random generators; what other ranks have otherwise is below
    `ranks`.
    """
    tree = exported.ranks[0].about["tree"]
    walk = _Walk(exported)
    state = {str(key): walk.value(value) for key, value in tree.get("state", {}).items()}
    modules = [key for key, value in tree.get("state", {}).items() if _how(value) == "module"]
    for key, value in tree.get("state", {}).items():
        if _how(value) == "optimizer":
            state[str(key)] = _optimizer(walk, value["fields"], modules)
    result: dict[str, Any] = dict(state)
    about = exported.about
    result["snapd"] = {name: about[name] for name in ("job", "generation", "step", "world_size")}
    result["rng"] = {
        str(r.rank): _Walk(exported, r.rank).value(r.about["tree"].get("rng")) for r in exported.ranks
    }
    for rank, name, saved in exported.differing():
        result.setdefault("ranks", {}).setdefault(str(rank), {})[name] = saved
    return result


def _how(value: Any) -> str:
    return str(value.get("how", "")) if isinstance(value, dict) and value.get("$type") == "object" else ""


class _Walk:
    """One rank's tree. Values that were one object in the trainer are converted once."""

    def __init__(self, exported: Exported, rank: int = 0) -> None:
        self._exported, self._rank = exported, rank
        self._by_id: dict[str, Any] = {}

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$tensor" in node:
            return self._tensor(node["$tensor"])
        if "$parameter" in node:
            return node["$parameter"]
        if "$same_as" in node:
            return self._by_id.get(str(node["$same_as"]))
        found = (
            self._typed(node)
            if "$type" in node
            else {k: self.value(v) for k, v in node.items() if k != "$id"}
        )
        if "$id" in node:
            self._by_id[str(node["$id"])] = found
        return found

    def _tensor(self, name: str) -> Any:
        if self._rank == 0 or name in self._exported.ranks[0].about["tensors"]:
            return self._exported.saved(name)
        return None

    def _typed(self, node: Mapping[str, Any]) -> Any:
        kind = node["$type"]
        if kind in ("tuple", "size"):
            return tuple(self.value(item) for item in node["items"])
        if kind in _LISTS:
            return [self.value(item) for item in node["items"]]
        if kind in ("bytes", "bytearray"):
            return base64.b64decode(node["base64"]) if "base64" in node else bytes(node["items"])
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(node["bits"]))[0]
        if kind == "complex":
            return complex(float(self.value(node["re"])), float(self.value(node["im"])))
        if kind == "object":
            return self.value(node["fields"])
        if "items" in node:  # dictionaries with other keys than texts, ordered and default ones
            return {_key(self.value(key)): self.value(value) for key, value in node["items"]}
        if kind == "named":
            return node["text"]
        return {key: self.value(value) for key, value in node.items() if not key.startswith("$")}


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int | float | bool | tuple | bytes) or key is None else str(key)


def _optimizer(walk: _Walk, fields: Any, modules: list[str]) -> Any:
    """`{"state": {parameter: {...}}, "param_groups": [{..., "params": [...]}]}`, parameters by the names that they have
    in their module, where that is unambiguous.
    """
    found = walk.value(fields)
    if not isinstance(found, dict) or "param_groups" not in found:
        return found
    names = [name for group in found["param_groups"] for name in group.get("params", [])]
    short = {name: _without_module(name, modules) for name in names if isinstance(name, str)}
    if len(set(short.values())) != len(short):
        short = {name: name for name in short}
    state = {short.get(name, str(name)): value for name, value in dict(found.get("state", {})).items()}
    groups = [
        {**group, "params": [short.get(name, name) for name in group.get("params", [])]}
        for group in found["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def _without_module(name: str, modules: list[str]) -> str:
    for module in modules:
        if name.startswith(f"{module}."):
            return name[len(module) + 1 :]
    return name
