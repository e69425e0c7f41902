"""One pass of a job's collector over a tier: look, delete what a list condemned a round ago, condemn what is new.

The decisions are core/condemning.py's. A pass may end anywhere: what it had in mind is in the condemned lists, and the
next one looks anew. Blocking; one thread at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from snapd.core.condemning import (
    CollectRules,
    Deletion,
    Garbage,
    Judgement,
    Order,
    judge,
    next_round_number,
    to_condemn,
    to_delete,
)
from snapd.core.stored import Condemned, VoidRecord
from snapd.core.tier_keys import TierKeys
from snapd.core.tier_sight import Sight
from snapd.store.base import Created, Store
from snapd.tier.envelope import NBYTES_MAX, Kind, kind_name
from snapd.tier.notes import encode_condemned, encode_void
from snapd.tier.sighting import Looker

BATCH_KEYS = 500  # deleted by one call
LOOK_S_MIN = (
    60.0  # a look may be so old whatever the rounds are: short ones are for tests, on slow machines too
)


def no_point(name: str) -> None:
    """Where nobody is interested in moments."""


@dataclass(slots=True)
class Pass:
    """What a pass saw and did; in a dry run, what it would have done."""

    sight: Sight
    judgement: Judgement
    deletion: Deletion
    condemned: tuple[Garbage, ...] = ()
    deleted: list[Garbage] = field(default_factory=list)
    voided: int = 0
    retired: int = 0
    aborted: int = 0
    ended_early: str = ""  # why not all was deleted that was due
    next_s: float | None = None  # in so long something may be due; None: nothing is condemned
    requests: int = 0

    @property
    def stored_nbytes(self) -> int:
        return sum(pack.nbytes for pack in self.sight.packs.values())

    @property
    def live_nbytes(self) -> int:
        """Of packs that something alive names."""
        return sum(
            pack.nbytes for name, pack in self.sight.packs.items() if name in self.judgement.live_packs
        )

    @property
    def deleted_nbytes(self) -> int:
        return sum(item.nbytes for item in self.deleted)

    @property
    def is_quiet(self) -> bool:
        """There was nothing to condemn or to delete. Void records do not count: each ends in its own time."""
        items = (*self.judgement.garbage.values(), *self.deleted)
        return all(item.order is Order.VOID for item in items) and not self.aborted


class Collector:
    """Of one job. `write_id`: 32 hexadecimal digits of its own. `point`: named moments, for tests."""

    def __init__(
        self,
        store: Store,
        job: str,
        rules: CollectRules,
        *,
        write_id: str,
        point: Callable[[str], None] = no_point,
    ) -> None:
        self.rules = rules
        self.keys = TierKeys(job)
        self._store, self._write_id, self._point = store, write_id, point
        self._looker = Looker(store, self.keys)

    def run(self, *, is_dry: bool = False) -> Pass:
        """One pass.

        Raises:
            IntegrityError: kind `tier_version`, ...: nothing was done. What a store raises: the next pass goes on.
        """
        asked = _asked(self._store)
        sight = self._looker.look()
        judgement = judge(sight, self.rules)
        deletion = to_delete(judgement, sight, self.rules)
        done = Pass(sight, judgement, deletion, next_s=deletion.next_s)
        done.condemned = to_condemn(judgement, sight)
        self._point("daemon.gc.look.after")
        if is_dry:
            done.deleted = list(deletion.keys)
        else:
            self._work(done)
        if done.condemned:
            done.next_s = min(filter(None, (done.next_s, self.rules.round_s)))
        done.requests = _asked(self._store) - asked
        return done

    def _work(self, done: Pass) -> None:
        if self._void(done) and self._delete(done):
            self._store.delete(done.deletion.retire)
            done.retired = len(done.deletion.retire)
        for upload in done.judgement.uploads:
            self._store.abort_unfinished(upload.key, upload.token)
            done.aborted += 1
        if done.condemned:
            self._condemn(done)

    def _void(self, done: Pass) -> bool:
        """Take the places of commit records; False: somebody has committed meanwhile, so all is looked at anew."""
        for snapshot, revision, is_dropped in done.deletion.voids:
            void = VoidRecord(self.keys.job, snapshot, revision, is_dropped, self._write_id)
            key = self.keys.snapshot(snapshot, revision)
            if self._store.create(key, encode_void(void)) is Created.OURS:
                done.voided += 1
            elif kind_name(self._store.read(key, max_nbytes=NBYTES_MAX[Kind.SNAPSHOT])) != Kind.VOID.value:
                done.ended_early = f"{snapshot} was committed meanwhile (revision {revision})"
                return False
        if done.deletion.voids:
            self._point("daemon.gc.void.after")
        return True

    def _delete(self, done: Pass) -> bool:
        """Delete in order; False: it took so long that all must be looked at anew."""
        for batch in _batches(done.deletion.keys):
            age_s = self._store.now_s() - done.sight.now_s
            if age_s > max(self.rules.round_s / 2, LOOK_S_MIN):
                done.ended_early = f"the look was {age_s:.0f} s ago"
                return False
            self._point(_POINTS[batch[0].order])
            self._store.delete([item.key for item in batch])
            done.deleted.extend(batch)
        return True

    def _condemn(self, done: Pass) -> None:
        number = next_round_number(done.sight)
        keys = tuple(item.key for item in done.condemned)
        self._point("daemon.gc.list.before")
        condemned = Condemned(self.keys.job, number, self._write_id, keys)
        if (
            self._store.create(self.keys.condemned_round(number), encode_condemned(condemned))
            is not Created.OURS
        ):
            done.condemned = ()
            done.ended_early = "another collector is at work"
        self._point("daemon.gc.list.after")


_POINTS = {
    Order.RECORD: "daemon.gc.record.before",
    Order.SHARD: "daemon.gc.manifest.before",
    Order.INTENT: "daemon.gc.manifest.before",
    Order.PACK: "daemon.gc.pack.before",
    Order.VOID: "daemon.gc.record.before",
}


def _batches(keys: Sequence[Garbage]) -> Iterator[list[Garbage]]:
    """Of one kind each: those that must go first are gone before the next are touched."""
    for _, group in itertools.groupby(keys, key=lambda item: item.order):
        items = list(group)
        for at in range(0, len(items), BATCH_KEYS):
            yield items[at : at + BATCH_KEYS]


def _asked(store: Store) -> int:
    return sum(store.requests.count.values())
