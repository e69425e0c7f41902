"""`snapd serve`: the daemon."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Annotated, Any

import typer

from snapd.cli.settings import ConfigOption, flags_from, load_settings, with_setting_flags
from snapd.config import Config, paths
from snapd.memory.folders import private_folder

LOG_NAME = "daemon.log"


@with_setting_flags
def serve(
    *,
    embedded: Annotated[
        bool,
        typer.Option(
            "--embedded", help="As a trainer starts it: the log goes to daemon.log beside the sockets."
        ),
    ] = False,
    config: ConfigOption = None,
    **settings: Any,
) -> int:
    """Run the daemon of this machine, until SIGTERM or Ctrl-C. The arena outlives it."""
    # Imported here: the other commands start faster without the daemon's parts.
    from snapd.daemon import run_daemon

    loaded = load_settings(config, flags_from(settings))
    settled = prepare_embedded(loaded.config) if embedded else loaded.config
    return run_daemon(settled, is_embedded=embedded)


def prepare_embedded(config: Config) -> Config:
    """Settle as a background process: no terminal, no folder of the trainer's, a log of its own.

    Raises:
        ConfigError: the runtime folder cannot be made, or is not ours alone.
    """
    runtime = private_folder(paths(config).runtime)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of a login is not the end of the snapshots
    os.chdir("/")
    if config.log.file:
        return config
    return dataclasses.replace(config, log=dataclasses.replace(config.log, file=str(runtime / LOG_NAME)))
