"""The typed state tree as JSON that people can read and other programs can take apart.

Plain values stay plain: None, booleans, numbers, strings, lists, and dictionaries whose keys are all strings.
All else is an object with a member "$type" (or "$tensor", "$parameter", "$same_as"), so nothing is lost:

    {"$tensor": NAME}                      a tensor; its bytes and form are under that name
    {"$type": "tuple", "items": [...]}     also set, frozenset, deque, size, bytearray, named tuples ("class")
    {"$type": "dict", "items": [[K, V]]}   dictionaries with other keys, ordered and default dictionaries
    {"$type": "object", "class": ..., "how": ..., "fields": ...}
    {"$same_as": N}                        the same object as the container with "$id": N
"""

import base64
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from snapd_proto import format_pb2

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
T = TypeVar("T")

DEPTH_MAX = 200  # protobuf refuses deeper messages when it parses (100 levels of message nesting by default)
_CONTAINERS = ("sequence", "mapping", "opaque")


class TreeError(ValueError):
    """The tree names something that is not there, or is nested too deeply: damaged, or of a newer client."""


@dataclass(frozen=True, kw_only=True)
class TreeContext:
    """What the tree's leaves refer to."""

    tensor_names: Sequence[str]
    parameter_names: Sequence[str]
    scalars: Sequence[format_pb2.Value] = ()


def skeleton_to_json(root: format_pb2.Value, context: TreeContext) -> Json:
    """The JSON form of `ShardLayout.skeleton`, with the scalar leaves of `context` in their places.

    Raises:
        TreeError: an index is out of range, a value is of no known kind, or nested deeper than DEPTH_MAX.
    """
    converter = _Converter(context, root, "", is_skeleton=True)
    if root.WhichOneof("kind") != "mapping":
        return converter.convert(root, 0)
    # The outermost mapping was not there in the trainer, so it has no number, and neither has the
    # generators' leaf.
    return converter.parts(root.mapping, "", 0)


def tree_to_json(root: format_pb2.Value, context: TreeContext) -> Json:
    """The JSON form of a tree written by value: a scalar leaf, a key, the context of a tensor subclass.

    Raises:
        TreeError: as `skeleton_to_json`.
    """
    return _Converter(context, root, "").convert(root, 0)


def _alias_targets(value: format_pb2.Value, depth: int = 0) -> Iterator[int]:
    """Numbers of the nodes that aliases of this tree point at; keys and scalars count on their own."""
    if depth > DEPTH_MAX:
        raise TreeError(f"the state tree is nested more than {DEPTH_MAX} deep")
    kind = value.WhichOneof("kind")
    if kind == "alias":
        yield value.alias
    for child in _children(value, kind):
        yield from _alias_targets(child, depth + 1)


def _children(value: format_pb2.Value, kind: str | None) -> Iterator[format_pb2.Value]:
    if kind == "sequence":
        yield from value.sequence.items
    elif kind == "mapping":
        yield from value.mapping.values
    elif kind == "opaque":
        yield value.opaque.fields


