"""What the guides name is there, by that name: files, options, variables, metrics, events, make targets.

And the other way round: what a user can set or watch is in the guides.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry, Metric
from snapd_client import Snapshotter
from typer.core import TyperGroup

from snapd.cli.main import app
from snapd.cli.settings import flag_name
from snapd.config import OTHER_VARIABLES, Config, env_name, fields_of
from snapd.obs.collect_metrics import CollectMetrics
from snapd.obs.disk_metrics import DiskMetrics
from snapd.obs.metrics import Metrics
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.obs.tier_metrics import TierMetrics

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(DOCS.glob("*.md"))]
COMMON_OPTIONS = {"--help", "--json", "--runtime-dir"}
# Folders whose files the pages name with a path.
TREES = ("bench", "client", "csrc", "demo", "docs", "proto", "scripts", "snapd", "tests", "tools")
PLACEHOLDERS = {"SNAPD_SECTION_NAME"}  # how a variable is made of a setting's name

COMMANDS = typer.main.get_command(app)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def page_id(page: Path) -> str:
    return page.name


# --- files --------------------------------------------------------------------------------------------------------
def expanded(path: str) -> Iterator[str]:
    """`a/{b,c}.py` is two paths."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        yield path
        return
    for choice in match.group(1).split(","):
        yield from expanded(path[: match.start()] + choice + path[match.end() :])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page: Path) -> None:
    missing: list[str] = []
    for span in re.findall(r"`([^`\n]+)`", text_of(page)):
        for word in span.split():
            if re.fullmatch(rf"({'|'.join(TREES)})/[\w./*{{}},-]+", word):
                missing += [path for path in expanded(word.rstrip(".,")) if not is_there(path)]
            elif re.fullmatch(r"[\w/{},-]+\.(py|proto|hpp|cpp)", word):
                missing += [path for path in expanded(word) if not is_there(f"**/{path}")]
    assert missing == []


def is_there(path: str) -> bool:
    """`client/.../x.py` leaves folders out; without a tree before it, it is a file's name, or the end of its path."""
    pattern = path.replace("...", "**")
    if pattern.startswith("**/"):
        return any(found for tree in TREES for found in (ROOT / tree).glob(pattern))
    return any(ROOT.glob(pattern)) if "*" in pattern else (ROOT / pattern).exists()


def test_every_package_is_in_the_architecture() -> None:
    text = text_of(ROOT / "ARCHITECTURE.md")
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "snapd").glob("*/__init__.py")]
    assert sorted(str(package) for package in packages if f"`{package}/`" not in text) == []


