"""`snapd`: the program. Puts the commands together; each lives in a file of its own."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Annotated

import typer

import snapd
from snapd.cli.certs import app as certs_app
from snapd.cli.config import app as config_app
from snapd.cli.doctor import doctor
from snapd.cli.drain import drain
from snapd.cli.export import export
from snapd.cli.gc import gc
from snapd.cli.ls import ls
from snapd.cli.outcome import reports_errors
from snapd.cli.pin import pin, unpin
from snapd.cli.plan import plan
from snapd.cli.restore import restore
from snapd.cli.rm import rm
from snapd.cli.serve import serve
from snapd.cli.show import show
from snapd.cli.status import status
from snapd.cli.top import top
from snapd.cli.usage import OneLineErrors
from snapd.cli.verify import verify

_EPILOG = "Exit codes: 0 done, 1 found nothing, 2 usage, 3 found but unusable, 4 unreachable."

app = typer.Typer(
    name="snapd",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"snapd {snapd.__version__}")
        raise typer.Exit


@app.callback()
def _snapd(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Keep the state of training jobs safe in memory that outlives the trainer."""


for _command in (
    serve,
    status,
    top,
    ls,
    show,
    verify,
    restore,
    export,
    rm,
    drain,
    pin,
    unpin,
    gc,
    plan,
    doctor,
):
    app.command(_command.__name__)(reports_errors(_command))
app.add_typer(config_app, name="config")
app.add_typer(certs_app, name="certs")


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C: what was begun is tidied away."""
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point of the `snapd` command."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    app()
