"""The writers' side of the protocol of core/condemning.py: what a writer must know before it builds upon what is there,
before it commits, and before it takes its intent away. Pure.

The order is: publish the intent; read the condemned lists; then read the commit records and manifests of the bases.
Whatever a collector deletes without having seen the intent was in a list that is read then, or its commit record is
gone already when it is looked for.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys


class Place(enum.Enum):
    """What lies at the key of a commit record."""

    RECORD = "record"
    VOID = "void"  # that revision was given up
    DROPPED = "dropped"  # that revision and all below are void: the snapshot is gone


@dataclass(frozen=True, slots=True)
class Attempt:
    """`revision`: to be committed, of shard manifests and commit record alike; None: there is nothing to write."""

    revision: int | None
    reason: str


def attempt_of(places: Mapping[int, Place]) -> Attempt:
    """As which revision a snapshot is to be written, by what lies at the keys of its commit records."""
    if not places:
        return Attempt(0, "nobody has committed it")
    newest = max(places)
    if any(place is Place.DROPPED for place in places.values()):
        return Attempt(None, "retention has dropped it from the tier")
    committed = [revision for revision, place in places.items() if place is Place.RECORD]
    if committed:
        return Attempt(None, f"it is committed as revision {max(committed)}")
    return Attempt(newest + 1, f"revision {newest} was given up by a collector")


def check_base(base: SnapshotId, record_keys: Collection[str], condemned: Collection[str]) -> str:
    """Why a writer may not build upon `base`; empty: it may, but for packs that are condemned themselves.

    Args:
        record_keys: of its commit records that were there AFTER the condemned lists were read.
        condemned: all keys of all lists, read AFTER the writer's intent, which names the base, was published.
    """
    if not record_keys:
        return f"{base} is not there any more"
    doomed = sorted(key for key in record_keys if key in condemned)
    return f"{doomed[0]} is condemned" if doomed else ""


class Go(enum.Enum):
    COMMIT = "commit"
    LOOK_AGAIN = "look again"  # what was checked, was checked too long ago
    START_OVER = "start over"  # a new write id and intent; nothing that was written is relied upon


@dataclass(frozen=True, slots=True)
class BeforeCommit:
    """What a writer knows right before it creates the commit record, all of it read since `age_s` seconds.

    Attributes:
        intent_is_there: its own.
        condemned: all keys of all lists, read before the shard manifests were looked at.
        shard_keys: of all ranks.
        packs: that the manifests name. `packs_there`: which of them were seen; None: not looked for.
    """

    keys: TierKeys
    intent_key: str
    intent_is_there: bool
    condemned: Collection[str]
    shard_keys: Collection[str]
    packs: Collection[str]
    packs_there: Collection[str] | None
    age_s: float


def check_before_commit(known: BeforeCommit, *, round_s: float) -> tuple[Go, str]:
    """Whether a writer may create the commit record now. What has changed since is told by the creation itself: the
    place is taken then, by another's record or by a void one.
    """
    if known.age_s > round_s / 2:
        return Go.LOOK_AGAIN, f"it was checked {known.age_s:.0f} s ago, with rounds of {round_s:.0f} s"
    if not known.intent_is_there:
        return Go.START_OVER, "a collector has given this writer up: its intent is gone"
    needed = [*known.shard_keys, *map(known.keys.pack, known.packs)]
    doomed = next((key for key in needed if key in known.condemned), None)
    if doomed is not None:
        return Go.START_OVER, f"{doomed}, which the snapshot needs, is condemned"
    if known.packs_there is not None:
        lost = sorted(set(known.packs).difference(known.packs_there))
        if lost:
            return Go.START_OVER, f"{known.keys.pack(lost[0])}, which the snapshot needs, is gone"
    return Go.COMMIT, "all that it names is there, and nothing of it is condemned"
