"""Sizes and durations: parsing what people write, printing what people read. Bytes are integers everywhere
else.
"""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtKMGT]?)(i?)[bB]?\s*$")
_SCALE = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|)\s*$")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Return the bytes that `text` names: "512", "64MiB", "1.5 GB", "4G" (a bare letter is binary).

    Raises:
        ValueError: `text` is not a size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"not a size: {text!r} (write for example 512MiB, 64GiB or 1.5GB)")
    number, letter, binary = match.groups()
    is_decimal = not binary and text.strip().lower().endswith("b") and letter != ""
    base = 1000 if is_decimal else 1024
    return int(float(number) * base ** _SCALE[letter.lower()])


def parse_duration_s(text: str) -> float:
    """Return the seconds that `text` names: "250ms", "1.5s", "10m", "2h", "1d", "3".

    Raises:
        ValueError: `text` is not a duration.
    """
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"not a duration: {text!r} (write for example 250ms, 30s, 10m, 2h or 1d)")
    number, unit = match.groups()
    return float(number) * _SECONDS[unit]


def format_size(nbytes: int) -> str:
    """Print `nbytes` with three digits or so and a binary unit: "0 B", "64 MiB", "1.46 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB" if value < 1000 else f"{value:.0f} TiB"
