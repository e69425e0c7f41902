"""Does compressing pay? Pure bookkeeping of what was measured; the caller brings the seconds.

Whole packs are compared, from their first chunk to their commit: how many raw bytes a second they came to with
compressing, and how many without. Whatever the store does meanwhile (buffers, parts in flight, fsync, a rate limit) is
in both. `auto` compresses while that is not slower, and looks at the other way again every now and then: stores change.
"""

from __future__ import annotations

from snapd.units import GIB, MIB

ENOUGH_BYTES = 16 * MIB  # measured, before a rate is believed
AGAIN_BYTES = 4 * GIB  # written in one way, before the other is tried again
_HALF_LIFE_BYTES = 256 * MIB  # what is known counts half for so many that follow
_AS_FAST = 0.95  # fewer bytes are worth so little time that it cannot be told from noise


class Rate:
    """Bytes per second, the newest counting most."""

    def __init__(self) -> None:
        self._nbytes = 0.0
        self._seconds = 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        kept = 0.5 ** (nbytes / _HALF_LIFE_BYTES)
        self._nbytes = self._nbytes * kept + nbytes
        self._seconds = self._seconds * kept + max(seconds, 0.0)

    @property
    def is_known(self) -> bool:
        return self._nbytes >= ENOUGH_BYTES and self._seconds > 0

    @property
    def bytes_per_s(self) -> float:
        return self._nbytes / self._seconds if self._seconds > 0 else 0.0


class Paying:
    """Whether `auto` should compress the next pack. Used by one thread at a time."""

    def __init__(self) -> None:
        self._rates = {True: Rate(), False: Rate()}  # by whether packs were compressed
        self._since = {True: 0, False: 0}  # raw bytes that were written the other way since

    def note(self, raw_nbytes: int, seconds: float, *, is_compressed: bool) -> None:
        """A pack of `raw_nbytes` took one of the packers so long, from its first byte to its commit."""
        self._rates[is_compressed].note(raw_nbytes, seconds)
        self._since[is_compressed] = 0
        other = not is_compressed
        self._since[other] += raw_nbytes
        if self._since[other] > AGAIN_BYTES:
            self._rates[other], self._since[other] = Rate(), 0

    def decide(self) -> tuple[bool, str]:
        """(compress?, why), by what is known so far."""
        compressed, raw = self._rates[True], self._rates[False]
        if not raw.is_known:
            return False, "how fast the store is, is not known yet"
        if not compressed.is_known:
            return True, "how fast compressing is, is not known yet"
        text = (
            f"a packer gets {compressed.bytes_per_s / 1e6:.0f} MB/s away compressed,"
            f" {raw.bytes_per_s / 1e6:.0f} MB/s raw"
        )
        return compressed.bytes_per_s >= _AS_FAST * raw.bytes_per_s, text
