"""Code in the guides is what it seems: Python compiles, TOML holds settings that the daemon takes, JSON parses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from snapd.config import load
from snapd.config_cluster import plan_cluster
from snapd.config_tiers import check_tier

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and line, code) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S):
            line = text[: block.start()].count("\n") + 1
            found.append((f"{page.name}:{line}", block.group(1)))
    assert found
    return found


@pytest.mark.parametrize(
    ("place", "code"), blocks("python"), ids=lambda value: value if ".md:" in value else ""
)
def test_python_compiles(place: str, code: str) -> None:
    compile(code, place, "exec")


@pytest.mark.parametrize(
    ("place", "code"), blocks("toml"), ids=lambda value: value if ".md:" in value else ""
)
def test_settings_are_taken(place: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(code)
    config = load(file=file, environ={}).config
    check_tier(config.tier)
    if config.cluster.listen and config.cluster.coordinator:
        plan_cluster(config.cluster)


@pytest.mark.parametrize(
    ("place", "code"), blocks("json"), ids=lambda value: value if ".md:" in value else ""
)
def test_json_parses(place: str, code: str) -> None:
    json.loads(code)
