"""Two writers and a collector of a tier in every interleaving, and each rule of their protocol broken once."""

from __future__ import annotations

import pytest

from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_runs import run_tier_seed
from snapd.sim.tiers import FINDS, SMALL, explore

QUICK = (
    TierBug.SAME_ROUND,
    TierBug.PACKS_FIRST,
    TierBug.NO_VOID,
    TierBug.INTENTS_IGNORED,
    TierBug.LISTS_NOT_READ,
    TierBug.COMMIT_EARLY,
    TierBug.COMMIT_REPLACES,
    TierBug.PIN_NOT_CHECKED,
)


LONG = (("dropping", 1, 0, False), ("two collectors", 0, 0, False))
CASES = [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in SMALL]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{case[3]}")
def test_every_interleaving_keeps_the_promises(case: tuple[str, int, int, bool]) -> None:
    found = explore(*case)
    assert not found.broken, "\n".join(found.trace)
    assert found.states > 1000 and found.ends > 5
    if case[1]:
        assert found.kinds["crash"] > 100
    if case[2]:
        assert found.kinds["a request lands twice"] and found.kinds["a request lands after its sender's end"]


@pytest.mark.parametrize("bug", QUICK, ids=lambda bug: bug.name.lower())
def test_a_broken_rule_is_found(bug: TierBug) -> None:
    assert explore(*FINDS[bug], bugs=frozenset({bug})).broken


def test_each_rule_has_its_scenario() -> None:
    assert set(FINDS) == set(TierBug)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug", [bug for bug in TierBug if bug not in QUICK], ids=lambda bug: bug.name.lower()
)
def test_a_broken_rule_that_is_harder_to_see_is_found(bug: TierBug) -> None:
    assert explore(*FINDS[bug], bugs=frozenset({bug})).broken


@pytest.mark.parametrize("seed", [3])
def test_a_long_run_with_stalls_crashes_and_late_requests(seed: int) -> None:
    outcome = run_tier_seed(seed)
    assert not outcome.broken, "\n".join(outcome.trace[-40:])
    assert outcome.counts["deleted"] > 100
