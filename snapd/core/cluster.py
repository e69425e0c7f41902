"""The cluster as plain data: nodes, failure domains, the erasure code, groups, and the fencing token of a daemon."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from snapd.errors import ConfigError

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CODE = re.compile(r"([1-9][0-9]?)\+([1-9])")
DATA_FRAGMENTS_MAX = 24
PARITY_FRAGMENTS_MAX = 8


@dataclass(frozen=True, slots=True, order=True)
class Code:
    """`k` data fragments and `m` parity fragments to a row: any `m` of the `k + m` may be lost."""

    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"

    @property
    def size(self) -> int:
        return self.k + self.m

    @classmethod
    def parse(cls, text: str) -> Code:
        """Read "6+2".

        Raises:
            ConfigError: kind `code`.
        """
        match = CODE.fullmatch(text.strip())
        if match is None or int(match[1]) > DATA_FRAGMENTS_MAX or int(match[2]) > PARITY_FRAGMENTS_MAX:
            raise ConfigError(
                f"bad code {text[:32]!r}",
                kind="code",
                hint=f"K+M with K up to {DATA_FRAGMENTS_MAX} and M up to {PARITY_FRAGMENTS_MAX}, e.g. 6+2",
            )
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One daemon, as it announces itself. `arena_id` is new whenever its arena began empty: what was held is gone.

    `host` names the machine (two daemons of one host share its fate); `domain` the rack, or the host where no rack is
    configured. Addresses are `host:port`.
    """

    node: str
    host: str
    domain: str
    address: str
    bulk_address: str
    arena_id: str
    version: str
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """`k + m` nodes that protect one another. The order of `nodes` is part of the row plan: it never changes within
    an epoch. `code.size == len(nodes)`; a group of one protects nothing and has code 1+0 in `Code`'s stead: None.
    """

    number: int
    nodes: tuple[str, ...]
    code: Code | None


@dataclass(frozen=True, slots=True)
class GroupTable:
    """Which groups there are, under one epoch. `degraded`: in words, what was asked for and is not
    given; else empty.
    """

    epoch: int
    asked: Code
    groups: tuple[Group, ...]
    reason: str
    degraded: str = ""
    _by_node: dict[str, Group] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        by_node = {node: group for group in self.groups for node in group.nodes}
        object.__setattr__(self, "_by_node", by_node)  # asked for every node at every decision

    def group_of(self, node: str) -> Group | None:
        return self._by_node.get(node)


@dataclass(frozen=True, slots=True)
class Seed:
    """A daemon that may be the leader: HOST:PORT, and the name that its certificate must have. `is_dns`: the host
    stands for several addresses.
    """

    node: str
    address: str
    is_dns: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A daemon's fencing token: what carries another cluster's id, or an older epoch, is refused."""

    cluster_id: str
    epoch: int


def checked_node_name(text: str) -> str:
    """Return `text` if it can name a node.

    Raises:
        ConfigError: kind `node_name`.
    """
    if NODE_NAME.fullmatch(text) is None:
        raise ConfigError(
            f"bad node name {text[:64]!r}",
            kind="node_name",
            hint="use letters, digits, '.', '_' and '-', at most 128, beginning with a letter or a digit",
        )
    return text