# --- options ------------------------------------------------------------------------------------------------------
def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The command that the words begin with, after `snapd`, and its options."""
    command, names = COMMANDS, []
    for word in words:
        if not isinstance(command, TyperGroup) or word not in command.commands:
            break
        command = command.commands[word]
        names.append(word)
    return " ".join(names), {o for p in command.params for o in p.opts + p.secondary_opts} | {"--help"}


def every_command(group: Any = COMMANDS, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(group, TyperGroup):
        yield " ".join(names), group
        return
    for name, command in group.commands.items():
        yield from every_command(command, (*names, name))


def section(text: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    return found.group(1) if found else ""


@pytest.mark.parametrize(
    ("name", "command"), [*every_command()], ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_every_option_is_documented_with_its_command(name: str, command: Any) -> None:
    text = section(text_of(DOCS / "command-line.md"), f"snapd {name.split()[0]}")
    if name == "plan":
        text += text_of(DOCS / "planning.md")
    settings = {flag_name(path) for path, _, _ in fields_of(Config())} if name == "serve" else set()
    options = {o for p in command.params for o in p.opts if o.startswith("--")} - COMMON_OPTIONS - settings
    assert sorted(option for option in options if option not in text) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_that_are_shown_exist_with_their_options(page: Path) -> None:
    wrong: list[str] = []
    text = text_of(page)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [line for block in fenced for line in block.splitlines()] + spans:
        for call in re.findall(r"(?:^|[ ;(])snapd ([a-z].*)", line.split("  #")[0]):
            words = re.split(r"[|;&)>]", call)[0].replace("'", " ").replace('"', " ").split()
            name, options = options_of(words)
            if (
                not name
                and line in spans
                and page.name != "command-line.md"
                and words[0] not in COMMANDS.commands
            ):
                continue  # prose
            given = {word.split("=")[0] for word in words if word.startswith("--") and "..." not in word}
            wrong += [f"snapd {call}: {option}" for option in given - options]
    assert wrong == []


def test_options_of_scripts_that_are_shown_exist() -> None:
    """`python bench/x.py --option`: the script, or what it is made of, knows that option."""
    wrong: list[str] = []
    for page in PAGES:
        for script, rest in re.findall(
            r"python ((?:bench|scripts|tests|tools|demo)/[\w/]+\.py)([^`\n|]*)", text_of(page)
        ):
            source = (ROOT / script).read_text() + "".join(
                other.read_text()
                for other in (ROOT / script).parent.glob("*.py")
                if other.name.startswith(Path(script).stem)
            )
            for option in re.findall(r"--[\w-]+", rest):
                if f'"{option}"' not in source:
                    wrong.append(f"{page.name}: {script} {option}")
    assert wrong == []


def test_make_targets_that_are_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    wrong = [
        f"{page.name}: make {target}"
        for page in PAGES
        for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text_of(page), flags=re.M)
        for target in target
        if target and target not in targets
    ]
    assert wrong == []


# --- variables, arguments -----------------------------------------------------------------------------------------
def test_variables_that_are_named_exist() -> None:
    known = {env_name(path) for path, _, _ in fields_of(Config())} | OTHER_VARIABLES | PLACEHOLDERS
    named = {(page.name, name) for page in PAGES for name in re.findall(r"SNAPD_[A-Z0-9_]+\b", text_of(page))}
    assert sorted(pair for pair in named if pair[1] not in known) == []


def test_settings_that_are_named_exist() -> None:
    sections = "|".join({path.partition(".")[0] for path, _, _ in fields_of(Config())})
    known = {path for path, _, _ in fields_of(Config())}
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(rf"`((?:{sections})\.[a-z_]+)(?: =[^`]*)?`", text_of(page))
        if not name.endswith((".toml", ".log", ".py"))
    }
    events = event_names()
    assert sorted(pair for pair in named if pair[1] not in known | events) == []


def test_every_argument_of_the_client_is_documented() -> None:
    text = text_of(DOCS / "configuration.md")
    arguments = list(inspect.signature(Snapshotter).parameters)[1:]
    assert [name for name in arguments if f"| `{name}` |" not in text] == []


# --- metrics ------------------------------------------------------------------------------------------------------
def every_metric() -> CollectorRegistry:
    registry = Metrics().registry
    for more in (ProtectionMetrics, TierMetrics, DiskMetrics, CollectMetrics):
        more(registry)
    return registry


def served_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def test_metrics_are_documented_as_they_are_served() -> None:
    text = text_of(DOCS / "metrics-and-log.md")
    missing = [
        found.name
        for collector in every_metric()._collector_to_names
        for found in collector.describe()
        if not re.search(rf"\| `{served_name(found)}` \|[^|]*\| {re.escape(found.documentation)}", text)
    ]
    assert missing == [], "python scripts/metrics_table.py writes the table"


def test_metrics_that_are_named_exist() -> None:
    known = {
        f"{m.name}_total" if m.type == "counter" else m.name
        for c in every_metric()._collector_to_names
        for m in c.describe()
    }
    modules = {"snapd_client", "snapd_native", "snapd_proto", "snapd_fence"}
    wrong: list[str] = []
    for page in PAGES:
        for list_ in re.findall(r"`(snapd_[a-z_]+`(?:(?:, | and |,\n| and\n)`_[a-z_]+`)*)", text_of(page)):
            first, *others = re.findall(r"[a-z_]+", list_.replace(" and", ""))
            stem = re.match(r"snapd_[a-z]+", first)
            names = [first, *(f"{stem.group()}{other}" for other in others if stem)]
            wrong += [f"{page.name}: {name}" for name in names if name not in known and first not in modules]
    assert wrong == []


# --- events -------------------------------------------------------------------------------------------------------
NAMING_CALLS = {"LoopEvents", "__init__"}  # what is handed names of events, to log them later
LOG_CALLS = {"info", "warning", "error", "debug", "once", "log_once", "_log_once", "note"}
EVENT = re.compile(r"[a-z]+\.[a-z_]+")


def event_names() -> set[str]:
    """First or second text of every call that logs, in the daemon's code."""
    found: set[str] = set()
    for path in (ROOT / "snapd").rglob("*.py"):
        if "sim" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in LOG_CALLS | NAMING_CALLS:
                continue
            skipped = 1 if "once" in name else 0
            for argument in node.args[skipped : None if name in NAMING_CALLS else skipped + 1]:
                for text in ast.walk(argument):
                    if (
                        isinstance(text, ast.Constant)
                        and isinstance(text.value, str)
                        and EVENT.fullmatch(text.value)
                    ):
                        found.add(text.value)
    return found


def test_every_event_is_in_the_guide_and_no_other() -> None:
    text = section(text_of(DOCS / "metrics-and-log.md"), "The log")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", rows))
    events = event_names()
    assert len(events) > 70
    assert (sorted(events - named), sorted(named - events)) == ([], [])
