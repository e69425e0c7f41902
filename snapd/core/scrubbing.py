"""What on a node's own disk is read and verified again, when, and how fast. Pure.

Bytes that nobody reads rot unseen: a chunk that snapshots share is written once, and named by every later one for
weeks. So all that is kept is read again, object by object, and first what was not read for the longest time. What is
deleted before its time has come is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from snapd.core.stored import StoredChunk
from snapd.units import MIB

RATE_MIN = 1.0 * MIB  # bytes a second; a small disk is through sooner, and no disk feels it
SHARE = 0.5  # of the period: a pass takes so much of it at most, and as much lies between two
BATCH_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True)
class ScrubRules:
    """`period_s`: every byte that is kept is read so often; 0: never. `rate_max`: bytes a second at most, whatever
    becomes of the period.
    """

    period_s: float
    rate_max: float


@dataclass(frozen=True, slots=True)
class ScrubChoice:
    """`key`: the object to read now; None: none is due before `wait_s` have passed."""

    key: str | None
    wait_s: float = 0.0


def scrub_rate(nbytes: int, rules: ScrubRules) -> float:
    """Bytes a second with which `nbytes`, all that is kept, are read in time."""
    return min(rules.rate_max, max(RATE_MIN, nbytes / (SHARE * rules.period_s)))


def choose_scrub(
    read_s: Mapping[str, float | None], now_s: float, rules: ScrubRules, salt: str
) -> ScrubChoice:
    """`read_s`: when each object was read or written last; None: not in this life of the daemon. These come first, in
    an order that `salt` makes another one in each life: a daemon that never lives long gets to all of them, too.
    """
    if not read_s or not rules.period_s:
        return ScrubChoice(None, SHARE * rules.period_s)
    unread = [key for key, at_s in read_s.items() if at_s is None]
    if unread:
        return ScrubChoice(min(unread, key=lambda key: hashlib.blake2b(f"{salt} {key}".encode()).digest()))
    oldest_s, oldest = min((at_s, key) for key, at_s in read_s.items() if at_s is not None)
    wait_s = oldest_s + SHARE * rules.period_s - now_s
    return ScrubChoice(oldest) if wait_s <= 0 else ScrubChoice(None, wait_s)


def batches(chunks: Collection[StoredChunk]) -> list[list[StoredChunk]]:
    """What is read at once: at most `BATCH_BYTES`, or one chunk; each place once, in the order in which they lie."""
    found: list[list[StoredChunk]] = []
    nbytes = 0
    for chunk in sorted({c.spot: c for c in chunks}.values(), key=lambda c: c.spot):
        if not found or nbytes + chunk.stored_nbytes > BATCH_BYTES:
            found.append([])
            nbytes = 0
        found[-1].append(chunk)
        nbytes += chunk.stored_nbytes
    return found
