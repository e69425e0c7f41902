"""One incarnation of the world: what all ranks of one start have in common and no earlier start has.

Each rank draws a nonce and puts it into the default process group's store (a store, not a collective); rank 0
answers with an incarnation id and the list of nonces. A rank accepts only a list that contains its own, so what an
earlier start left in a store that outlived it is never taken for an answer.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import Protocol

import torch

from .errors import ConfigError, UnavailableError

ANSWER_AGAIN_S = 1.0


class KeyValueStore(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


def default_store() -> KeyValueStore | None:
    """The store of the default process group; None if there is no group."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    store: KeyValueStore = distributed.distributed_c10d._get_default_store()
    return store


def agree_incarnation(
    store: KeyValueStore | None, *, job: str, rank: int, world_size: int, turn: int, timeout_s: float = 120.0
) -> str:
    """The incarnation id, the same on all ranks of this start of the world.

    Args:
        turn: how many Snapshotters this process has made for the job before this one.
    Raises:
        ConfigError: several ranks and no process group.
        UnavailableError: a rank did not come; names it.
    """
    nonce = secrets.token_hex(8)
    if world_size == 1:
        return nonce
    if store is None:
        raise ConfigError(
            "several ranks need a process group to agree on a generation",
            hint="call torch.distributed.init_process_group before Snapshotter",
            world_size=world_size,
        )
    prefix = f"snapd/{job}/{turn}"
    deadline = time.monotonic() + timeout_s
    store.set(f"{prefix}/nonce/{rank}", nonce)
    if rank == 0:
        return _answer(store, prefix, world_size, deadline)
    return _accept(store, prefix, rank, nonce, deadline)


def _answer(store: KeyValueStore, prefix: str, world_size: int, deadline: float) -> str:
    """Rank 0: answer, and answer again while a nonce that was read is one of an earlier start."""
    incarnation = secrets.token_hex(16)
    others = range(1, world_size)
    while True:
        nonces = [_get(store, f"{prefix}/nonce/{rank}", deadline) for rank in range(world_size)]
        store.set(f"{prefix}/answer", json.dumps({"incarnation": incarnation, "nonces": nonces}))
        try:
            store.wait(
                [f"{prefix}/accepted/{incarnation}/{rank}" for rank in others],
                timedelta(seconds=ANSWER_AGAIN_S),
            )
            return incarnation
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "a rank did not accept the generation's answer", nonces=len(nonces)
                ) from error


def _accept(store: KeyValueStore, prefix: str, rank: int, nonce: str, deadline: float) -> str:
    while True:
        answer = json.loads(_get(store, f"{prefix}/answer", deadline))
        nonces = answer["nonces"]
        if rank < len(nonces) and nonces[rank] == nonce:
            incarnation = str(answer["incarnation"])
            store.set(f"{prefix}/accepted/{incarnation}/{rank}", "1")
            return incarnation
        if time.monotonic() > deadline:
            raise UnavailableError("rank 0 gave no answer for this start of the job", rank=rank)
        time.sleep(0.01)  # the answer of an earlier start: rank 0 has not overwritten it yet


def _get(store: KeyValueStore, key: str, deadline: float) -> str:
    remaining_s = max(0.1, deadline - time.monotonic())
    try:
        store.wait([key], timedelta(seconds=remaining_s))
    except RuntimeError as error:  # torch.distributed.DistStoreError is one
        raise UnavailableError(
            "a rank did not come to agree on a generation",
            hint="every rank makes its Snapshotters in the same order; is one hanging, or dead?",
            rank=key.rpartition("/")[2] if "/nonce/" in key else 0,
            key=key,
        ) from error
    return store.get(key).decode()
