"""One setting of a configuration section: its default, what is said of it, and how a value given for it is read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import field
from typing import Any

from snapd.units import format_size, parse_duration_s, parse_size

ALIKE_MIN = 0.7  # of difflib's ratio: "tier.shard" is meant to be "tier.shared", "tier.disk" is nobody's
WORD_ALIKE_MIN = 0.6  # of short words, as the choices of a setting are


def setting(
    default: Any, kind: str, doc: str, *, low: float = 0, high: float = 0, choices: tuple[str, ...] = ()
) -> Any:
    """A field: `kind` is size, duration, count, port, text, choice or switch; `low` and `high` bound the numbers."""
    return field(
        default=default, metadata={"kind": kind, "doc": doc, "low": low, "high": high, "choices": choices}
    )


def checked_value(described: dataclasses.Field[Any], raw: Any) -> Any:
    """The value that a file, a variable or a flag gives to a setting.

    Raises:
        ValueError: says what it must be.
    """
    kind, low, high = (described.metadata[name] for name in ("kind", "low", "high"))
    if kind == "switch":
        return _switch(raw)
    if kind in ("text", "choice"):
        if not isinstance(raw, str):
            raise ValueError("must be text")
        if kind == "choice" and raw not in described.metadata["choices"]:
            choices = described.metadata["choices"]
            raise ValueError(
                f"must be one of {', '.join(choices)}{did_you_mean(raw, choices, alike_min=WORD_ALIKE_MIN)}"
            )
        return raw
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError("must be a number")
    value = _number(kind, raw)
    if not low <= value <= high:
        raise ValueError(f"must be {shown(kind, low)} to {shown(kind, high)}")
    return value


def _number(kind: str, raw: int | float | str) -> int | float:
    if kind == "duration":
        return parse_duration_s(str(raw))
    if kind == "size":
        return 0 if raw == "auto" else parse_size(str(raw))
    try:
        return int(str(raw))
    except ValueError:
        raise ValueError("must be a whole number") from None


def _switch(raw: Any) -> str:
    text = str(raw).lower()
    if text in ("yes", "true", "1", "on"):
        return "yes"
    if text in ("no", "false", "0", "off", ""):
        return "no"
    raise ValueError("must be yes or no")


def shown(kind: str, value: Any) -> str:
    """A value as people read it."""
    if kind == "size":
        return format_size(int(value))
    return f"{value:g} s" if kind == "duration" else str(value)


def did_you_mean(name: str, known: Iterable[str], *, alike_min: float = ALIKE_MIN) -> str:
    """`; did you mean X?` for the known name that is most like this one; empty if none is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=alike_min)
    return f"; did you mean {found[0]}?" if found else ""
