"""Who this process is: rank and world as torchrun sets them, and the job's name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class World:
    """Names as torchrun sets them; one process without torchrun is a world of one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> World:
        """
        Raises:
            ConfigError: a variable is not a number, or rank and size contradict each other.
        """
        size = _number(environment, "WORLD_SIZE", 1)
        world = World(
            rank=_number(environment, "RANK", 0),
            world_size=size,
            local_rank=_number(environment, "LOCAL_RANK", 0),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE", size),
            node_rank=_number(environment, "GROUP_RANK", 0),
        )
        if not (
            0 <= world.rank < world.world_size
            and 0 <= world.local_rank < world.local_world_size <= world.world_size
        ):
            raise ConfigError(
                "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE contradict each other",
                hint="start with torchrun, or set all four",
                rank=world.rank,
                world_size=world.world_size,
                local_rank=world.local_rank,
                local_world_size=world.local_world_size,
            )
        return world


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is not a number", value=repr(text)) from None


def job_name(job: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The job's name: the argument, else `SNAPD_JOB`.

    Raises:
        ConfigError: there is none, or it could not be a folder's name.
    """
    name = job or environment.get("SNAPD_JOB", "")
    if not name:
        raise ConfigError(
            "the job has no name", hint="pass job=... or set SNAPD_JOB; torchrun's run id is not unique"
        )
    if not isinstance(name, str) or not JOB_NAME.fullmatch(name):
        raise ConfigError(
            "the job's name may hold letters, digits, '.', '_' and '-', 128 at most, and begins with a letter or digit",
            job=repr(name)[:160],
        )
    return name
