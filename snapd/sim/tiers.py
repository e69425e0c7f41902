"""`python -m snapd.sim.tiers`: every interleaving of small tiers, long seeded runs, and each broken rule found."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace

from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_explorer import Explored, Explorer
from snapd.sim.tier_runs import run_tier_seed
from snapd.sim.tier_scenarios import SCENARIOS

# (scenario, crashes, late requests, whether intents stay young): explored to the end
SMALL: tuple[tuple[str, int, int, bool], ...] = (
    ("pin", 1, 1, False),
    ("dropping", 0, 0, False),
    ("dropping", 0, 0, True),
    ("dropping", 1, 0, False),
    ("overtaken", 0, 0, True),
    ("two collectors", 0, 0, False),
    ("two new collectors", 0, 0, False),
)
LARGE: tuple[tuple[str, int, int, bool], ...] = (
    ("dropping", 1, 1, False),
    ("dropping", 1, 1, True),
    ("rewriter", 0, 0, False),
    ("rewriter", 0, 0, True),
    ("rewriter", 1, 0, False),
    ("one snapshot", 0, 0, False),
    ("one snapshot", 0, 0, True),
    ("one snapshot", 1, 0, False),
    ("two snapshots", 0, 0, False),
)
# Where each broken rule shows: (scenario, crashes, late requests, whether intents stay young).
FINDS: dict[TierBug, tuple[str, int, int, bool]] = {
    TierBug.SAME_ROUND: ("pin", 1, 1, False),
    TierBug.NO_SECOND_LOOK: ("pin", 1, 1, False),
    TierBug.LISTS_READ_LAST: ("two new collectors", 0, 0, False),
    TierBug.LIST_REMOVED_FIRST: ("pin", 1, 1, False),
    TierBug.PACKS_FIRST: ("pin", 1, 1, False),
    TierBug.NO_VOID: ("dropping", 0, 0, False),
    TierBug.NO_DROP_VOID: ("dropping", 0, 1, False),
    TierBug.INTENTS_IGNORED: ("dropping", 0, 0, False),
    TierBug.MANIFESTS_IGNORED: ("overtaken", 0, 0, True),
    TierBug.NEWEST_NOT_KEPT: ("dropping", 0, 0, False),
    TierBug.OLD_REVISION_DROPPED: ("rewriter", 0, 0, False),
    TierBug.NO_INTENT: ("two collectors", 0, 0, False),
    TierBug.INTENT_LATE: ("two new collectors", 0, 0, False),
    TierBug.LISTS_NOT_READ: ("two collectors", 0, 0, False),
    TierBug.BASE_READ_EARLY: ("two collectors", 0, 0, False),
    TierBug.INTENT_REMOVED_EARLY: ("two collectors", 0, 0, False),
    TierBug.COMMIT_REPLACES: ("dropping", 0, 0, False),
    TierBug.COMMIT_EARLY: ("two collectors", 0, 0, False),
    TierBug.PIN_NOT_CHECKED: ("pin", 1, 1, False),
}


def explore(
    name: str, crashes: int, late: int, is_young: bool, bugs: frozenset[TierBug] = frozenset()
) -> Explored:
    """All states of a scenario, or those up to the first broken promise."""
    scenario = SCENARIOS[name](bugs)
    return Explorer(replace(scenario, crashes=crashes, late=late, is_young=is_young)).run()


def main(arguments: list[str] | None = None) -> int:
    """0: all promises were kept, and every broken rule was found; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m snapd.sim.tiers", description=__doc__)
    parser.add_argument("--seeds", default="1..40", metavar="A..B", help="long runs")
    parser.add_argument("--small", action="store_true", help="only the small scenarios, and no bugs")
    options = parser.parse_args(arguments)
    is_good = True
    for case in SMALL if options.small else (*SMALL, *LARGE):
        is_good = _told(case, explore(*case)) and is_good
    if not options.small:
        is_good = _bugs() and is_good
    return 0 if _seeds(options.seeds) and is_good else 1


def _told(case: tuple[str, int, int, bool], found: Explored) -> bool:
    name, crashes, late, is_young = case
    intents = "young intents" if is_young else "old intents"
    title = f"{name} ({crashes} crashes, {late} late requests, {intents})"
    print(
        f"{title:62} {found.states:9,} states, {found.ends:5} tidied up: {found.broken or 'all promises kept'}"
    )
    for line in found.trace:
        print(f"    {line}")
    sys.stdout.flush()
    return not found.broken


def _bugs() -> bool:
    is_good = True
    for bug in TierBug:
        found = explore(*FINDS[bug], bugs=frozenset({bug}))
        is_good = is_good and bool(found.broken)
        where = f"{FINDS[bug][0]}, {len(found.trace)} steps"
        print(f"{bug.name.lower():22} {where:32} {found.broken or 'NOT FOUND'}", flush=True)
    return is_good


def _seeds(text: str) -> bool:
    first, _, last = text.partition("..")
    counts, broken, began_s = Counter[str](), 0, time.monotonic()
    seeds = range(int(first), int(last or first) + 1)
    for seed in seeds:
        outcome = run_tier_seed(seed)
        counts.update(outcome.counts)
        if outcome.broken:
            broken += 1
            print(f"seed {seed}: {outcome.broken}\n" + "\n".join(outcome.trace[-40:]))
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print(f"{len(seeds)} seeds in {time.monotonic() - began_s:.0f} s: {broken} broken promises; {told}")
    return not broken


if __name__ == "__main__":
    sys.exit(main())
