"""What a collector has seen of one job in a tier: plain data, read in an order that makes it mean something.

The order of reading is half of the protocol (core/condemning.py has the other half): condemned lists first, then
unfinished uploads and packs, shard manifests, intents, commit records, and pins last. What a list names that was read
before the intents can be deleted by them: whoever published an intent after they were read can read the list. And
whoever writes publishes an intent before the first pack and removes it after the commit record, so a pack that was
seen, whose writer's intent was not, is either named by a record that was seen or by none that will ever come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.stored import Intent, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import TierKeys


@dataclass(frozen=True, slots=True)
class SeenPack:
    name: str
    nbytes: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class SeenShard:
    """A shard manifest. `packs`: what it names; None: it was not read, or cannot be (`problem`)."""

    key: str
    snapshot: SnapshotId
    revision: int
    nbytes: int
    modified_s: float
    packs: frozenset[str] | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenIntent:
    """`intent`: None: it cannot be read (`problem`)."""

    key: str
    write_id: str
    modified_s: float
    intent: Intent | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenRecord:
    """What lies at a commit record's key: a record, a void one, or something broken (`problem`).

    `missing`: of what the record names; looked for once more after the record had been read.
    """

    key: str
    snapshot: SnapshotId
    revision: int
    modified_s: float
    record: StoredSnapshot | None = None
    void: VoidRecord | None = None
    problem: str = ""
    missing: tuple[str, ...] = ()

    @property
    def committed_s(self) -> float:
        """When the snapshot was committed, by the store's clock; rewriting its packs does not change it."""
        first_s = self.record.first_modified_s if self.record is not None else 0.0
        return first_s or self.modified_s

    @property
    def trouble(self) -> str:
        """Why the snapshot cannot be restored from this record; empty: nothing is known against it."""
        if self.problem:
            return self.problem
        if not self.missing:
            return ""
        more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
        return f"{self.missing[0]}{more} missing"


@dataclass(frozen=True, slots=True)
class SeenRound:
    """A condemned list. `keys` None: it cannot be read."""

    key: str
    number: int
    modified_s: float
    keys: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class SeenUpload:
    key: str
    token: str
    begun_s: float


@dataclass(frozen=True, slots=True)
class Sight:
    """`now_s`: the store's clock when the reading began: what is written later can only be younger."""

    keys: TierKeys
    now_s: float
    packs: Mapping[str, SeenPack] = field(default_factory=dict)  # by name
    shards: Mapping[str, SeenShard] = field(default_factory=dict)  # by key
    intents: tuple[SeenIntent, ...] = ()
    records: tuple[SeenRecord, ...] = ()
    pins: Mapping[str, SnapshotId] = field(default_factory=dict)
    rounds: tuple[SeenRound, ...] = ()
    uploads: tuple[SeenUpload, ...] = ()

    @property
    def condemned(self) -> frozenset[str]:
        return frozenset(key for seen in self.rounds for key in seen.keys or ())

    def all_keys(self) -> frozenset[str]:
        """Of everything that a list can name, and that is there."""
        notes = [*(seen.key for seen in self.intents), *(seen.key for seen in self.records)]
        return frozenset([*map(self.keys.pack, self.packs), *self.shards, *notes])
