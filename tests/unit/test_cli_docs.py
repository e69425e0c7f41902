"""The guides name what there is: every error code, setting and command, and no link leads nowhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from snapd.cli.main import app
from snapd.config import env_name, explain, load

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(DOCS.rglob("*.md"))]


def _kinds(path: Path) -> set[str]:
    """Error codes in a source: `kind="..."` of calls, and what classes set."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg == "kind"]
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            is_kind = isinstance(target, ast.Name) and target.id in ("kind", "default_kind")
            values = [node.value] if is_kind and node.value is not None else []
        else:
            continue
        found |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return found


def test_every_error_code_is_in_the_troubleshooting_guide() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "snapd").rglob("*.py"), *(ROOT / "client").rglob("*.py")]
    kinds = set().union(*map(_kinds, sources))
    assert len(kinds) > 40
    assert sorted(kind for kind in kinds if f"`{kind}`" not in text) == []


def test_every_setting_is_in_the_configuration_guide_with_default_and_bound() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    missing = []
    for row in explain(load(environ={})):
        if row.path.startswith("fault."):
            continue
        bound = row.bound.replace(" | ", ", ")
        line = f"| `{row.path}` | `{env_name(row.path)}` | {row.default or 'empty'} | {bound} | {row.doc} |"
        if line not in text:
            missing.append(line)
    assert missing == []


def test_every_command_has_a_section() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands] + [
        group.name for group in app.registered_groups
    ]
    assert sorted(name for name in names if name and f"snapd {name}" not in text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            missing.append(target)
    assert missing == []


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
