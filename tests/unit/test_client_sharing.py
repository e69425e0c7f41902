"""Which captures are full, and which leave bytes to other ranks."""

from __future__ import annotations

import pytest
from snapd_client.sharing import is_shared_out
from snapd_native import REPLICAS_DIFFER

PERIOD = 32


@pytest.mark.parametrize(
    ("step", "word", "first", "last", "expected"),
    [
        (1, 0, None, None, False),  # the first capture
        (3, 0, 1, 2, False),  # not compared yet
        (3, 2, 1, 2, True),
        (31, 2, 1, 2, True),
        (32, 2, 1, 2, False),  # time to look again
        (33, 2, 1, 32, True),
        (40, 2, 1, 3, False),  # the step at which it was time was skipped here
        (3, REPLICAS_DIFFER, 1, 2, False),
        (
            12,
            10,
            10,
            11,
            False,
        ),  # the structure is another one since step 10; 9 is the last that was compared
        (12, 11, 10, 11, True),
        (5, 7, None, None, False),  # a new structure
    ],
)
def test_which_captures_are_shared_out(
    step: int, word: int, first: int | None, last: int | None, expected: bool
) -> None:
    found = is_shared_out(step, equal_step_plus_one=word, first_full=first, last_full=last, period=PERIOD)
    assert found is expected


@pytest.mark.parametrize("interval", [1, 7])
def test_ranks_that_skipped_other_steps_take_full_captures_at_the_same_step_again(interval: int) -> None:
    period = interval * PERIOD
    full: list[set[int]] = []
    for skipped in ({5, 6}, {period, 40 * interval}):
        first = last = None
        taken = set()
        for step in range(interval, 5 * period, interval):
            if step in skipped:
                continue
            if not is_shared_out(
                step, equal_step_plus_one=2**40, first_full=first, last_full=last, period=period
            ):
                first, last = first or step, step
                taken.add(step)
        full.append(taken)
    common = full[0] & full[1]
    assert {2 * period, 3 * period, 4 * period} <= common
    assert all(len(taken) <= 7 for taken in full)
