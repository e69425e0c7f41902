"""Small tiers in which all that two writers and a collector can do is tried, and where each broken rule shows."""

from __future__ import annotations

from dataclasses import replace

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, StoredSnapshot
from snapd.core.tier_keys import pack_name
from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_collector import Collecting, collecting
from snapd.sim.tier_explorer import OLD, Scenario
from snapd.sim.tier_model import JOB, KEYS, Content, Item, Manifest, Pack, Store
from snapd.sim.tier_programs import Bugs, Rewriting, Writing, pinning, record_of, rewriting, writing

OLDER, BASE, NEXT, LAST = (SnapshotId(1, step) for step in (5, 10, 20, 30))
ENDLESS_S = 1e18  # of a writer that is never told by its own clock that it is slow


def committed(*snapshots: SnapshotId, pack_of: dict[SnapshotId, int] | None = None) -> dict[str, Content]:
    """A tier that has these snapshots, each of one rank and one pack; `pack_of` lets them share packs."""
    found: dict[str, Content] = {}
    for number, snapshot in enumerate(snapshots):
        pack = pack_name(f"{900 + (pack_of or {}).get(snapshot, number):032x}", 0)
        key, manifest = KEYS.shard(snapshot, 0), Manifest(frozenset({pack}))
        found[KEYS.pack(pack)] = Pack()
        found[key] = manifest
        found[KEYS.snapshot(snapshot)] = record_of(snapshot, 0, f"{900 + number:032x}", {0: (key, manifest)})
    return found


def store_of(contents: dict[str, Content]) -> Store:
    return Store(tuple(Item(key, contents[key], 0.0) for key in sorted(contents)))


def writer(number: int, target: SnapshotId, bugs: Bugs, rank: int = 0, world_size: int = 1) -> Writing:
    return Writing(
        number, target, rank, world_size, attempts_max=2, round_s=ENDLESS_S, ttl_s=ENDLESS_S, bugs=bugs
    )


def collector(number: int, bugs: Bugs, passes: int = 3, rules: CollectRules = OLD) -> Collecting:
    return Collecting(number=number, rules=rules, passes=passes, bugs=bugs)


def two_snapshots(bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0) -> Scenario:
    """Each of two writers its own snapshot, both on a base that goes as soon as one of them has committed."""
    return Scenario(
        store_of(committed(BASE)),
        {
            "first": (writing, (writer(1, NEXT, bugs), 0)),
            "second": (writing, (replace(writer(2, LAST, bugs), attempts_max=1), 0)),
            "collector": (collecting, (collector(9, bugs), 0)),
        },
        crashes=crashes,
        late=late,
    )


def one_snapshot(bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0) -> Scenario:
    """Two nodes write the two shards of one snapshot."""
    return Scenario(
        store_of(committed(BASE)),
        {
            "first": (writing, (replace(writer(1, NEXT, bugs, 0, 2), attempts_max=1), 0)),
            "second": (writing, (replace(writer(2, NEXT, bugs, 1, 2), attempts_max=1), 0)),
            "collector": (collecting, (collector(9, bugs, passes=2), 0)),
        },
        crashes=crashes,
        late=late,
    )


def overtaken(bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0) -> Scenario:
    """One of two nodes leaves when its manifest is there; the other may still commit."""
    scenario = one_snapshot(bugs, crashes=crashes, late=late)
    first, second = (replace(writer(1 + rank, NEXT, bugs, rank, 2), attempts_max=1) for rank in (0, 1))
    programs = {
        **scenario.programs,
        "first": (writing, (replace(first, gives_up=True), 0)),
        "second": (writing, (second, 0)),
    }
    return replace(scenario, programs=programs, store=store_of({}), is_young=True)


def dropping(bugs: Bugs = frozenset(), *, crashes: int = 1, late: int = 1) -> Scenario:
    """One writer; snapshots go that have two revisions, and packs in common with what stays."""
    contents = committed(OLDER, BASE, pack_of={BASE: 0})
    older = contents[KEYS.snapshot(OLDER)]
    assert isinstance(older, StoredSnapshot)
    newer_key, newer = KEYS.shard(OLDER, 0, 1), Manifest(frozenset({pack_name(f"{950:032x}", 0)}))
    contents[newer_key] = newer
    contents.update({KEYS.pack(name): Pack() for name in newer.packs})
    contents[KEYS.snapshot(OLDER, 1)] = record_of(OLDER, 1, f"{950:032x}", {0: (newer_key, newer)}, 1.0)
    return Scenario(
        store_of(contents),
        {
            "writer": (writing, (writer(1, NEXT, bugs), 0)),
            "collector": (collecting, (collector(9, bugs, passes=4), 0)),
        },
        crashes=crashes,
        late=late,
    )


def two_collectors(
    bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0, is_condemned: bool = True
) -> Scenario:
    """A job has two collectors by mistake, and the older of two snapshots, on which a writer builds, is condemned, or
    about to be.
    """
    contents = committed(OLDER, BASE)
    older = contents[KEYS.snapshot(OLDER)]
    assert isinstance(older, StoredSnapshot)
    if is_condemned:
        named = (KEYS.snapshot(OLDER), KEYS.shard(OLDER, 0), *map(KEYS.pack, older.packs))
        contents[KEYS.condemned_round(7)] = Condemned(JOB, 7, f"{7:032x}", named)
    task = replace(writer(1, NEXT, bugs), attempts_max=1, base=OLDER)
    return Scenario(
        store_of(contents),
        {
            "writer": (writing, (task, 0)),
            "collector": (collecting, (collector(8, bugs, 1), 0)),
            "other collector": (collecting, (collector(9, bugs, 1), 0)),
        },
        crashes=crashes,
        late=late,
    )


def two_new_collectors(bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0) -> Scenario:
    """As two collectors, before anything is condemned."""
    return two_collectors(bugs, crashes=crashes, late=late, is_condemned=False)


def rewriter(bugs: Bugs = frozenset(), *, crashes: int = 0, late: int = 0) -> Scenario:
    """The packs of the base are rewritten while a writer builds upon it."""
    return Scenario(
        store_of(committed(BASE)),
        {
            "writer": (writing, (replace(writer(1, NEXT, bugs), attempts_max=1), 0)),
            "rewriter": (rewriting, (Rewriting(3, BASE, bugs),)),
            "collector": (collecting, (collector(9, bugs, 2), 0)),
        },
        crashes=crashes,
        late=late,
    )


def pin(bugs: Bugs = frozenset()) -> Scenario:
    """Somebody pins the older snapshot, which is about to go."""
    return Scenario(
        store_of(committed(OLDER, BASE)),
        {
            "user": (pinning, ("best", OLDER, bugs)),
            "collector": (collecting, (collector(9, bugs), 0)),
        },
        crashes=1,
        late=1,
    )


SCENARIOS = {
    "two snapshots": two_snapshots,
    "one snapshot": one_snapshot,
    "overtaken": overtaken,
    "dropping": dropping,
    "two collectors": two_collectors,
    "two new collectors": two_new_collectors,
    "rewriter": rewriter,
    "pin": pin,
}

__all__ = ["SCENARIOS", "TierBug"]