class _Converter:
    """One walk through a tree that numbers its nodes as the client did when it wrote the aliases.

    Nodes are counted in pre-order: containers, objects, and scalar leaves that hold one of these. What lies
    inside such a leaf, and what is used as a key, is counted from 0 again; `scope` keeps those ids apart. In
    a skeleton the parts of modules, optimizers and objects with a `state_dict` are the client's own sorting
    of what it found there, and no nodes (snapd_client/state/match.py counts alike).
    """

    def __init__(
        self,
        context: TreeContext,
        root: format_pb2.Value,
        scope: str,
        *,
        root_id: dict[str, Json] | None = None,
        is_skeleton: bool = False,
    ) -> None:
        self._context = context
        self._scope = scope
        self._aliased = set(_alias_targets(root))
        self._root_id = root_id or {}
        self._is_skeleton = is_skeleton
        self._next_number = 0

    def convert(self, value: format_pb2.Value, depth: int, *, is_node: bool = True) -> Json:
        if depth > DEPTH_MAX:
            raise TreeError(f"the state tree is nested more than {DEPTH_MAX} deep")
        kind = value.WhichOneof("kind")
        if kind == "scalar":
            return self._scalar(value.scalar, depth + 1, is_node=is_node)
        if kind in _CONTAINERS:
            return self._container(value, kind, self._take_id() if is_node else {}, depth)
        return self._leaf(value, kind)

    def _take_id(self) -> dict[str, Json]:
        """The member that names the next node, if an alias points at it."""
        number = self._next_number
        self._next_number += 1
        if number == 0 and self._root_id:
            return self._root_id
        return {"$id": self._id(number)} if number in self._aliased else {}

    def _id(self, number: int) -> Json:
        if number == 0 and self._root_id:
            return self._root_id["$id"]
        return f"{self._scope}.{number}" if self._scope else number

    def _container(
        self, value: format_pb2.Value, kind: str | None, name_it: dict[str, Json], depth: int
    ) -> Json:
        if kind == "sequence":
            return self._sequence(value.sequence, name_it, depth)
        if kind == "mapping":
            return self._mapping(value.mapping, name_it, depth)
        opaque = value.opaque
        about: dict[str, Json] = {"$type": "object", **name_it, "class": opaque.type_name, "how": opaque.how}
        if not self._is_skeleton or opaque.how == "fields":
            about["fields"] = self.convert(opaque.fields, depth + 1)
        elif opaque.fields.WhichOneof("kind") == "mapping":
            about["fields"] = self.parts(opaque.fields.mapping, opaque.how, depth + 1)
        else:
            about["fields"] = self.convert(opaque.fields, depth + 1, is_node=False)
        return about

    def parts(self, mapping: format_pb2.Mapping, how: str, depth: int) -> Json:
        """A mapping that is no node, by names of the client's."""
        _check_pairs(mapping)
        found: dict[str, Json] = {}
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            is_sorting = how == "optimizer" and key.text in ("parameters", "attributes")
            is_node = not is_sorting and value.WhichOneof("kind") != "scalar"
            found[key.text] = self.convert(value, depth + 1, is_node=is_node)
        return found

    def _scalar(self, index: int, depth: int, *, is_node: bool) -> Json:
        """A leaf that was kept aside."""
        value = _at(self._context.scalars, index, "scalar")
        kind = value.WhichOneof("kind")
        if kind == "scalar":
            raise TreeError(f"scalar {index} stands for another scalar")
        name_it = self._take_id() if is_node and kind in _CONTAINERS else {}
        inner = _Converter(self._context, value, f"scalar-{index}", root_id=name_it)
        return inner.convert(value, depth)

    def _key(self, key: format_pb2.Value, depth: int) -> Json:
        return _Converter(self._context, key, f"key-{self._next_number}").convert(key, depth)

    def _sequence(self, sequence: format_pb2.Sequence, name_it: dict[str, Json], depth: int) -> Json:
        items: list[Json] = [self.convert(item, depth + 1) for item in sequence.items]
        is_plain = sequence.type == format_pb2.Sequence.LIST and not sequence.type_name
        if is_plain and not name_it:
            return items
        result: dict[str, Json] = {"$type": format_pb2.Sequence.Type.Name(sequence.type).lower(), **name_it}
        if sequence.type_name:
            result["class"] = sequence.type_name
        if sequence.type == format_pb2.Sequence.DEQUE:
            result["maxlen"] = None if sequence.deque_maxlen < 0 else sequence.deque_maxlen
        result["items"] = items
        return result

    def _mapping(self, mapping: format_pb2.Mapping, name_it: dict[str, Json], depth: int) -> Json:
        _check_pairs(mapping)
        pairs: list[tuple[format_pb2.Value, Json, Json]] = []
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            key_json = self._key(key, depth + 1)
            pairs.append((key, key_json, self.convert(value, depth + 1)))
        plain_keys = all(is_plain_key(key) for key in mapping.keys)
        if mapping.type == format_pb2.Mapping.DICT and plain_keys and not name_it:
            return {key.text: value for key, _, value in pairs}
        name_it = {"$type": format_pb2.Mapping.Type.Name(mapping.type).lower(), **name_it}
        if mapping.default_factory:
            name_it["factory"] = mapping.default_factory
        return {**name_it, "items": [[key, value] for _, key, value in pairs]}

    def _leaf(self, value: format_pb2.Value, kind: str | None) -> Json:
        context = self._context
        if kind == "tensor":
            return {"$tensor": _at(context.tensor_names, value.tensor, "tensor")}
        if kind == "parameter":
            return {"$parameter": _at(context.parameter_names, value.parameter, "parameter")}
        if kind == "alias":
            return {"$same_as": self._id(value.alias)}
        return plain_leaf(value)


def _check_pairs(mapping: format_pb2.Mapping) -> None:
    if len(mapping.keys) != len(mapping.values):
        raise TreeError(f"a mapping has {len(mapping.keys)} keys and {len(mapping.values)} values")


def is_plain_key(key: format_pb2.Value) -> bool:
    """Whether a dictionary key can be a JSON member name without being taken for one of ours."""
    return key.WhichOneof("kind") == "text" and not key.text.startswith("$")


def plain_leaf(value: format_pb2.Value) -> Json:
    """The JSON form of a value that refers to nothing else."""
    kind = value.WhichOneof("kind")
    if kind == "none":
        return None
    if kind == "boolean":
        return value.boolean
    if kind == "integer":
        return value.integer
    if kind == "big_integer":
        return int.from_bytes(value.big_integer, "little", signed=True)
    if kind == "real":
        return real_to_json(value.real)
    if kind == "text":
        return value.text
    if kind == "raw":
        return {"$type": "bytes", "base64": base64.b64encode(value.raw).decode("ascii")}
    if kind == "named":
        return {"$type": "named", "class": value.named.type_name, "text": value.named.text}
    if kind == "complex":
        number = value.complex
        return {"$type": "complex", "re": real_to_json(number.re), "im": real_to_json(number.im)}
    raise TreeError(f"a value of unknown kind {kind!r} in the state tree: written by a newer client?")


def real_to_json(number: float) -> Json:
    """A number where JSON has one for it; else its name and its 64 bits, so that NaN payloads are kept."""
    if math.isfinite(number):
        return number
    name = "nan" if math.isnan(number) else ("inf" if number > 0 else "-inf")
    return {"$type": "float", "value": name, "bits": struct.pack(">d", number).hex()}


def _at(items: Sequence[T], index: int, what: str) -> T:
    if index >= len(items):
        raise TreeError(f"the state tree names {what} {index}, but there are {len(items)}")
    return items[index]
