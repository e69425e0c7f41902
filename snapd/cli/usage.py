"""Mistakes on the command line itself, told as every other error is: one line, the code in brackets, exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from snapd.cli.outcome import INTERRUPTED, ExitCode, error_json, error_line
from snapd.errors import ConfigError

# By way of a name that typer exports: it may bring click with it, or the package may be there.
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]
_HELP_WAS_SHOWN = "NoArgsIsHelpError"


class OneLineErrors(TyperGroup):
    """The commands; what is wrong with how they are called takes one line, not a box."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """As click's: parse, run, and end the process with the exit code."""
        is_standalone = extra.pop("standalone_mode", True)
        if not is_standalone:
            return super().main(args, standalone_mode=False, **extra)
        given = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(given, standalone_mode=False, **extra)
        except _CLICK_ERROR as error:
            code = _tell(error, given)
        except typer.Abort:
            code = INTERRUPTED
        sys.exit(code or 0)


def _tell(error: Any, given: Sequence[str]) -> int:
    message = _with_value(error, given)
    if type(error).__name__ == _HELP_WAS_SHOWN:
        if message:  # with rich it has been printed already
            print(message, file=sys.stderr)
        return int(ExitCode.USAGE)
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "snapd --help"
    wrong = ConfigError(message.strip().rstrip("."), kind="arguments", hint=hint)
    print(error_line(wrong), file=sys.stderr)
    if "--json" in given:
        print(json.dumps(error_json(wrong)))
    return int(ExitCode.USAGE)


def _with_value(error: Any, given: Sequence[str]) -> str:
    """What is wrong, with the value that was given: not every parser says it."""
    message = str(error.format_message()).replace("Value error, ", "")
    options = getattr(getattr(error, "param", None), "opts", None) or ()
    for place, word in enumerate(given):
        option, has_value, value = word.partition("=")
        if option in options:
            value = value if has_value else next(iter(given[place + 1 :]), "")
            return message if not value or repr(value) in message else f"{message}: {value!r}"
    return message
