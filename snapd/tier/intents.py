"""A writer's intent in a tier: published before it relies on what is there, put again as a sign of life, removed at the
end; and the lists of what a collector is about to delete, which a writer reads before it relies on anything.

The order is the protocol (DESIGN 6): the intent first, then the condemned lists; and the lists and the intent once more
right before the commit. Blocking; one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from snapd.core.ids import SnapshotId
from snapd.core.stored import Intent
from snapd.core.tier_keys import TierKeys
from snapd.errors import NotFoundError, UnavailableError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.notes import decode_condemned, encode_intent

BEATS_PER_TTL = 4


def read_condemned(store: Store, keys: TierKeys) -> frozenset[str]:
    """Every key that a collector may be about to delete.

    Raises:
        IntegrityError: a list is broken: what it condemns is not known, so nothing may be relied upon.
    """
    found: set[str] = set()
    for info in store.list(keys.condemned):
        if keys.round_of(info.key) is None:
            continue
        try:
            data = store.read(info.key, max_nbytes=NBYTES_MAX[Kind.CONDEMNED])
        except NotFoundError as error:
            if error.kind != "object":
                raise
            continue  # its round is over
        found.update(decode_condemned(data, key=info.key, job=keys.job).keys)
    return frozenset(found)


def condemned_error(what: str, key: str) -> UnavailableError:
    """A writer that relied on something condemned starts over."""
    return UnavailableError(
        f"{what} is about to be deleted by a collector, or was deleted; what was written is checked and written anew",
        kind="tier_condemned",
        key=key,
    )


class WriterIntent:
    """The intent of one writer: a write id, and which snapshot it writes just now."""

    def __init__(
        self, store: Store, keys: TierKeys, intent: Intent, *, ttl_s: float, monotonic_s: Callable[[], float]
    ) -> None:
        """`ttl_s`: after so long without a sign of life a collector gives the writer up."""
        self._store, self._keys = store, keys
        self._beat_s = ttl_s / BEATS_PER_TTL
        self._clock = monotonic_s
        self._put_at_s = 0.0
        self.intent = intent
        self.is_published = False

    @property
    def key(self) -> str:
        return self._keys.intent(self.intent.write_id)

    def publish(self, snapshot: SnapshotId, bases: Sequence[SnapshotId], revision: int = 0) -> None:
        """Say that `snapshot` is being written, as that revision, on packs of `bases`."""
        self.intent = replace(
            self.intent, id=snapshot, bases=tuple(bases), revision=revision, beat=self.intent.beat + 1
        )
        self._put()

    def beat(self) -> None:
        """Put it again if that is due. Called every so often while the writer works or waits.

        Raises:
            UnavailableError: kind `tier_condemned`: it was deleted, and so may have been what it protected: it is not
            put back as if nothing had happened.
        """
        if self.is_published and self._clock() - self._put_at_s >= self._beat_s:
            self._check_there()
            self.intent = replace(self.intent, beat=self.intent.beat + 1)
            self._put()

    def _put(self) -> None:
        began_s = self._clock()
        self._store.put(self.key, encode_intent(self.intent))
        self._put_at_s, self.is_published = began_s, True

    def check(self) -> frozenset[str]:
        """The condemned keys, after having seen that the intent is there and not among them.

        Raises:
            UnavailableError: kind `tier_condemned`: a collector has given this writer up.
        """
        condemned = read_condemned(self._store, self._keys)
        if self.key in condemned:
            raise condemned_error("this writer's intent", self.key)
        self._check_there()
        return condemned

    def _check_there(self) -> None:
        try:
            self._store.head(self.key)
        except NotFoundError as error:
            if error.kind != "object":
                raise
            raise condemned_error("this writer's intent", self.key) from error

    def remove(self) -> None:
        """The writer is done, or has given up."""
        self._store.delete([self.key])
        self.is_published = False
