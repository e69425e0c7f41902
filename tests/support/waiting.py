"""Waiting for something that must come to be so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

TIMEOUT_S = 20.0

Value = TypeVar("Value")


def wait_for(
    is_so: Callable[[], Value],
    what: str = "it is so",
    timeout_s: float = TIMEOUT_S,
    *tails: Callable[[], str],
    every_s: float = 0.01,
) -> Value:
    """The first true value of `is_so()`. TimeoutError says what was waited for, with what the `tails` say then."""
    until = time.monotonic() + timeout_s
    while True:
        value = is_so()
        if value:
            return value
        if time.monotonic() > until:
            raise TimeoutError(
                "\n".join([f"not within {timeout_s:g} s: {what}", *(tail() for tail in tails)])
            )
        time.sleep(every_s)
