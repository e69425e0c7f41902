"""Habits that a reader would otherwise have to police: what is banned where, and how long things may grow.

Each ban has homes: the places that are there for just that. A home that no longer needs its exception fails too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500

PRODUCT = ("snapd", "client")
ALL_CODE = (*PRODUCT, "bench", "demo", "scripts", "tests")

# Who may read the clock, draw lots or look at the environment. Everybody else is handed what he needs.
CLOCK_HOMES = {
    "snapd/sim/tiers.py": "a command that says how long it took",
    "snapd/daemon.py": "hands the clocks to everybody else",
    "snapd/cli/": "talks to a person",
    "client/snapd_client/": "lives in a trainer; deadlines and figures of its own",
}
CLOCK_BANNED_IN_HOMES = ("client/snapd_client/state/",)
CLOCK_EXCEPTIONS = {"client/snapd_client/state/tree.py": "the moment of a capture, for display only"}
RANDOM_HOMES = {
    "client/snapd_client/state/": "captures and restores the generators of the trainer",
    "snapd/clustering.py": "hands chance down to the parts, as daemon.py does the clock",
    "snapd/sim/": "the simulation draws everything from its seed",
    "snapd/cli/plan.py": "draws for its Monte Carlo, from the user's seed",
}
SERIALISER_HOMES = {
    "client/snapd_client/export.py": "torch.save of tensors and plain values, which weights_only loads",
}
ENVIRON_HOMES = {
    "snapd/config.py": "reads the settings",
    "snapd/cli/": "talks to a person",
    "client/snapd_client/world.py": "reads what torchrun set",
    "client/snapd_client/locate.py": "finds or starts the daemon",
    "client/snapd_client/faults.py": "arms the fault points of tests",
    "client/snapd_client/gpu_check.py": "a command",
}
BROAD_EXCEPT_HOMES = {
    "client/snapd_client/trouble.py": "training is never killed by us",
    "client/snapd_client/gpu_check.py": "a command that reports each check's failure",
    "client/snapd_client/restore.py": "the other ranks are told before the error goes on",
}
ROOT_LOGGER_HOMES = {"snapd/obs/log.py": "sets logging up for the daemon"}
SERIALISERS = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}


def files(*folders: str, suffix: str = ".py") -> list[str]:
    """Paths below the folders, relative to the repository; a folder that does not exist has none."""
    found = (path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=path)


def is_home(path: str, homes: object) -> bool:
    assert isinstance(homes, dict | tuple)
    return any(path == home or (home.endswith("/") and path.startswith(home)) for home in homes)


def uses_of(module: str, path: str) -> Iterator[int]:
    """Lines that import `module`, or something from it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == module for alias in node.names):
            yield node.lineno
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == module
        ):
            yield node.lineno


def attributes(path: str, owner: str, names: set[str]) -> Iterator[int]:
    """Lines that say `owner.name` for one of the names."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == owner and node.attr in names:
                yield node.lineno


def clock_uses(path: str) -> Iterator[int]:
    yield from uses_of("time", path)


def environ_uses(path: str) -> Iterator[int]:
    yield from attributes(path, "os", {"environ", "environb", "getenv", "putenv"})


def broad_excepts(path: str) -> Iterator[int]:
    """Handlers for Exception that do not end by raising."""
    for node in ast.walk(tree(path)):
        if (
            isinstance(node, ast.ExceptHandler)
            and isinstance(node.type, ast.Name)
            and node.type.id == "Exception"
        ):
            if not isinstance(node.body[-1], ast.Raise):
                yield node.lineno


def bare_excepts(path: str) -> Iterator[int]:
    """Handlers that also catch what ends a process, and do not end by raising."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
            if node.type is None or "BaseException" in ast.unparse(node.type):
                yield node.lineno


def serialiser_uses(path: str) -> Iterator[int]:
    for module in SERIALISERS:
        yield from uses_of(module, path)
    yield from attributes(path, "torch", {"load", "save"})


def finalisers(path: str) -> Iterator[int]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.name == "__del__":
            yield node.lineno


def root_logger_uses(path: str) -> Iterator[int]:
    speaking = {"basicConfig", "critical", "debug", "error", "exception", "info", "log", "warning"}
    yield from attributes(path, "logging", speaking)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger" and not node.args:
            yield node.lineno


