"""Writers and collectors of a durable tier as programs over single store operations, for every interleaving of them.

A program is a generator that yields operations and is given their results; it ends with `Become` (it goes on as another
program, and what it knew besides the arguments is forgotten) or with None. It may hold nothing between two yields that
does not follow from its arguments and the results so far, so its state is (program, arguments, results): hashable, and
brought back by giving the results again.

The store is one atomic map with strong consistency, as S3 and a directory are; listing gives contents too. The
decisions are those of core/condemning.py, core/committing.py and core/retention.py, and no copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, Intent, Pin, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import TierKeys

JOB = "j"
KEYS = TierKeys(JOB)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A shard manifest: the packs that it names."""

    packs: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack has nothing that matters here but its name."""


Content = Manifest | Pack | StoredSnapshot | VoidRecord | Intent | Condemned | Pin


class Item(NamedTuple):
    key: str
    content: Content
    modified_s: float


class Verb:
    """What a store does. Plain words: operations are hashed a lot."""

    PUT = "put"
    CREATE = "create"
    DELETE = "delete"
    READ = "read"
    LIST = "list"
    SLEEP = "sleep"  # nothing happens for so long
    CLOCK = "clock"  # the store's


class Op(NamedTuple):
    verb: str
    key: str = ""
    content: Content | None = None
    seconds: float = 0.0

    @property
    def is_write(self) -> bool:
        return self.verb in (Verb.PUT, Verb.CREATE, Verb.DELETE)


def put(key: str, content: Content) -> Op:
    return Op(Verb.PUT, key, content)


def create(key: str, content: Content) -> Op:
    """Gives what lies there then: the content itself, or another's."""
    return Op(Verb.CREATE, key, content)


def delete(key: str) -> Op:
    return Op(Verb.DELETE, key)


def read(key: str) -> Op:
    return Op(Verb.READ, key)


def listing(prefix: str) -> Op:
    return Op(Verb.LIST, prefix)


def sleep(seconds: float) -> Op:
    return Op(Verb.SLEEP, seconds=seconds)


CLOCK = Op(Verb.CLOCK)


@dataclass(frozen=True, slots=True)
class Become:
    """Go on as `program(*arguments)`."""

    program: Callable[..., Program]
    arguments: tuple[Any, ...]


Program = Generator[Op, Any, Become | None]


@dataclass(frozen=True, slots=True)
class Store:
    """Contents by key, in order of keys; immutable."""

    items: tuple[Item, ...] = ()

    def find(self, key: str) -> Item | None:
        return next((item for item in self.items if item.key == key), None)

    def under(self, prefix: str) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.key.startswith(prefix))

    def with_item(self, item: Item) -> Store:
        others = [other for other in self.items if other.key != item.key]
        return Store(tuple(sorted([*others, item], key=lambda each: each.key)))

    def without(self, key: str) -> Store:
        return Store(tuple(item for item in self.items if item.key != key))

    def apply(self, op: Op, now_s: float) -> tuple[Store, Any]:
        """What the store is after the operation, and what it answers."""
        if op.verb == Verb.LIST:
            return self, self.under(op.key)
        found = self.find(op.key) if op.key else None
        if op.verb == Verb.READ:
            return self, found.content if found else None
        if op.verb == Verb.CLOCK:
            return self, now_s
        if op.verb == Verb.SLEEP:
            return self, None
        if op.verb == Verb.DELETE:
            return (self.without(op.key) if found else self), None
        assert op.content is not None
        if op.verb == Verb.CREATE and found is not None:
            return self, found.content
        return self.with_item(Item(op.key, op.content, now_s)), op.content


def packs_there(store: Store) -> frozenset[str]:
    return frozenset(KEYS.pack_name(item.key) or "" for item in store.under(KEYS.packs))


def standing(store: Store) -> Iterator[tuple[SnapshotId, StoredSnapshot]]:
    """Snapshots that a reader finds: of each the highest record, unless a void one above it says that it is gone."""
    return standing_among(store.under(KEYS.snapshots))


def standing_among(items: tuple[Item, ...]) -> Iterator[tuple[SnapshotId, StoredSnapshot]]:
    """As `standing`; `items`: what lies at the keys of commit records."""
    decided: set[SnapshotId] = set()
    for item in sorted(items, key=lambda each: _revision(each.key), reverse=True):
        named = KEYS.snapshot_of(item.key)
        assert named is not None
        if named[0] in decided:
            continue
        if isinstance(item.content, StoredSnapshot):
            decided.add(named[0])
            yield named[0], item.content
        elif isinstance(item.content, VoidRecord) and item.content.is_dropped:
            decided.add(named[0])


def _revision(key: str) -> int:
    named = KEYS.snapshot_of(key)
    assert named is not None
    return named[1]


def missing_of(store: Store, record: StoredSnapshot) -> list[str]:
    """What the record names that is not there."""
    there = {item.key for item in store.items}
    return [key for key in named_by(record) if key not in there]


def named_by(record: StoredSnapshot) -> list[str]:
    """Keys of what a commit record names."""
    return [*(entry.key for entry in record.shards), *map(KEYS.pack, record.packs)]
