"""Names of classes in snapshots, and which of them may be made anew from a name.

A name is "module:qualified.name". It is looked up among the modules that the trainer has imported already;
nothing is imported because a snapshot says so, and no constructor runs: instances come from `cls.__new__` or
the base type's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

_ALWAYS = frozenset(
    {
        "torch",
        "numpy",
        "torchdata",
        "torchao",
        "collections",
        "enum",
        "random",
        "datetime",
        "fractions",
        "decimal",
    }
)


def type_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def package_of(cls: type) -> str:
    """The top-level package that a class comes from."""
    return str(cls.__module__).partition(".")[0]


def find_class(name: str) -> type | None:
    """The class of that name, if its module has been imported; None otherwise."""
    module_name, _, qualified = name.partition(":")
    found: object = sys.modules.get(module_name)
    for part in qualified.split("."):
        if found is None or not part:
            return None
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


class Vouched:
    """Packages whose classes may be rebuilt: torch, numpy, the optimizers' own, and what the user names."""

    def __init__(self, packages: Iterable[str] = ()) -> None:
        self._packages = set(packages) | _ALWAYS

    def add(self, *packages: str) -> None:
        self._packages.update(packages)

    def allows(self, cls: type) -> bool:
        module = str(cls.__module__)
        return package_of(cls) in self._packages or any(
            module == package or module.startswith(package + ".") for package in self._packages
        )
