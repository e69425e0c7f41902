"""Stores for tests."""

from __future__ import annotations

import random
import secrets
import time
from pathlib import Path

from snapd.store.directory import DirectoryStore
from snapd.store.surroundings import Surroundings


def surroundings() -> Surroundings:
    return Surroundings(
        monotonic_s=time.monotonic,
        wall_s=time.time,
        chance=random.random,
        random_token=lambda: secrets.token_hex(16),
    )


def directory_store(root: Path, *, single_writer: bool = False) -> DirectoryStore:
    """A store in `root`, which is made."""
    root.mkdir(parents=True, exist_ok=True)
    return DirectoryStore(root, surroundings(), single_writer=single_writer)
