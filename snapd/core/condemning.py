"""What of a job's tier may be deleted, and when: the collector's decisions as functions of what it has seen (DESIGN 6).

The protocol, and why no clock can break it:

- A writer publishes its intent, then reads the condemned lists, then what it builds upon; it removes the intent when
  the commit record is there. While an intent is there, its writer's packs, the manifests of the attempt that it is part
  of, and its bases are alive, however old it is.
- A collector publishes what it condemns. A round later it looks at everything anew, and deletes what is condemned
  and still garbage. An intent that it did not see was therefore published after the list, and its writer has read it.
- An intent without a sign of life is condemned like anything else. Before it is deleted, the place of the commit
  record that its writer would create is taken by a void record: a writer that wakes up later cannot commit any
  more, and starts over. The same holds for manifests of an attempt that nobody works at.
- A snapshot that retention drops gets a void record above its revisions first, which voids them all at once, also
  for a request that was on its way all the time and lands later.
- Nothing that a commit record names is deleted unless the record is deleted before it, and nothing that the manifest
  of an attempt names unless the attempt is voided.
- Of what is deleted, commit records go first, then shard manifests, intents, packs.

Rounds and times to live are there to spare work and to let readers finish, not for safety. Only void records end by
time alone (`void_ttl_s`): no request may be on its way for so long.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules, KeepVerdict, TierSnapshot, judge_retention
from snapd.core.tier_sight import SeenIntent, SeenRecord, SeenRound, SeenUpload, Sight

CONDEMNED_MAX = 200_000  # keys in one list; the rest waits for the next round


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectRules:
    """`round_s`: between condemning and deleting. `intent_ttl_s`: without a sign of life for so long an intent is
    condemned, and what nobody names is left alone when it is younger. `void_ttl_s`: no request is on its way for so
    long. All by the store's clock.
    """

    keep: KeepRules = field(default_factory=KeepRules)
    round_s: float = 3600.0
    intent_ttl_s: float = 3600.0
    void_ttl_s: float = 86400.0

    @property
    def retire_s(self) -> float:
        """A list stays for a second round, so that whoever read it when it was due has long ended."""
        return 2 * self.round_s


class Order(enum.IntEnum):
    """In which order things are deleted."""

    RECORD = 0
    SHARD = 1
    INTENT = 2
    PACK = 3
    VOID = 4


@dataclass(frozen=True, slots=True)
class Garbage:
    """Why an object may go. `void`: what must be voided before it is deleted (snapshot, revision, is_dropped)."""

    key: str
    order: Order
    reason: str
    nbytes: int = 0
    void: tuple[SnapshotId, int, bool] | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """`current`: the record that counts, of each snapshot that is there. `live_packs`: named by what is alive.
    `blind`: why not all can be judged, if so: no pack is garbage then, or nothing is. `problems`: for people.
    """

    verdicts: tuple[KeepVerdict, ...]
    current: Mapping[SnapshotId, SeenRecord]
    garbage: Mapping[str, Garbage]
    live_packs: frozenset[str]
    uploads: tuple[SeenUpload, ...]
    held: Mapping[SnapshotId, str]  # not kept by retention, and why they stay for now
    blind: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deletion:
    """`voids`: created before anything is deleted; one that finds a commit record in its place ends the deletion, and
    all is looked at anew. `keys`: in order. `retire`: condemned lists that have served.
    """

    voids: tuple[tuple[SnapshotId, int, bool], ...] = ()
    keys: tuple[Garbage, ...] = ()
    retire: tuple[str, ...] = ()
    next_s: float | None = None  # in so long something may be due; None: nothing is condemned


def judge(sight: Sight, rules: CollectRules) -> Judgement:
    """What is garbage, of all that was seen. Everything else is alive or not ours."""
    return _Judge(sight, rules).judged()


def shards_to_read(sight: Sight) -> list[str]:
    """Keys of shard manifests whose packs must be known: of attempts that are not committed, and of snapshots whose
    commit record cannot be read. The packs of all others are in the commit records.
    """
    named: set[str] = set()
    for seen in sight.records:
        if seen.record is not None:
            named.update(entry.key for entry in seen.record.shards)
    return [key for key, shard in sight.shards.items() if key not in named and shard.packs is None]


class _Judge:
    """One judgement under way."""

    def __init__(self, sight: Sight, rules: CollectRules) -> None:
        self.sight, self.rules = sight, rules
        self.problems: list[str] = []
        self.blind = ""
        self.is_all_blind = False
        self.held: dict[SnapshotId, str] = {}
        self.garbage: dict[str, Garbage] = {}
        self.live_packs: set[str] = set()
        self.live_shards: set[str] = set()
        self.records: dict[SnapshotId, list[SeenRecord]] = {}
        for seen in sorted(sight.records, key=lambda one: one.revision, reverse=True):
            self.records.setdefault(seen.snapshot, []).append(seen)
        known = [seen.intent for seen in sight.intents if seen.intent is not None]
        self.write_ids = {seen.write_id for seen in sight.intents}
        self.attempts = {(intent.id, intent.revision) for intent in known}
        self.targets = {intent.id for intent in known}
        self.bases = {base for intent in known for base in intent.bases}
        self.current = {
            snapshot: found
            for snapshot, seen in self.records.items()
            if (found := current_record(seen)) is not None
        }

    def judged(self) -> Judgement:
        verdicts = self._retention()
        dropped = {verdict.id: verdict.reason for verdict in verdicts if not verdict.is_kept}
        for snapshot in self.records:
            self._snapshot(snapshot, dropped.get(snapshot, ""))
        self._intents()
        self._attempts()
        if not self.blind:
            self._packs()
        self._voids()
        if self.is_all_blind:
            self.garbage.clear()
        if self.blind:
            self.problems.append(f"{'nothing' if self.is_all_blind else 'no pack'} is judged: {self.blind}")
        return Judgement(
            verdicts=verdicts,
            current=self.current,
            garbage=self.garbage,
            live_packs=frozenset(self.live_packs),
            uploads=tuple(upload for upload in self.sight.uploads if self._is_dead(upload)),
            held=self.held,
            blind=self.blind,
            problems=tuple(self.problems),
        )

    def _retention(self) -> tuple[KeepVerdict, ...]:
        for seen in self.current.values():
            if seen.trouble:
                self.problems.append(f"{seen.key}: {seen.trouble}")
        found = [TierSnapshot(s.snapshot, s.committed_s, s.trouble) for s in self.current.values()]
        return judge_retention(found, self.rules.keep, self.sight.pins)

    # snapshots that are there

    def _snapshot(self, snapshot: SnapshotId, dropped: str) -> None:
        records = [seen for seen in self.records[snapshot] if seen.void is None]
        current = self.current.get(snapshot)
        if current is None:  # void, and whoever voided it did not come to the end
            for seen in records:
                self._condemn(seen.key, Order.RECORD, "its snapshot is void")
            return
        needed = self._needed(snapshot)
        if dropped and needed:
            self.held[snapshot] = needed
        if dropped and not needed:
            top = max(seen.revision for seen in self.records[snapshot])
            void = (snapshot, top + 1, True)
            for seen in records:
                self._condemn(seen.key, Order.RECORD, f"retention: {dropped}", void=void)
            return
        for seen in records:
            is_old = seen.revision < current.revision and not current.trouble and not needed
            if is_old:
                reason = f"revision {current.revision} has taken its place"
                self._condemn(seen.key, Order.RECORD, reason)
            else:
                self._keep(seen)

    def _needed(self, snapshot: SnapshotId) -> str:
        """By which writer; empty: by none."""
        if snapshot in self.targets:
            return "a writer of it has not finished"
        return "a writer builds upon it" if snapshot in self.bases else ""

    def _keep(self, seen: SeenRecord) -> None:
        """The manifests and packs of a record are alive."""
        if seen.record is not None:
            self.live_shards.update(entry.key for entry in seen.record.shards)
            self.live_packs.update(seen.record.packs)
            return
        # It cannot be read. All manifests of the snapshot are kept, and what they name.
        for shard in self.sight.shards.values():
            if shard.snapshot == seen.snapshot:
                self._keep_shard(shard.key, seen.key)

    def _keep_shard(self, key: str, because: str) -> None:
        self.live_shards.add(key)
        packs = self.sight.shards[key].packs
        if packs is None:
            problem = self.sight.shards[key].problem or "it was not read"
            self.blind = f"what {key} names is not known ({problem}), and {because} needs it"
        else:
            self.live_packs.update(packs)

    # attempts: manifests without a commit record, and those who work at them

    def _intents(self) -> None:
        for seen in self.sight.intents:
            age_s = self.sight.now_s - seen.modified_s
            if seen.problem:
                self.problems.append(f"{seen.key}: {seen.problem}")
            if age_s <= self.rules.intent_ttl_s:
                if seen.intent is None:
                    self.blind = f"what {seen.key} protects is not known ({seen.problem})"
                    self.is_all_blind = True
                continue
            reason = f"no sign of life for {age_s:.0f} s"
            self._condemn(seen.key, Order.INTENT, reason, void=self._void_of(seen))

    def _void_of(self, seen: SeenIntent) -> tuple[SnapshotId, int, bool] | None:
        """What must be voided before the intent is deleted; None: its place is taken, or it cannot be read."""
        if seen.intent is None or self._is_taken(seen.intent.id, seen.intent.revision):
            return None
        return (seen.intent.id, seen.intent.revision, False)

    def _is_taken(self, snapshot: SnapshotId, revision: int) -> bool:
        """Whether nobody can commit that revision any more."""
        return any(
            seen.revision == revision
            or (seen.void is not None and seen.void.is_dropped and seen.revision > revision)
            for seen in self.records.get(snapshot, ())
        )

    def _attempts(self) -> None:
        for shard in self.sight.shards.values():
            if shard.key in self.live_shards:
                continue
            attempt = (shard.snapshot, shard.revision)
            is_taken = self._is_taken(*attempt)
            if attempt in self.attempts and not is_taken:
                self._keep_shard(shard.key, "a writer's intent")
                continue
            if shard.snapshot in self.current and (shard.snapshot in self.targets | self.bases):
                self._keep_shard(shard.key, "a writer's intent")  # of a revision that is being replaced
                continue
            void = None if is_taken or self._is_superseded(*attempt) else (*attempt, False)
            self._condemn(shard.key, Order.SHARD, self._why_shard(*attempt), shard.nbytes, void)

    def _is_superseded(self, snapshot: SnapshotId, revision: int) -> bool:
        current = self.current.get(snapshot)
        return current is not None and current.revision > revision

    def _why_shard(self, snapshot: SnapshotId, revision: int) -> str:
        for seen in self.records.get(snapshot, ()):
            if seen.revision == revision and seen.record is not None:
                return "with its commit record"
        if self._is_superseded(snapshot, revision):
            return "a newer revision has taken its place"
        return "never committed, and nobody works at it"

    # packs, and what is left

    def _packs(self) -> None:
        for pack in self.sight.packs.values():
            if pack.name in self.live_packs or pack.name[:32] in self.write_ids:
                continue
            key = self.sight.keys.pack(pack.name)
            age_s = self.sight.now_s - pack.modified_s
            if age_s > self.rules.intent_ttl_s:
                self._condemn(key, Order.PACK, "nothing that stays names it", pack.nbytes)

    def _voids(self) -> None:
        """A void record may go when nothing else of its snapshot is there, and no request can be on its way."""
        busy = {shard.snapshot for shard in self.sight.shards.values()} | self.targets
        for snapshot, records in self.records.items():
            if snapshot in busy or any(seen.void is None for seen in records):
                continue
            if all(self.sight.now_s - seen.modified_s > self.rules.void_ttl_s for seen in records):
                for seen in records:
                    self._condemn(seen.key, Order.VOID, "what it voids is long gone")

    def _is_dead(self, upload: SeenUpload) -> bool:
        """Whether an unfinished upload of this job will never be finished."""
        if not upload.key.startswith(self.sight.keys.root):
            return False
        age_s = self.sight.now_s - upload.begun_s
        name = self.sight.keys.pack_name(upload.key)
        if name is not None and name[:32] in self.write_ids:
            return age_s > self.rules.void_ttl_s
        return age_s > self.rules.intent_ttl_s

    def _condemn(
        self,
        key: str,
        order: Order,
        reason: str,
        nbytes: int = 0,
        void: tuple[SnapshotId, int, bool] | None = None,
    ) -> None:
        self.garbage[key] = Garbage(key, order, reason, nbytes, void)


def current_record(seen: Collection[SeenRecord]) -> SeenRecord | None:
    """The record that counts among those at the keys of one snapshot; None: it does not exist (any more).

    The highest that can be used; of none, the highest that is there.
    """
    standing: list[SeenRecord] = []
    for one in sorted(seen, key=lambda record: record.revision, reverse=True):
        if one.void is None:
            standing.append(one)
        elif one.void.is_dropped:
            break
    usable = [one for one in standing if not one.trouble]
    return next(iter(usable or standing), None)


def to_condemn(judgement: Judgement, sight: Sight) -> tuple[Garbage, ...]:
    """What the next list has to name: garbage that no list names yet, in the order of deletion."""
    listed = sight.condemned
    fresh = [item for key, item in judgement.garbage.items() if key not in listed]
    return tuple(sorted(fresh, key=lambda item: (item.order, item.key))[:CONDEMNED_MAX])


def next_round_number(sight: Sight) -> int:
    """Above all that are there and, as lists do not stay for ever, never below the store's time in seconds."""
    return max([int(sight.now_s), *(seen.number + 1 for seen in sight.rounds)])


