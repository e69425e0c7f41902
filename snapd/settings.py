"""One setting of a configuration section: its default and what is said of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(
    default: Any, kind: str, doc: str, *, low: float = 0, high: float = 0, choices: tuple[str, ...] = ()
) -> Any:
    """A field: `kind` is size, duration, count, port, text, choice or switch; `low` and `high` bound the numbers."""
    return field(
        default=default, metadata={"kind": kind, "doc": doc, "low": low, "high": high, "choices": choices}
    )
