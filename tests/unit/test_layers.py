"""Imports go strictly downward, nobody but the client knows torch, and no module imports itself in a circle.

Works on the sources alone: nothing is imported. A package that the tables do not name fails the test, so that whoever
adds one says where it belongs.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The layer of each part of the daemon. A part may import itself and what lies in a lower layer, never its own layer.
LAYERS = {
    "snapd": 0,  # the package itself: the version
    "snapd.errors": 0,
    "snapd.settings": 1,
    "snapd.units": 0,
    "snapd.core": 1,
    "snapd.codec": 2,
    "snapd.coordination": 2,
    "snapd.export": 2,
    "snapd.memory": 2,
    "snapd.obs": 2,
    "snapd.peer": 2,
    "snapd.store": 2,
    "snapd.tier": 3,
    "snapd.runtime": 4,
    "snapd.sim": 4,
    "snapd.rpc": 5,
    "snapd.config_cluster": 5,
    "snapd.config_tiers": 5,
    "snapd.config": 6,
    "snapd.clustering": 7,
    "snapd.daemon": 8,
    "snapd.cli": 9,
    "snapd.__main__": 10,
}
# The core decides; it neither waits, nor asks the clock, nor draws lots, nor speaks to anybody.
CORE_STDLIB_BANNED = {
    "asyncio", "concurrent", "ctypes", "http", "io", "logging", "mmap", "multiprocessing", "os", "pathlib", "random",
    "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile", "threading",
    "time", "urllib", "uuid",
}  # fmt: skip
GRPC_HOMES = (
    "snapd.rpc",
    "snapd.peer.grpc_peer",
    "snapd.coordination.etcd_kv",
    "snapd.cli",
    "snapd_client.session",
)
CLIENT_MAY_IMPORT = {
    "google",
    "grpc",
    "numpy",
    "snapd_client",
    "snapd_native",
    "snapd_proto",
    "torch",
    "xxhash",
}


def modules() -> dict[str, Path]:
    """Every module of the daemon and of the client, by dotted name (packages by the package's name)."""
    result = {}
    for folder in (ROOT / "snapd", ROOT / "client" / "snapd_client"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


MODULES = modules()


def imported_names(module: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names of what the statements below `tree` import; `from a import b` gives a.b if that is a module."""
    is_package = MODULES[module].name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def part_of(name: str) -> str:
    """The entry of LAYERS that a module of the daemon belongs to."""
    return ".".join(name.split(".")[:2])


def is_below(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), filename=str(MODULES[module]))


DAEMON_MODULES = [name for name in MODULES if is_below(name, "snapd")]
CLIENT_MODULES = [name for name in MODULES if is_below(name, "snapd_client")]


def test_there_is_something_to_check() -> None:
    assert len(DAEMON_MODULES) > 20
    assert len(CLIENT_MODULES) > 10


@pytest.mark.parametrize("module", DAEMON_MODULES)
def test_the_daemon_imports_downward(module: str) -> None:
    own = part_of(module)
    assert own in LAYERS, f"{own} is in no layer: add it to LAYERS"
    for name in imported_names(module, parsed(module)):
        assert not is_below(name, "torch", "snapd_client"), f"{module} imports {name}"
        if not is_below(name, "snapd"):
            continue
        other = part_of(name)
        assert other in LAYERS, f"{module} imports {name}, which is in no layer"
        if other != own:
            assert LAYERS[other] < LAYERS[own], (
                f"{module} (layer {LAYERS[own]}) imports {name} ({LAYERS[other]})"
            )


@pytest.mark.parametrize("module", [name for name in DAEMON_MODULES if is_below(name, "snapd.core")])
def test_the_core_is_pure(module: str) -> None:
    for name in imported_names(module, parsed(module)):
        top = name.split(".")[0]
        if top != "snapd":
            assert top in sys.stdlib_module_names, f"{module} imports {name}"
            assert top not in CORE_STDLIB_BANNED, f"{module} imports {name}"


@pytest.mark.parametrize("module", CLIENT_MODULES)
def test_the_client_stays_on_its_side(module: str) -> None:
    for name in imported_names(module, parsed(module)):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        assert top in CLIENT_MAY_IMPORT or is_below(module, "snapd_client.integrations"), (
            f"{module} imports {name}"
        )


@pytest.mark.parametrize("module", [*DAEMON_MODULES, *CLIENT_MODULES])
def test_grpc_stays_at_home(module: str) -> None:
    if not is_below(module, *GRPC_HOMES):
        for name in imported_names(module, parsed(module)):
            is_service = name.endswith("_pb2_grpc")
            assert not is_below(name, "grpc", "grpc_health") and not is_service, f"{module} imports {name}"


def imported_at_load(module: str) -> set[str]:
    """Modules of ours that loading `module` loads: not those of functions or for type checkers only."""
    tree = parsed(module)
    kept = [node for node in tree.body if not _is_for_type_checkers(node)]
    top = ast.Module(body=[node for node in kept if not _is_definition(node)], type_ignores=[])
    return {name for name in imported_names(module, top) if name in MODULES and name != module}


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: imported_at_load(name) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
