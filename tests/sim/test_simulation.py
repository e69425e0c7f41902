"""The cluster in virtual time: promises under faults, exact replay, planted bugs, scenarios as text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snapd.sim.__main__ import failure, find_bug
from snapd.sim.bugs import Bug
from snapd.sim.runs import crowd_settings, run_seed, settings_of
from snapd.sim.scenarios import parts_of, run_text

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
QUICK_BUGS = (
    Bug.SEND_BEFORE_PERSIST,
    Bug.FRAGMENT_BEFORE_PERSIST,
    Bug.PARITY_OF_OLDER_ROW,
    Bug.RECORDS_NOT_REPLICATED,
    Bug.PART_MISSING_IS_FINE,
    Bug.DROP_PROTECTED,
    Bug.OLD_PARITY_FIRST,
    Bug.BARRIER_WITHOUT_ONE,
    Bug.MIXED_STEPS,
    Bug.PUSHED_NOT_AWAITED,
    Bug.FENCE_IGNORED,
    Bug.TOLD_BEFORE_RECORDED,
    Bug.OLD_TRAINERS_NOT_WAITED_FOR,
)


@pytest.mark.parametrize("seed", range(1, 21))
def test_promises_are_kept_whatever_happens(seed: int) -> None:
    outcome = run_seed(seed, settings_of(seed, faults=25))
    assert not outcome.promise, failure(outcome)
    assert outcome.node_faults >= 25 or "given out again" in outcome.trace[-1]
    assert outcome.restores > 0, "no world was ever restored"


def test_a_crowd_that_was_there_from_the_start_loses_nodes_and_goes_on() -> None:
    outcome = run_seed(1, crowd_settings(48, faults=4, fault_every_s=1.0))
    assert not outcome.promise, failure(outcome)
    assert outcome.node_faults >= 4
    assert outcome.restores > 1, "no world was ever restored"


def test_who_takes_a_generation_for_his_own_has_not_known_it_before() -> None:
    """Seed 32: the store is wiped while the only node that knew generation 6 is away; a node that came to know it as
    another world's, a moment before, is no witness."""
    outcome = run_seed(32, settings_of(32, faults=50))
    assert not outcome.promise, failure(outcome)


@pytest.mark.parametrize("bug", QUICK_BUGS, ids=lambda bug: bug.name.lower())
def test_a_planted_bug_is_found(bug: Bug) -> None:
    assert find_bug(bug, range(1, 41)) is not None


def test_a_seed_replays_exactly_also_in_another_process() -> None:
    here = run_seed(11, settings_of(11, faults=15))
    assert run_seed(11, settings_of(11, faults=15)).trace == here.trace
    program = (
        "from snapd.sim.runs import crowd_settings, run_seed, settings_of\n"
        "print('\\n'.join(run_seed(11, settings_of(11, faults=15)).trace))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
    )
    assert other.stdout.splitlines() == here.trace


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_scenario_goes_as_it_was_accepted(path: Path) -> None:
    """Another trace: look at it, then `python -m snapd.sim --scenario FILE --rewrite`."""
    text = path.read_text()
    assert run_text(text) == parts_of(text)[1]


def test_there_are_scenarios() -> None:
    assert len(GOLDEN) >= 9
