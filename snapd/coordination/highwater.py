"""Where a daemon keeps the farthest that it has seen of its cluster: one small file beside the arena."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from snapd.core.membership import Highwater, highwater_from_json, highwater_to_json
from snapd.errors import ConfigError, RemoteProtocolError, UnavailableError


class HighwaterStore(Protocol):
    """`save` is done when it returns: only then may what was seen be acted upon."""

    def load(self) -> Highwater: ...
    def save(self, seen: Highwater) -> None:
        """Raise UnavailableError (kind `highwater_write`)."""


class HighwaterFile:
    """A JSON file, replaced by rename. It lies on the arena's tmpfs and dies with what it guards: nothing is synced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Highwater:
        """Raises: ConfigError: kind `highwater`: it is there and cannot be read; it is never taken for absent."""
        try:
            return highwater_from_json(self._path.read_bytes())
        except FileNotFoundError:
            return Highwater()
        except (OSError, RemoteProtocolError) as error:
            raise ConfigError(
                f"what this daemon has seen of its cluster cannot be read: {self._path}: {error}",
                kind="highwater",
                hint="if the coordination store was never restored from a copy, the file may be removed",
            ) from error

    def save(self, seen: Highwater) -> None:
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(highwater_to_json(seen))
            os.replace(temporary, self._path)
        except OSError as error:
            raise UnavailableError(
                f"what was seen of the cluster cannot be noted: {error}", kind="highwater_write"
            ) from error


class MemoryHighwater:
    """Forgets with its process: for tests and the simulation."""

    def __init__(self, seen: Highwater | None = None) -> None:
        self._seen = seen or Highwater()

    def load(self) -> Highwater:
        return self._seen

    def save(self, seen: Highwater) -> None:
        self._seen = seen
