"""What a rank has for itself when the number of ranks changes: its place in the data, its random numbers.

Tensors are put together from boxes (recut.py). A position in the data cannot be: how much of it all ranks have seen
together depends on how the trainer deals it out. So it is restored only as the user says, by name:

    snap.restore(reshard={"data": "keep"})         each rank takes the position of rank `r mod saved ranks`: right where
                                                    the batch of all ranks together has the same size as before
    snap.restore(reshard={"data": function})       function(states, rank, world_size) -> state for load_state_dict;
                                                    states: what each saved rank had, in order; None: no iterator yet

Values that are no tensors (schedulers, counters) come from that same saved rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from snapd_proto import format_pb2 as pb

from ..errors import ConfigError, IntegrityError
from .classes import Vouched
from .decode import Decoder
from .layouts import Layouts

Reshard = Literal["keep"] | Callable[[list[Any], int, int], Any]
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Elastic:
    """`early`: of all saved ranks; may be empty if no function asks for the others' states."""

    layouts: Layouts
    early: Mapping[int, pb.EarlyValues] = field(default_factory=dict)
    reshard: Mapping[str, Reshard] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return len(self.layouts)


def check_reshard(reshard: Mapping[str, Reshard], names: Iterable[str]) -> None:
    """`names`: those of the user's mapping.

    Raises:
        ConfigError: a value is neither "keep" nor callable, or nothing has that name.
    """
    known = set(names)
    for name, value in reshard.items():
        if name.partition(".")[0] not in known:
            raise ConfigError(
                f"reshard names {name!r}, and nothing in the mapping has that name",
                hint=f"there are {', '.join(sorted(known))}",
            )
        if value != KEEP and not callable(value):
            raise ConfigError(
                f"reshard[{name!r}] is {value!r}",
                hint='pass "keep", or a function of (states, rank, world_size)',
            )


def saved_states(elastic: Elastic, path: str, vouched: Vouched) -> list[Any]:
    """What the object at `path` of the user's mapping said of itself on every saved rank, in order."""
    found = []
    elastic.layouts.need(elastic.layouts)
    for rank in sorted(elastic.layouts):
        value = value_at(elastic.layouts[rank].skeleton, path)
        number = value.opaque.fields.scalar if value is not None else -1
        early = elastic.early.get(rank)
        if early is None or not 0 <= number < len(early.scalars):
            raise IntegrityError("a saved rank has nothing of that name", rank=rank, name=path)
        found.append(Decoder(vouched=vouched).decode(early.scalars[number]))
    return found


def value_at(skeleton: pb.Value, path: str) -> pb.Value | None:
    """The entry of the user's mapping at that path."""
    value = _child(skeleton, "state")
    for part in path.split("."):
        value = None if value is None else _child(value, part)
    return value


def _child(value: pb.Value, name: str) -> pb.Value | None:
    if value.WhichOneof("kind") == "mapping":
        for key, item in zip(value.mapping.keys, value.mapping.values, strict=True):
            if key.text == name or (key.WhichOneof("kind") == "integer" and str(key.integer) == name):
                return item
    if value.WhichOneof("kind") == "sequence" and name.isdecimal() and int(name) < len(value.sequence.items):
        return value.sequence.items[int(name)]
    return None
