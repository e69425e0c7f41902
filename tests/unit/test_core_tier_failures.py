"""Which failures of a tier pass by themselves: every kind that a flush may end with is decided."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from snapd.core.tier_failures import LASTING, PASSING, may_pass

ROOT = Path(__file__).resolve().parents[2]
RAISED = re.compile(r'kind="([a-z_]+)"')
WRITERS = ("adopting", "committing", "envelope", "flush", "intents", "known_chunks", "notes", "writing")


def raised_kinds() -> set[str]:
    """By stores, and by what a flush runs through."""
    places = [*(ROOT / "snapd/store").glob("*.py"), ROOT / "snapd/runtime/tiers.py"]
    places += [ROOT / f"snapd/tier/{name}.py" for name in WRITERS]
    return {kind for place in places for kind in RAISED.findall(place.read_text())}


def test_every_kind_is_decided_once() -> None:
    kinds = raised_kinds()
    assert len(kinds) > 15
    assert kinds <= PASSING | LASTING, f"not decided: {sorted(kinds - PASSING - LASTING)}"
    assert not PASSING & LASTING


@pytest.mark.parametrize(
    "kind", ["store_credentials", "store_denied", "bucket", "store_tls", "store_conditional"]
)
def test_what_a_person_must_mend_does_not_pass(kind: str) -> None:
    assert not may_pass(kind)


@pytest.mark.parametrize(
    "kind", ["store_unreachable", "store_slow", "store_throttled", "store_full", "of_tomorrow"]
)
def test_the_rest_may_pass(kind: str) -> None:
    assert may_pass(kind)
