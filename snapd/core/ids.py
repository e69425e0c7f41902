"""Names and numbers that identify things. A job's name becomes a folder, so it is checked here, once, for
everybody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from snapd.errors import ConfigError

JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
INCARNATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
WORLD_SIZE_MAX = 1 << 16
STEP_MAX = 1 << 48  # steps and sequences are stored as signed 64-bit numbers, with room for arithmetic


class Place(NamedTuple):
    """A frame of one (job, rank): `frame` x chunk_bytes into segment `segment`."""

    segment: int
    frame: int


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """A snapshot of one job. The order is the order of age: newest = highest (generation, step)."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"{self.generation}/{self.step}"


@dataclass(frozen=True, slots=True)
class LaneKey:
    """Who holds granted frames: a lane of a session."""

    session_id: int
    lane: int


def checked_job_name(text: str) -> str:
    """Return `text` if it can name a job and a folder.

    Raises:
        ConfigError: kind `job_name`.
    """
    if JOB_NAME.fullmatch(text) is None:
        shown = text if len(text) <= 64 else text[:61] + "..."
        raise ConfigError(
            f"bad job name {shown!r}",
            kind="job_name",
            hint="use letters, digits, '.', '_' and '-', at most 128, beginning with a letter or a digit",
        )
    return text


def checked_incarnation(text: str) -> str:
    """Return `text` if it can name one start of a world.

    Raises:
        ConfigError: kind `incarnation`.
    """
    if INCARNATION.fullmatch(text) is None:
        raise ConfigError("bad incarnation id", kind="incarnation", hint="a nonce that rank 0 draws at start")
    return text


def check_world(
    rank: int, world_size: int, local_rank: int, local_world_size: int, *, is_clustered: bool
) -> None:
    """Check the numbers that torchrun sets.

    Raises: ConfigError: kinds `world`, and `no_coordination` when the world spans machines and there is only
        this one.
    """
    if not 1 <= world_size <= WORLD_SIZE_MAX:
        raise ConfigError("WORLD_SIZE out of range", kind="world", world_size=world_size, max=WORLD_SIZE_MAX)
    if not 0 <= rank < world_size:
        raise ConfigError("RANK out of range", kind="world", rank=rank, world_size=world_size)
    if not 1 <= local_world_size <= world_size or not 0 <= local_rank < local_world_size:
        raise ConfigError(
            "LOCAL_RANK or LOCAL_WORLD_SIZE out of range",
            kind="world",
            local_rank=local_rank,
            local_world_size=local_world_size,
            world_size=world_size,
        )
    if local_world_size < world_size and not is_clustered:
        raise ConfigError(
            f"the world has {world_size} ranks, {local_world_size} of them on this machine, and no"
            " coordination is configured",
            kind="no_coordination",
            hint="run all ranks on one machine, or configure coordination for several",
            rank=rank,
        )
