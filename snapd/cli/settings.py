"""Settings on the command line: one flag per field of `snapd.config`, made from the fields themselves."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from snapd.config import Config, Loaded, env_name, fields_of, load

F = TypeVar("F", bound=Callable[..., Any])
CONFIG_VARIABLE = "SNAPD_CONFIG"
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help=f"TOML file with settings. Default: {CONFIG_VARIABLE}.", show_default=False
    ),
]


def config_file(option: Path | None) -> Path | None:
    """The settings file: the one named, else that of the environment, else none."""
    named = os.environ.get(CONFIG_VARIABLE)
    return option or (Path(named) if named else None)


def load_settings(option: Path | None, flags: Mapping[str, str | None] | None = None) -> Loaded:
    """The configuration with these flags (dotted path -> text, None: not given).

    Raises:
        ConfigError: lists every problem with its path, value and source.
    """
    return load(file=config_file(option), flags=flags)


def parameter_name(path: str) -> str:
    """The parameter of a setting: arena.chunk_bytes -> arena_chunk_bytes."""
    return path.replace(".", "_")


def flag_name(path: str) -> str:
    """The flag of a setting: arena.chunk_bytes -> --arena-chunk-bytes."""
    return "--" + path.replace(".", "-").replace("_", "-")


def flags_from(parameters: Mapping[str, Any]) -> dict[str, str | None]:
    """Dotted path -> text as given, out of a command's keyword arguments."""
    return {path: parameters[parameter_name(path)] for path, _, _ in fields_of(Config())}


def with_setting_flags(command: F) -> F:
    """Give a command that takes **keywords one optional flag per setting."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = [
        _flag(path, setting.metadata["kind"], setting.metadata["doc"])
        for path, setting, _ in fields_of(Config())
    ]
    command.__signature__ = signature.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
    command.__annotations__ |= {parameter.name: parameter.annotation for parameter in extra}
    command.__annotations__.pop("settings", None)
    return command


def _flag(path: str, kind: str, doc: str) -> inspect.Parameter:
    is_hidden = path.startswith("fault.")  # for tests
    option = typer.Option(
        flag_name(path), help=f"{doc} [{env_name(path)}]", show_default=False, hidden=is_hidden,
        metavar=kind.upper(),
        rich_help_panel="Settings",
    )  # fmt: skip
    return inspect.Parameter(
        parameter_name(path),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, option],
    )
