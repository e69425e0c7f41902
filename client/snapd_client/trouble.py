"""What becomes of failures: nothing of ours is raised into a training loop unless it asked for that.

A failure is logged once per kind, counted in `health()`, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from .errors import SnapdError
from .health import Health

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Trouble:
    """The failures of one Snapshotter. Used by the training and the control thread."""

    def __init__(self, health: Health, *, is_strict: bool) -> None:
        self._health, self._is_strict = health, is_strict
        self._told: set[str] = set()

    def guard(self, what: str, action: Callable[[], _T]) -> _T | None:
        """Do it; None if it failed. Nothing of ours is raised into the loop unless `strict`."""
        try:
            return action()
        except Exception as error:
            self._health.failures += 1
            self._health.last_error = f"{what}: {error}"
            if self._is_strict:
                raise
            self.warn_once(f"{what}:{type(error).__name__}", f"{what} failed, training goes on: {error}")
            return None

    def lose(self, error: SnapdError) -> None:
        """The daemon is there again and does not know the session."""
        self._health.failures += 1
        self._health.last_error = str(error)
        self.warn_once("lost", f"the daemon does not know this session any more, nothing is saved: {error}")

    def warn_once(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _log.warning("snapd: %s", text)
