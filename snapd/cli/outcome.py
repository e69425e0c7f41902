"""Exit codes, and how an error reaches the user."""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from snapd.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    NotRestorable,
    ProtocolError,
    SnapdError,
    UnavailableError,
)

P = ParamSpec("P")
INTERRUPTED = 130  # as shells report SIGINT


class ExitCode(enum.IntEnum):
    """What a script may rely on."""

    DONE = 0
    FOUND_NOTHING = 1
    USAGE = 2
    UNUSABLE = 3
    UNREACHABLE = 4


_CODE_BY_CLASS: tuple[tuple[type[SnapdError], ExitCode], ...] = (
    (NotFoundError, ExitCode.FOUND_NOTHING),
    (ConfigError, ExitCode.USAGE),
    (ConflictError, ExitCode.USAGE),
    (IntegrityError, ExitCode.UNUSABLE),
    (NotRestorable, ExitCode.UNUSABLE),
    (CapacityError, ExitCode.UNUSABLE),
    (UnavailableError, ExitCode.UNREACHABLE),
    (AuthError, ExitCode.UNREACHABLE),
    (ProtocolError, ExitCode.UNREACHABLE),
)


def exit_code_of(error: SnapdError) -> ExitCode:
    """The exit code for an error; what has no code of its own is found but unusable."""
    for cls, code in _CODE_BY_CLASS:
        if isinstance(error, cls):
            return code
    return ExitCode.UNUSABLE


def error_line(error: SnapdError) -> str:
    """What, where, value, what to do: on one line."""
    text = f"snapd: {error}"
    if error.hint:
        text += f" ({error.hint})"
    return " ".join(text.split())


def error_json(error: SnapdError) -> dict[str, object]:
    """The same for programs."""
    facts = {"kind": error.kind, "message": error.message, "hint": error.hint, "context": error.context}
    return {"error": {**facts, "exit_code": int(exit_code_of(error))}}


def reports_errors(command: Callable[P, int]) -> Callable[P, None]:
    """Make a function that returns its exit code into a command that ends with it, errors included.

    An error is one line on stderr; if the command has a true argument `as_json`, also one JSON object on
    stdout.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code: int = command(*args, **kwargs)
        except SnapdError as error:
            print(error_line(error), file=sys.stderr)
            if kwargs.get("as_json"):
                print(json.dumps(error_json(error)))
            code = exit_code_of(error)
        except BrokenPipeError:
            # The reader (head, less) went away: nobody is left to tell. Python would complain at exit.
            sys.stdout = None
            code = ExitCode.DONE
        except OSError as error:
            # A file or folder that the user named, as a rule: what is ours is told by SnapdError.
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            wrong = ConfigError(what, kind="files")
            print(error_line(wrong), file=sys.stderr)
            if kwargs.get("as_json"):
                print(json.dumps(error_json(wrong)))
            code = ExitCode.USAGE
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        raise typer.Exit(int(code))

    run.__annotations__["return"] = None
    return run
