"""`snapd top`: the status, live."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import console, print_json_line, print_parts, rendered
from snapd.cli.status import status_json, status_tables
from snapd.rpc.local_client import LocalClient

REFRESH_S = 1.0


def top(
    once: Annotated[bool, typer.Option("--once", help="Show the status once and end.")] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Show the status and refresh it every second, until Ctrl-C. With --json: one line a second."""
    with connected(runtime_dir) as client:
        if as_json:
            _print_lines(client, once=once)
        elif once:
            print_parts(*status_tables(client.status()))
        else:
            _show_live(client)
    return ExitCode.DONE


def _screen(client: LocalClient) -> Text:
    """The status; what does not fit into the terminal is cut off, not wrapped."""
    lines = "\n".join(map(rendered, status_tables(client.status())))
    return Text.from_ansi(lines, no_wrap=True, overflow="crop")


def _show_live(client: LocalClient) -> None:
    """Refresh until Ctrl-C, at whatever moment; a daemon that goes away ends it with the error."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(_screen(client), console=console(), screen=True, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(REFRESH_S)
            live.update(_screen(client), refresh=True)


def _print_lines(client: LocalClient, *, once: bool) -> None:
    print_json_line(status_json(client.status()))
    while not once:
        time.sleep(REFRESH_S)
        print_json_line(status_json(client.status()))