def to_delete(judgement: Judgement, sight: Sight, rules: CollectRules) -> Deletion:
    """What may be deleted now: what was condemned a round ago, and is garbage still by this newer look.

    What a commit record names that is not deleted now, stays: it could have been condemned before the record was there.
    """
    due: dict[str, Garbage] = {}
    waits: list[float] = []
    for seen in sight.rounds:
        age_s = sight.now_s - seen.modified_s
        if age_s < rules.round_s:
            waits.append(rules.round_s - age_s)
            continue
        due.update({key: judgement.garbage[key] for key in seen.keys or () if key in judgement.garbage})
        if age_s < rules.retire_s:
            waits.append(rules.retire_s - age_s)
    for record in sight.records:
        if record.void is None and record.key not in due:
            for key in _named_by(record, sight):
                due.pop(key, None)
    for item in judgement.garbage.values():
        # Whoever comes now may still commit over this manifest: its attempt is voided first.
        if item.order is Order.SHARD and item.void is not None and item.key not in due:
            for pack in sight.shards[item.key].packs or ():
                due.pop(sight.keys.pack(pack), None)
    keys = tuple(sorted(due.values(), key=lambda item: (item.order, item.key)))
    voids = {item.void: None for item in keys if item.void is not None}
    stays = sight.all_keys().difference(due)
    retire = tuple(seen.key for seen in sight.rounds if _has_served(seen, sight.now_s, rules, stays))
    return Deletion(tuple(voids), keys, retire, min(waits, default=None))


def _has_served(seen: SeenRound, now_s: float, rules: CollectRules, stays: Collection[str]) -> bool:
    """Whether a list may go. While anything of it stays, another collector (there should be none) that looked before
    the writer came who needs it could be about to delete it, so the list goes on warning.
    """
    age_s = now_s - seen.modified_s
    is_empty = seen.keys is not None and not any(key in stays for key in seen.keys)
    return age_s >= rules.retire_s if is_empty else age_s > rules.void_ttl_s


def _named_by(seen: SeenRecord, sight: Sight) -> list[str]:
    """Keys of what a commit record names; of one that cannot be read, whatever it may name."""
    if seen.record is not None:
        return [*(entry.key for entry in seen.record.shards), *map(sight.keys.pack, seen.record.packs)]
    shards = [shard for shard in sight.shards.values() if shard.snapshot == seen.snapshot]
    if any(shard.packs is None for shard in shards):
        return [*(shard.key for shard in shards), *map(sight.keys.pack, sight.packs)]
    packs = {pack for shard in shards for pack in shard.packs or ()}
    return [*(shard.key for shard in shards), *map(sight.keys.pack, packs)]
