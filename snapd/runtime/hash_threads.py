"""The threads that hash, and on which cores they run.

With a core that no trainer needs, two hashing threads and a training thread are three for two cores: the scheduler sees
no move that would even that out, leaves both hashing threads on one core, and the second is worth nothing
(docs/adr/0008-hashing-apart.md). So each then keeps to cores of its own. Where trainers take every core, the threads go
where the scheduler puts them: what they take is taken from training, wherever it is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor


class _Place(threading.local):
    """Of one hashing thread; of any other thread nothing is known, and it is left alone."""

    number: int = -1
    count: int = 0
    allowed: frozenset[int] = frozenset()
    used: frozenset[int] = frozenset()


_place = _Place()


def hash_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads of the weight of any other that take no core from whom they wake beside."""
    numbers = itertools.count()
    return ThreadPoolExecutor(
        count, thread_name_prefix="snapd-hash", initializer=lambda: _begin(next(numbers), count)
    )


def share_of(number: int, count: int, cores: Collection[int]) -> frozenset[int]:
    """The cores of thread `number` of `count`: disjoint while there are as many as threads, else all."""
    return frozenset(sorted(cores)[number::count] if count <= len(cores) else cores)


def settle_down(trainers: int) -> None:
    """In a hashing thread, before it works: apart from the others while `trainers` leave a core free."""
    place = _place
    if place.number < 0:
        return
    is_apart = trainers < len(place.allowed)
    wanted = share_of(place.number, place.count, place.allowed) if is_apart else place.allowed
    if wanted != place.used:
        with contextlib.suppress(
            OSError
        ):  # cores were taken from the process meanwhile: it works, only slower
            os.sched_setaffinity(0, wanted)
        place.used = wanted


def _begin(number: int, count: int) -> None:
    _place.number, _place.count = number, count
    _place.allowed = _place.used = frozenset(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # waking takes no core from a training thread (docs/adr/0003)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
