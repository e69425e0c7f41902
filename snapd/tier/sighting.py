"""A collector's look at one job in a tier: listings and small objects, in the order that core/tier_sight.py asks for.

What is written once is read once: commit records, manifests and lists are kept between looks by key, time and size.
Blocking; one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from snapd.core.condemning import shards_to_read
from snapd.core.ids import SnapshotId
from snapd.core.stored import Intent, Pin, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import TierKeys
from snapd.core.tier_sight import (
    SeenIntent,
    SeenPack,
    SeenRecord,
    SeenRound,
    SeenShard,
    SeenUpload,
    Sight,
)
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import ObjectInfo, Store
from snapd.tier.envelope import NBYTES_MAX, Kind, kind_name
from snapd.tier.manifests import decode_shard, decode_snapshot
from snapd.tier.notes import decode_condemned, decode_intent, decode_pin, decode_void

T = TypeVar("T")
CACHE_MAX = 20_000  # objects whose contents are kept between looks


@dataclass(slots=True)
class Looker:
    """One job's. `unreadable`: what could not be read at the last look, key -> why."""

    store: Store
    keys: TierKeys
    unreadable: dict[str, str] = field(default_factory=dict)
    _known: dict[tuple[str, float, int], object] = field(default_factory=dict)

    def look(self) -> Sight:
        """Everything of the job that is there.

        Raises:
            IntegrityError: kind `tier_version`: a newer snapd writes there: nothing is judged by this one; a pin cannot
            be read. What a store raises.
        """
        self.unreadable = {}
        if len(self._known) > CACHE_MAX:
            self._known.clear()
        now_s = self.store.now_s()
        rounds = tuple(filter(None, (self._round(info) for info in self._listed(self.keys.condemned))))
        uploads = tuple(SeenUpload(*each) for each in self.store.unfinished())
        packs = self._packs()
        shards = self._shards()
        intents = tuple(filter(None, (self._intent(info) for info in self._listed(self.keys.intents))))
        records = tuple(filter(None, (self._record(info) for info in self._listed(self.keys.snapshots))))
        records = self._with_missing(records, packs, shards)
        sight = Sight(self.keys, now_s, packs, shards, intents, records, self._pins(), rounds, uploads)
        return replace(sight, shards={**shards, **self._opened(sight)})

    def _listed(self, prefix: str) -> list[ObjectInfo]:
        return list(self.store.list(prefix))

    def _packs(self) -> dict[str, SeenPack]:
        found = {}
        for info in self._listed(self.keys.packs):
            name = self.keys.pack_name(info.key)
            if name is not None:
                found[name] = SeenPack(name, info.nbytes, info.modified_s)
        return found

    def _shards(self) -> dict[str, SeenShard]:
        found = {}
        for info in self._listed(self.keys.shards):
            named = self.keys.shard_of(info.key)
            if named is not None:
                found[info.key] = SeenShard(info.key, named[0], named[2], info.nbytes, info.modified_s)
        return found

    def _with_missing(
        self, records: Iterable[SeenRecord], packs: dict[str, SeenPack], shards: dict[str, SeenShard]
    ) -> tuple[SeenRecord, ...]:
        """What records name, and was not seen: it may have come after the listing, so it is listed once more."""
        records = tuple(records)
        named_packs = {pack for seen in records if seen.record for pack in seen.record.packs}
        if named_packs.difference(packs):
            packs.update({name: pack for name, pack in self._packs().items() if name in named_packs})
        named = {entry.key for seen in records if seen.record for entry in seen.record.shards}
        if named.difference(shards):
            shards.update({key: shard for key, shard in self._shards().items() if key in named})
        return tuple(replace(seen, missing=self._missing(seen, packs, shards)) for seen in records)

    def _missing(
        self, seen: SeenRecord, packs: dict[str, SeenPack], shards: dict[str, SeenShard]
    ) -> tuple[str, ...]:
        if seen.record is None:
            return ()
        entries = seen.record.shards
        lost = [e.key for e in entries if e.key not in shards or shards[e.key].nbytes != e.manifest_nbytes]
        return (*lost, *(self.keys.pack(name) for name in seen.record.packs if name not in packs))

    def _opened(self, sight: Sight) -> dict[str, SeenShard]:
        """The manifests of which it must be known what they name."""
        opened = {}
        for key in shards_to_read(sight):
            seen = sight.shards[key]
            info = ObjectInfo(key, seen.nbytes, seen.modified_s)
            packs, problem = self._read(info, Kind.SHARD, self._packs_of)
            opened[key] = replace(seen, packs=packs, problem=problem)
        return opened

    # small objects

    def _packs_of(self, data: bytes, key: str) -> frozenset[str]:
        return decode_shard(data, key=key, job=self.keys.job).packs

    def _pin(self, data: bytes, key: str) -> Pin:
        return decode_pin(data, key=key, job=self.keys.job)

    def _keys(self, data: bytes, key: str) -> tuple[str, ...]:
        return decode_condemned(data, key=key, job=self.keys.job).keys

    def _said(self, data: bytes, key: str) -> Intent:
        return decode_intent(data, key=key, job=self.keys.job)

    def _place(self, data: bytes, key: str) -> StoredSnapshot | VoidRecord:
        if kind_name(data) == Kind.VOID.value:
            return decode_void(data, key=key, job=self.keys.job)
        return decode_snapshot(data, key=key, job=self.keys.job)

    def _read(self, info: ObjectInfo, kind: Kind, decode: Callable[[bytes, str], T]) -> tuple[T | None, str]:
        """(what it says, "") or (None, why it cannot be read)."""
        at = (info.key, info.modified_s, info.nbytes)
        if at in self._known:
            return self._known[at], ""  # type: ignore[return-value]
        try:
            found = decode(self.store.read(info.key, max_nbytes=NBYTES_MAX[kind]), info.key)
        except NotFoundError as error:
            if error.kind != "object":
                raise
            return None, "gone"
        except IntegrityError as error:
            if error.kind == "tier_version":
                raise
            self.unreadable[info.key] = error.message
            return None, error.message
        self._known[at] = found
        return found, ""

    def _round(self, info: ObjectInfo) -> SeenRound | None:
        number = self.keys.round_of(info.key)
        if number is None:
            return None
        found, problem = self._read(info, Kind.CONDEMNED, self._keys)
        if problem == "gone":
            return None
        return SeenRound(info.key, number, info.modified_s, found)

    def _intent(self, info: ObjectInfo) -> SeenIntent | None:
        write_id = self.keys.intent_of(info.key)
        if write_id is None:
            return None
        found, problem = self._read(info, Kind.INTENT, self._said)
        if problem == "gone":
            return None
        return SeenIntent(info.key, write_id, info.modified_s, found, problem)

    def _record(self, info: ObjectInfo) -> SeenRecord | None:
        named = self.keys.snapshot_of(info.key)
        if named is None:
            return None
        found, problem = self._read(info, Kind.SNAPSHOT, self._place)
        if problem == "gone":
            return None
        return SeenRecord(
            info.key,
            *named,
            info.modified_s,
            record=found if isinstance(found, StoredSnapshot) else None,
            void=found if isinstance(found, VoidRecord) else None,
            problem=problem,
        )

    def _pins(self) -> dict[str, SnapshotId]:
        pins = {}
        for info in self._listed(self.keys.pins):
            if self.keys.pin_of(info.key) is None:
                continue
            found, problem = self._read(info, Kind.PIN, self._pin)
            if found is not None:
                pins[found.name] = found.id
            elif problem != "gone":
                raise IntegrityError(
                    f"{info.key}: {problem}; what it pins is not known, so nothing is deleted",
                    kind="tier_manifest",
                    hint="pin the snapshot again under that name, or unpin it",
                    key=info.key,
                )
        return pins