def daemon_habits(path: str) -> Iterator[int]:
    """atexit and daemon threads: in the daemon everything is ended by whoever began it."""
    yield from uses_of("atexit", path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "daemon" and ast.unparse(node.value) == "True":
            yield node.lineno


def offences(paths: list[str], find: Callable[[str], Iterator[int]], homes: dict[str, str]) -> list[str]:
    return [f"{path}:{line}" for path in paths if not is_home(path, homes) for line in find(path)]


def test_there_is_something_to_check() -> None:
    assert len(files(*PRODUCT)) > 40


SPECIMENS: list[tuple[Callable[[str], Iterator[int]], str]] = [
    (bare_excepts, "try: f()\nexcept: pass"),
    (bare_excepts, "try: f()\nexcept (OSError, BaseException): pass"),
    (broad_excepts, "try: f()\nexcept Exception as e: log(e)"),
    (clock_uses, "from time import monotonic"),
    (daemon_habits, "import atexit"),
    (daemon_habits, "Thread(target=f, daemon=True)"),
    (environ_uses, "x = os.getenv('A')"),
    (finalisers, "class A:\n    def __del__(self): pass"),
    (root_logger_uses, "logging.getLogger().info('x')"),
    (root_logger_uses, "logging.warning('x')"),
    (serialiser_uses, "import pickle as p"),
    (serialiser_uses, "from dill import loads"),
    (serialiser_uses, "x = torch.load(f)"),
]


@pytest.mark.parametrize(("find", "source"), SPECIMENS)
def test_each_finder_finds(find: Callable[[str], Iterator[int]], source: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert list(find(str(tmp_path / "bad.py"))) != []


@pytest.mark.parametrize("find", dict.fromkeys(find for find, _ in SPECIMENS))
def test_no_finder_finds_too_much(find: Callable[[str], Iterator[int]], tmp_path: Path) -> None:
    source = (
        "import os\ntry: f(os.path)\nexcept OSError: pass\nexcept Exception: raise\nlog = getLogger(__name__)"
    )
    (tmp_path / "good.py").write_text(source)
    assert list(find(str(tmp_path / "good.py"))) == []


def test_nothing_is_pickled() -> None:
    assert offences(files(*PRODUCT), serialiser_uses, SERIALISER_HOMES) == []


def test_no_finalisers() -> None:
    assert offences(files(*ALL_CODE), finalisers, {}) == []


def test_exceptions_are_caught_by_name() -> None:
    assert offences(files(*PRODUCT), bare_excepts, {}) == []
    assert offences(files(*PRODUCT), broad_excepts, BROAD_EXCEPT_HOMES) == []


def test_the_root_logger_is_left_alone() -> None:
    assert offences(files(*PRODUCT), root_logger_uses, ROOT_LOGGER_HOMES) == []


def test_the_clock_is_passed_in() -> None:
    paths = files(*PRODUCT)
    strict = [path for path in paths if is_home(path, CLOCK_BANNED_IN_HOMES)]
    assert offences(strict, clock_uses, CLOCK_EXCEPTIONS) == []
    assert offences(paths, clock_uses, CLOCK_HOMES) == []


def test_randomness_is_passed_in() -> None:
    assert offences(files(*PRODUCT), lambda path: uses_of("random", path), RANDOM_HOMES) == []


def test_the_environment_is_read_at_the_edge() -> None:
    assert offences(files(*PRODUCT), environ_uses, ENVIRON_HOMES) == []


def test_the_daemon_ends_what_it_begins() -> None:
    assert offences(files("snapd"), daemon_habits, {}) == []


def test_unit_tests_do_not_sleep() -> None:
    def sleeps(path: str) -> Iterator[int]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "sleep":
                if not (node.args and ast.unparse(node.args[0]) == "0"):
                    yield node.lineno

    assert offences(files("tests/unit", "tests/property"), sleeps, {}) == []


@pytest.mark.parametrize(
    ("homes", "find"),
    [
        (BROAD_EXCEPT_HOMES, broad_excepts),
        (ENVIRON_HOMES, environ_uses),
        (ROOT_LOGGER_HOMES, root_logger_uses),
        (RANDOM_HOMES, lambda path: uses_of("random", path)),
        (CLOCK_HOMES | CLOCK_EXCEPTIONS, clock_uses),
        (SERIALISER_HOMES, serialiser_uses),
    ],
    ids=["broad except", "environment", "root logger", "random", "clock", "serialiser"],
)
def test_every_home_is_used(homes: dict[str, str], find: Callable[[str], Iterator[int]]) -> None:
    for home in homes:
        inhabitants = [path for path in files(*PRODUCT) if is_home(path, {home: ""})]
        assert any(list(find(path)) for path in inhabitants), f"{home} needs no exception any more"


def test_functions_stay_short() -> None:
    too_long = []
    for path in files(*ALL_CODE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES_MAX:
                    too_long.append(f"{path}:{node.lineno} {node.name} has {count} lines")
    assert too_long == []


def test_files_stay_short() -> None:
    paths = [*files(*ALL_CODE), *files("csrc", suffix=".cpp"), *files("csrc", suffix=".hpp")]
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in paths}
    assert {path: count for path, count in lengths.items() if count > FILE_LINES_MAX} == {}
