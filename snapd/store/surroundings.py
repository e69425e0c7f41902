"""What stores are handed by whoever opens them: clocks, chance, names. And the checks that all of them share."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from snapd.errors import ConfigError
from snapd.store.base import Buffer, Requests

KEY_LENGTH_MAX = 220  # with a token before it, still the name of a file
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PREFIX = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?)?")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`chance`: even in [0, 1); `random_token`: 32 hexadecimal digits that nobody else draws."""

    monotonic_s: Callable[[], float]
    wall_s: Callable[[], float]
    chance: Callable[[], float]
    random_token: Callable[[], str]


def checked_key(key: str) -> str:
    """The key, if no store can mistake it: parts of letters, digits and `._-` that do not begin with a dot.

    Raises:
        ConfigError: kind `store`.
    """
    if not _KEY.fullmatch(key) or len(key) > KEY_LENGTH_MAX:
        raise ConfigError(f"{key[:300]!r} cannot be a key of a store", kind="store")
    return key


def checked_prefix(prefix: str) -> str:
    """Like `checked_key`; may be empty, or end with a slash."""
    if not _PREFIX.fullmatch(prefix) or len(prefix) > KEY_LENGTH_MAX:
        raise ConfigError(f"{prefix[:300]!r} cannot be the beginning of a key of a store", kind="store")
    return prefix


def view_of(buffer: Buffer) -> memoryview:
    """The buffer's bytes, not copied."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class Meter:
    """Counts requests, from any thread."""

    def __init__(self) -> None:
        self.requests = Requests()
        self._lock = threading.Lock()

    def add(
        self,
        kind: str = "",
        *,
        sent_nbytes: int = 0,
        received_nbytes: int = 0,
        retries: int = 0,
        count: int = 1,
    ) -> None:
        with self._lock:
            if kind:
                self.requests.count[kind] = self.requests.count.get(kind, 0) + count
            self.requests.sent_nbytes += sent_nbytes
            self.requests.received_nbytes += received_nbytes
            self.requests.retries += retries


class StoreClock:
    """A store's clock between its answers: what it said last, moved on by our monotonic clock."""

    ASK_AGAIN_S = 30.0

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._said: tuple[float, float] | None = None

    def heard(self, at_s: float) -> None:
        with self._lock:
            self._said = (at_s, self._monotonic_s())

    def now_s(self) -> float | None:
        """None: it has said nothing lately."""
        with self._lock:
            if self._said is None:
                return None
            at_s, heard_s = self._said
            past_s = self._monotonic_s() - heard_s
            return at_s + past_s if past_s <= self.ASK_AGAIN_S else None
