"""What the user hands to the client: taken, or refused in one line that names argument and value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from snapd_client import arguments
from snapd_client.errors import ConfigError
from snapd_client.state.resharding import check_reshard


@pytest.mark.parametrize("value", [0, 7, np.int64(7), torch.tensor(7), 1 << 48])
def test_whole_numbers_are_steps(value: object) -> None:
    assert arguments.checked_step(value) == int(value)  # type: ignore[call-overload]
    assert type(arguments.checked_step(value)) is int


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lambda: arguments.checked_step("5"), r"step must be a whole number, 0 or more.* value='5'"),
        (lambda: arguments.checked_step(5.0), r"step must be .* value=5\.0"),
        (lambda: arguments.checked_step(-1), "value=-1"),
        (lambda: arguments.checked_step(None), "value=None"),
        (lambda: arguments.checked_step(True), "value=True"),
        (lambda: arguments.checked_step(1 << 60), "step must be"),
        (lambda: arguments.checked_step(torch.tensor(3.5)), "step must be"),
        (lambda: arguments.whole_number("slots", 9, low=0, high=8), "slots must be a whole number, 0 to 8.* value=9"),
        (lambda: arguments.seconds("wait_max_s", "2s"), "wait_max_s must be seconds.* value='2s'"),
        (lambda: arguments.seconds("wait_max_s", -1), "value=-1"),
        (lambda: arguments.seconds("wait_max_s", float("nan")), "value=nan"),
        (lambda: arguments.one_of("audit", "smapled", ["sampled", "full"]), "audit='smapled'; one of sampled, full"),
        (lambda: arguments.texts("allow_partial", "model.*"), r"allow_partial must be a list.* value='model\.\*'"),
        (lambda: arguments.texts("trust", [1]), "trust must be"),
        (lambda: check_reshard({"dta": "keep"}, ["data", "model"]), "'dta', and nothing .*; there are data, model"),
        (lambda: check_reshard({"data": 5}, ["data"]), r"reshard\['data'\] is 5"),
    ],
)  # fmt: skip
def test_what_is_meant_otherwise_is_one_clear_line(check: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        check()
    assert "\n" not in str(error.value) and "[config]" in str(error.value)


def test_reshard_takes_paths_below_a_name() -> None:
    check_reshard({"loaders.0": "keep"}, {"loaders": []})
