"""How ranks of a test end: all of them have left the last collective before the first one goes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist


def leave_together() -> NoReturn:
    """gloo's threads may abort a process that ends in good order while its peers do; and one that goes at once breaks
    the collective that others are still in. torchrun's agent keeps the store.
    """
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    store.set(f"left-{dist.get_rank()}", "yes")
    store.wait([f"left-{rank}" for rank in range(world)], timedelta(seconds=60))
    os._exit(0)
