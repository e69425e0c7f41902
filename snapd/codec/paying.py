"""Does compressing pay? Pure bookkeeping of what was measured; the caller brings the seconds.

Encoders run beside the store's writes. While they keep up with what the store takes, fewer bytes mean less time; when
they do not, compressing makes the flush slower: a fast disk takes bytes raw sooner than they can be packed. `auto`
compresses only in the first case.
"""

from __future__ import annotations

from snapd.units import MIB

ENOUGH_BYTES = 32 * MIB  # measured, before a rate is believed
_FORGET = 0.5  # what is known counts half for each ENOUGH_BYTES that follow
_AHEAD = 1.25  # encoders must be this much faster: they share the processor with training and with the store


class Rate:
    """Bytes per second, the newest counting most."""

    def __init__(self) -> None:
        self._nbytes = 0.0
        self._seconds = 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        kept = _FORGET ** (nbytes / ENOUGH_BYTES)
        self._nbytes = self._nbytes * kept + nbytes
        self._seconds = self._seconds * kept + max(seconds, 0.0)

    @property
    def is_known(self) -> bool:
        return self._nbytes >= ENOUGH_BYTES / 2 and self._seconds > 0

    @property
    def bytes_per_s(self) -> float:
        return self._nbytes / self._seconds if self._seconds > 0 else 0.0


class Paying:
    """Whether `auto` should compress now. Used by one thread at a time.

    Args:
        encoders: how many encode at the same time.
    """

    def __init__(self, encoders: int = 1) -> None:
        self._encoders = encoders
        self._encoding, self._storing = Rate(), Rate()

    def note_encoded(self, raw_nbytes: int, seconds: float) -> None:
        """One encoder took `seconds` for chunks of `raw_nbytes` that it compressed."""
        self._encoding.note(raw_nbytes, seconds)

    def note_stored(self, stored_nbytes: int, seconds: float) -> None:
        """The store, its rate limit included, took `seconds` for `stored_nbytes`, in all uploads together."""
        self._storing.note(stored_nbytes, seconds)

    def decide(self) -> tuple[bool, str]:
        """(compress?, why), by what is known so far."""
        if not self._storing.is_known:
            return False, "how fast the store is, is not known yet"
        if not self._encoding.is_known:
            return True, "how fast compressing is, is not known yet"
        encoding, storing = self._encoding.bytes_per_s * self._encoders, self._storing.bytes_per_s
        text = f"compressing takes {encoding / 1e6:.0f} MB/s, the store {storing / 1e6:.0f} MB/s"
        return encoding >= _AHEAD * storing, text
