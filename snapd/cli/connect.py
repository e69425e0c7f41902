"""From options to a connection."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from snapd.cli.settings import load_settings
from snapd.config import Paths, paths
from snapd.errors import ConfigError, NotFoundError
from snapd.rpc.local_client import LocalClient


@contextlib.contextmanager
def connected(runtime_dir: Path | None) -> Iterator[LocalClient]:
    """A connection to the daemon in `runtime_dir` (None: as configured), closed at the end.

    Raises:
        SnapdError: as LocalClient.connect.
    """
    with LocalClient(find_paths(runtime_dir).runtime) as client:
        yield client


def find_paths(runtime_dir: Path | None) -> Paths:
    """The folders of the daemon that is meant: option, environment, settings file, default.

    Raises:
        ConfigError: a setting is wrong.
    """
    flag = None if runtime_dir is None else str(runtime_dir)
    return paths(load_settings(None, {"runtime.dir": flag}).config)


def choose_job(client: LocalClient, job: str | None) -> str:
    """The job that is meant: the one named, else SNAPD_JOB, else the only one that there is.

    Raises:
        NotFoundError: there is none.
        ConfigError: there are several.
    """
    named = job or os.environ.get("SNAPD_JOB")
    if named:
        return named
    jobs = sorted({snapshot.job for snapshot in client.list_snapshots()})
    if not jobs:
        raise NotFoundError(
            "no snapshots here", hint="has the trainer taken one?  snapd status shows who is attached"
        )
    if len(jobs) > 1:
        raise ConfigError(f"which job? there are {', '.join(jobs)}", hint="name one with --job or SNAPD_JOB")
    return jobs[0]
