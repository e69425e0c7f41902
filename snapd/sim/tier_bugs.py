"""Rules of the tiers' protocol, each of which can be broken to see that the checkers notice."""

from __future__ import annotations

import enum


class TierBug(enum.Enum):
    """What is done wrong. docs/tiers-protocol.md says by which scenario each is found."""

    SAME_ROUND = "the collector deletes by the look by which it condemned"
    NO_SECOND_LOOK = "the collector deletes what its list says, without looking again"
    LISTS_READ_LAST = "the collector reads the condemned lists after the intents"
    LIST_REMOVED_FIRST = "dropped snapshots are not voided, and the list that names them is removed first"
    PACKS_FIRST = "dropped snapshots are not voided, and packs are deleted before commit records"
    NO_VOID = "an intent is deleted, and its attempt not voided"
    NO_DROP_VOID = "a dropped snapshot is not voided"
    INTENTS_IGNORED = "the collector does not ask who is writing"
    MANIFESTS_IGNORED = "manifests that are not committed yet protect nothing"
    NEWEST_NOT_KEPT = "retention may drop the newest complete snapshot"
    OLD_REVISION_DROPPED = "an older revision goes while a writer builds upon it"
    NO_INTENT = "the writer publishes no intent"
    INTENT_LATE = "the writer publishes its intent after it has read the lists"
    LISTS_NOT_READ = "the writer does not read the condemned lists"
    BASE_READ_EARLY = "the writer reads its base before the condemned lists"
    INTENT_REMOVED_EARLY = "the writer removes its intent before its manifest is there"
    COMMIT_REPLACES = "the commit record is put, whatever lies there"
    COMMIT_EARLY = "the commit record comes before the shard manifests"
    PIN_NOT_CHECKED = "pinning does not look whether the snapshot is condemned"
