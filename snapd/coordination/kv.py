"""The small store that coordination stands on: keys with versions, transactions, leases, watches.

Three implementations: in this daemon's memory and file (`embedded_kv`), another daemon's over gRPC (a leader), etcd.
All logic above it is written once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from snapd.core.keyspace import checked_key, checked_value
from snapd.errors import ConfigError

TRANSACTION_OPERATIONS_MAX = 128  # what etcd allows unless told otherwise


@dataclass(frozen=True, slots=True)
class Entry:
    """`version` counts the writes of this key since it was created, from 1; absent keys have version 0."""

    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Reading:
    """All keys below a prefix at one revision."""

    revision: int
    items: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Check:
    """The transaction goes through only while `key` has this version (0: absent)."""

    key: str
    version: int


@dataclass(frozen=True, slots=True)
class Write:
    """`value` None deletes. `is_leased`: the key goes when this client's lease ends."""

    key: str
    value: bytes | None
    is_leased: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """`value` None: deleted, or its lease ended."""

    key: str
    value: bytes | None
    version: int
    revision: int


class KeyValue(Protocol):
    """Keys are printable ASCII with '/', at most 512 characters; values at most 1 MiB (checked). Every method raises
    UnavailableError when the store is away, full, or refuses us; after a lost answer of `transact` the caller reads and
    compares.
    """

    async def read(self, prefix: str) -> Reading: ...

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        """All writes, if all checks hold; else nothing and False."""

    async def keep_lease(self, ttl_s: float) -> None:
        """Open this client's lease, or renew it. Raises FencedError (kind `lease`) when it has ended meanwhile: its
        keys are gone; the next call opens a new one.
        """

    async def end_lease(self) -> None:
        """Let the lease and its keys go now. Idempotent."""

    def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        """Changes below `prefix` after that revision, in order. Ends with UnavailableError when the store is away, or
        when the revision is too old to go on from: read again, then watch from there.
        """

    async def close(self) -> None: ...


@runtime_checkable
class Compacting(Protocol):
    """A store whose history grows until somebody bounds it; the planner does."""

    async def compact(self, keep_revisions: int) -> None:
        """Forget all but the newest revisions; watches from older ones end. Raises UnavailableError."""


def check_transaction(checks: Sequence[Check], writes: Sequence[Write]) -> None:
    """Refuse what some store would refuse, in all of them alike.

    Raises:
        ConfigError: kinds `key`, `value_size`, `transaction_size`: too many operations, or a key written twice.
    """
    for write in writes:
        checked_key(write.key)
        checked_value(write.value)
    for check in checks:
        checked_key(check.key)
    keys = {write.key for write in writes}
    if max(len(checks), len(writes)) > TRANSACTION_OPERATIONS_MAX or len(keys) < len(writes):
        raise ConfigError(
            "a transaction of too many keys, or of one twice", kind="transaction_size", keys=len(writes)
        )
