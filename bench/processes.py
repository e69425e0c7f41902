"""Starting the processes of a benchmark: the daemon, and workers that print one JSON line at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from node import Node

WORKER_S = 1800.0


class WorkerFailed(Exception):
    """A worker process ended without a result."""


def publish(result: Mapping[str, Any]) -> None:
    """In a worker: hand the result to whoever started it."""
    path = os.environ["SNAPD_BENCH_RESULT"] + "." + os.environ.get("RANK", "0")
    Path(path).write_text(json.dumps(result))


def run_worker(
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    timeout_s: float = WORKER_S,
) -> list[dict[str, Any]]:
    """Run `python ARGUMENTS` (under torchrun with several ranks); the results by rank."""
    with tempfile.TemporaryDirectory(prefix="snapd-bench-") as folder:
        result = os.path.join(folder, "result")
        full = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        full |= {"SNAPD_BENCH_RESULT": result, **(env or {})}
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        with subprocess.Popen([*command, *arguments], env=full, start_new_session=True) as process:
            try:
                status = process.wait(timeout_s)
            except BaseException:
                process.terminate()
                raise
        if status != 0:
            raise WorkerFailed(f"{' '.join(arguments)} ended with {status}")
        return [json.loads(Path(f"{result}.{rank}").read_text()) for rank in range(ranks)]


@contextmanager
def daemon(*options: str) -> Iterator[Node]:
    """A daemon of the benchmark's own."""
    with Node("snapd-bench", options=options) as node:
        try:
            yield node
        except WorkerFailed as error:
            raise WorkerFailed(f"{error}; the daemon's log ends with\n{node.tail()}") from None
