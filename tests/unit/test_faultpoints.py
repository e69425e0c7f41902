"""The points in the sources and the points that can be armed are the same."""

from __future__ import annotations

import re
from pathlib import Path

from snapd.runtime.faultpoints import POINTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_point_in_the_sources_can_be_armed_and_every_other_name_is_refused() -> None:
    used: set[str] = set()
    for path in (ROOT / "snapd").rglob("*.py"):
        if path.name != "faultpoints.py":  # events have one dot, points more
            used |= set(re.findall(r'"(daemon\.[a-z_]+\.[a-z_.]+)"', path.read_text(encoding="utf-8")))
    assert len(used) > 30
    assert sorted(used) == sorted(POINTS)
