"""Asking nodes what they hold of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from snapd.core.recovery import Inventory
from snapd.errors import SnapdError


async def gather_inventories(
    nodes: Iterable[str], ask: Callable[[str], Awaitable[Inventory]]
) -> tuple[list[Inventory], list[str]]:
    """All at once; (what they hold, in the order of the nodes' names; who did not say)."""
    names = sorted(nodes)
    answers = await asyncio.gather(*(ask(name) for name in names), return_exceptions=True)
    inventories: list[Inventory] = []
    silent: list[str] = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Inventory):
            inventories.append(answer)
        elif isinstance(answer, SnapdError):
            silent.append(name)
        else:
            raise answer
    return inventories, silent
