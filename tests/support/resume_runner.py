"""A trainer process that is killed, and the one that goes on: `resume_runner.py before|after FOLDER [NAME
...]`.

`before` trains each scenario to its end once, undisturbed, and writes down the result; then again with a
Snapshotter up to the cut, and kills itself with SIGKILL right after the last `snap.step`. `after` restores
each, goes on, and compares. Under torchrun the scenarios are distributed ones (`distributed_scenarios`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from snapd_client import Snapshotter

from tests.support.scenarios import (
    OPTIONS,
    SCENARIOS,
    STEPS_AFTER,
    STEPS_BEFORE,
    STEPS_BEFORE_DEFAULT,
    Loading,
    Run,
    Scenario,
)


def digests(run: Run) -> dict[str, str]:
    found = run.fingerprint()
    return {name: hashlib.sha1(repr(value).encode()).hexdigest() for name, value in found.items()}


def cut(name: str) -> int:
    return STEPS_BEFORE.get(name, STEPS_BEFORE_DEFAULT)


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.rank{os.environ.get('RANK', '0')}.json"


def end(run: Run) -> None:
    """Let go of a loader's workers: what is left to the garbage collector waits 5 s for each of them."""
    if isinstance(run, Loading):
        run.end()


def before(folder: Path, scenarios: dict[str, Scenario]) -> None:
    for name, scenario in scenarios.items():
        run = scenario(1)
        for number in range(cut(name) + STEPS_AFTER):
            run.step(number)
        result_path(folder, name).write_text(json.dumps(digests(run)))
        end(run)
    keep = []
    for name, scenario in scenarios.items():
        run = scenario(1)
        snap = Snapshotter(run.state(), job=name, strict=True, **OPTIONS.get(name, {}))
        assert snap.restore() == 0
        for number in range(cut(name)):
            run.step(number)
            snap.step(number + 1)
        if torch.distributed.is_initialized():
            snap.wait("captured")  # the other rank must have come as far
        keep.append((run, snap))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    last = keep[-1][1].health()
    print(json.dumps({"committed": last["committed"], "handed_over": cut(list(scenarios)[-1])}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def after(folder: Path, scenarios: dict[str, Scenario]) -> int:
    failures: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        try:
            failures[name] = _resume(folder, name, scenario)
        except Exception as error:  # each scenario is a test of its own: the next one still runs
            logging.exception("%s", name)
            failures[name] = f"{type(error).__name__}: {error}"
    failures = {name: what for name, what in failures.items() if what}
    (folder / f"failures.rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(failures))
    return 1 if failures else 0


def _resume(folder: Path, name: str, scenario: Scenario) -> str:
    expected = json.loads(result_path(folder, name).read_text())
    run = scenario(2)
    snap = Snapshotter(run.state(), job=name, strict=True, **OPTIONS.get(name, {}))
    start = snap.restore()
    # killed right after the last hand-over: that one may be lost, the one before may not
    if not cut(name) - 1 <= start <= cut(name):
        return f"resumed at step {start}, {cut(name)} was handed over"
    for number in range(start, cut(name) + STEPS_AFTER):
        run.step(number)
        snap.step(number + 1)
    found = digests(run)
    snap.close(final=True)
    end(run)
    for key in [*expected, *found]:
        if expected.get(key) != found.get(key):
            return f"{key} differs"
    return ""


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    mode, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from tests.support.distributed_scenarios import DISTRIBUTED

        torch.distributed.init_process_group("gloo")
        chosen = DISTRIBUTED
    else:
        chosen = SCENARIOS
    scenarios = {name: scenario for name, scenario in chosen.items() if not names or name in names}
    if mode == "before":
        before(folder, scenarios)
    return after(folder, scenarios)


if __name__ == "__main__":
    sys.exit(main())
