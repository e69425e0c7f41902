"""`python -m snapd.sim`: seeds with faults, one seed's trace, scenarios as text, planted bugs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from snapd.sim.bugs import MIXES, Bug
from snapd.sim.runs import crowd_settings, run_seed, settings_of
from snapd.sim.scenarios import RULE, parts_of, run_text
from snapd.sim.simulation import Outcome

TRACE_SHOWN = 60


def main(arguments: list[str] | None = None) -> int:
    """0: all promises were kept (or every bug was found); 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m snapd.sim", description=__doc__)
    parser.add_argument("--seeds", default="1..100", metavar="A..B", help="one seed, or a range")
    parser.add_argument("--nodes", type=int, default=0, help="instead of what each seed chooses")
    parser.add_argument("--crowd", type=int, default=0, metavar="NODES", help="thousands of nodes (crowd.py)")
    parser.add_argument("--faults", type=int, default=50, help="node-faults of each seed (default 50)")
    parser.add_argument("--bug", choices=[bug.name.lower() for bug in Bug], help="with this rule broken")
    parser.add_argument("--bugs", action="store_true", help="each planted bug: the first seed that finds it")
    parser.add_argument("--scenario", type=Path, action="append", help="a text; its trace is compared")
    parser.add_argument("--rewrite", action="store_true", help="take the scenarios' traces as they are now")
    options = parser.parse_args(arguments)
    first, _, last = options.seeds.partition("..")
    seeds = range(int(first), int(last or first) + 1)
    if options.scenario:
        return max(_scenario(path, is_rewritten=options.rewrite) for path in options.scenario)
    if options.bugs:
        return _bugs(seeds, options.faults)
    return _seeds(seeds, options)


def _seeds(seeds: range, options: argparse.Namespace) -> int:
    bugs = frozenset({Bug[options.bug.upper()]}) if options.bug else frozenset()
    broken, kinds, counts = 0, Counter[str](), Counter[str]()
    for seed in seeds:
        settings = settings_of(seed, faults=options.faults, bugs=bugs)
        if options.crowd:
            settings = crowd_settings(options.crowd, faults=options.faults, bugs=bugs)
        if options.nodes:
            settings = replace(settings, nodes=options.nodes)
        outcome = run_seed(seed, settings)
        kinds.update(outcome.by_kind)
        counts.update(
            faults=outcome.node_faults, restores=outcome.restores, steps=outcome.steps, events=outcome.events
        )
        if outcome.promise or len(seeds) == 1:
            broken += bool(outcome.promise)
            print(failure(outcome))
            sys.stdout.flush()
    print(
        f"{len(seeds)} seeds, {counts['faults']} node-faults, {counts['restores']} restores, {counts['steps']} steps,"
        f" {counts['events']} events: {broken} broken promises"
    )
    print("  " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    return 1 if broken else 0


def failure(outcome: Outcome) -> str:
    """A seed's last words: what broke, the trace up to it, and how to see it again."""
    lines = [f"seed {outcome.seed}: {outcome.broken or 'kept all promises'}", *outcome.trace[-TRACE_SHOWN:]]
    return "\n".join([*lines, f"again: python -m snapd.sim --seeds {outcome.seed}"])


def find_bug(bug: Bug, seeds: range, faults: int = 50) -> Outcome | None:
    """The first seed that breaks a promise with that bug planted, and keeps all without it."""
    for seed in seeds:
        settings = settings_of(seed, faults=faults, kinds=MIXES.get(bug, ()))
        outcome = run_seed(seed, replace(settings, bugs=frozenset({bug})))
        if outcome.promise and not run_seed(seed, settings).promise:
            return outcome
    return None


def _bugs(seeds: range, faults: int) -> int:
    is_complete = True
    for bug in Bug:
        outcome = find_bug(bug, seeds, faults)
        found = f"seed {outcome.seed}: {outcome.broken[:100]}" if outcome else "not found"
        is_complete = is_complete and outcome is not None
        print(f"{bug.name.lower():28} {found}", flush=True)
    return 0 if is_complete else 1


def _scenario(path: Path, *, is_rewritten: bool) -> int:
    text = path.read_text()
    script, accepted = parts_of(text)
    lines = run_text(text)
    if is_rewritten:
        path.write_text(f"{script.rstrip()}\n{RULE}\n" + "\n".join(lines) + "\n")
        return 0
    if lines == accepted:
        print(f"{path.name}: as accepted")
        return 0
    print(f"{path.name}: another trace; look at it, then --rewrite")
    print("\n".join(lines))
    return 1


if __name__ == "__main__":
    sys.exit(main())
