"""The limit of open files is raised as far as it is of use, and a refusal ends nothing."""

from __future__ import annotations

import resource

import pytest

from snapd.memory.shortage import OPEN_FILES, raise_open_files

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "set_to"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 30), (OPEN_FILES, 1 << 30)),
        ((1024, INFINITE), (OPEN_FILES, INFINITE)),
        ((OPEN_FILES, 1 << 30), None),
        ((1 << 20, 1 << 20), None),
        ((INFINITE, INFINITE), None),
        ((256, 256), None),
    ],
)
def test_as_many_as_are_of_use(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], set_to: tuple[int, int] | None
) -> None:
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _which, wanted: done.append(wanted))
    raise_open_files()
    assert done == ([set_to] if set_to else [])


@pytest.mark.parametrize("error", [OSError(1, "no"), ValueError("not allowed to raise maximum limit")])
def test_a_refusal_ends_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_which: int, _wanted: tuple[int, int]) -> None:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (10, 100))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_open_files()
