"""Words that several texts for people share."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 8


def listed(items: Sequence[object], *, shown: int = SHOWN, separator: str = ", ") -> str:
    """The first of them one by one, of the others how many there are."""
    text = separator.join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"
