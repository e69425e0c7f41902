"""All size arithmetic: state -> chunks -> frames -> segments. Bytes are whole numbers; nothing here knows
addresses.
"""

from __future__ import annotations

from snapd.errors import ConfigError
from snapd.units import KIB, MIB

CHUNK_BYTES_MIN = 64 * KIB
CHUNK_BYTES_MAX = 64 * MIB
CHUNKS_PER_SHARD_AIM = 256
ENTRY_CAPACITY_MIN = 4096
ENTRY_CAPACITY_UNKNOWN = 16384
ENTRY_CAPACITY_MAX = 1 << 22
LANES_MAX = 8
SLOTS_MIN = 2


def is_chunk_size(nbytes: int) -> bool:
    """True for a power of two within the bounds."""
    return CHUNK_BYTES_MIN <= nbytes <= CHUNK_BYTES_MAX and nbytes & (nbytes - 1) == 0


def choose_chunk_bytes(state_bytes: int, *, requested: int, kept: int, default: int) -> tuple[int, str]:
    """Choose the one chunk size of a job, and say why.

    What the job has wins (its snapshots are cut that way), then what was asked for, then the largest size up
    to `default` that cuts the state into at least 256: every range of a shard begins on a chunk of its own,
    so half a chunk per range is lost, and two slots are to stay under 2.05 times the state.

    Raises:
        ConfigError: kind `chunk_bytes`: `requested` is no power of two between 64 KiB and 64 MiB.
    """
    if requested and not is_chunk_size(requested):
        raise ConfigError(
            "chunk_bytes must be a power of two between 64 KiB and 64 MiB",
            kind="chunk_bytes",
            chunk_bytes=requested,
        )
    if kept:
        return kept, "the job's snapshots have it"
    if requested:
        return requested, "asked for"
    if state_bytes <= 0:
        return min(default, MIB), "the state's size is not known yet"
    size = default
    while size > CHUNK_BYTES_MIN and state_bytes // size < CHUNKS_PER_SHARD_AIM:
        size //= 2
    return (
        size,
        f"at least {CHUNKS_PER_SHARD_AIM} chunks of {state_bytes} bytes" if size < default else "the default",
    )


def frames_for(nbytes: int, chunk_bytes: int) -> int:
    """Frames that hold `nbytes`; 0 for 0."""
    return -(-nbytes // chunk_bytes)


def entry_capacity_for(state_bytes: int, chunk_bytes: int) -> int:
    """Entries per lane of a control page: room for four times the estimate, since a page never grows."""
    if state_bytes <= 0:
        return ENTRY_CAPACITY_UNKNOWN
    wanted = 4 * frames_for(state_bytes, chunk_bytes) + 1024
    return max(ENTRY_CAPACITY_MIN, min(ENTRY_CAPACITY_MAX, wanted))


def missing_frames(*, wanted_per_slot: int, slots: int, usable: int) -> int:
    """Frames to back so that `slots` shards of `wanted_per_slot` fit into what is usable now."""
    return max(0, wanted_per_slot * slots - usable)
