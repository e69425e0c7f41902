"""What the user hands to `Snapshotter`, checked before anything is opened: one clear line for each mistake.

A text where a list of texts is meant is refused everywhere: its letters would count as the list (`"model.*"` has a
`*` among them, which as a pattern matches everything).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from .errors import ConfigError

STEP_MAX = 1 << 48
COPY_THREADS_MAX = 64
SLOTS_MAX = 8
WAIT_MAX_S = 86400.0


def whole_number(name: str, value: object, *, low: int, high: int) -> int:
    """`value` as an int: ints, and what stands for one (NumPy's, tensors of one integer), but no text and no float.

    Raises:
        ConfigError: names the argument, the value and the bounds.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # that is what is asked here
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        bounds = f"{low} or more" if high >= STEP_MAX else f"{low} to {high}"
        raise ConfigError(f"{name} must be a whole number, {bounds}", value=repr(value)[:80])
    return number


def checked_step(value: object) -> int:
    """Raises ConfigError: no step."""
    return whole_number("step", value, low=0, high=STEP_MAX)


def seconds(name: str, value: object) -> float:
    """Raises ConfigError: not a number of seconds from 0 to a day."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= WAIT_MAX_S:
        raise ConfigError(f"{name} must be seconds, 0 to {WAIT_MAX_S:.0f}", value=repr(value)[:80])
    return float(value)


def one_of(name: str, value: object, choices: Iterable[str]) -> str:
    """Raises ConfigError: none of the choices."""
    known = list(choices)
    if value not in known:
        raise ConfigError(f"no such {name}", hint=f"one of {', '.join(known)}", **{name: repr(value)[:80]})
    return str(value)


def texts(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Raises ConfigError: not a list of texts."""
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} must be a list of texts", hint=f'{name}=["..."]', value=repr(value)[:80])
    return tuple(value)
