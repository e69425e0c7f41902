"""`snapd config show | explain`: which settings hold, and where each comes from."""

from __future__ import annotations

import json

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from snapd.cli.options import JsonOption
from snapd.cli.outcome import ExitCode, reports_errors
from snapd.cli.output import print_json, print_parts
from snapd.cli.settings import ConfigOption, load_settings
from snapd.config import Explained, Loaded, env_name, explain, fields_of, unknown_variables

app = typer.Typer(no_args_is_help=True, help="Show the settings and where they come from.")


def show(as_json: JsonOption = False, config: ConfigOption = None) -> ExitCode:
    """Print the settings that hold, as a TOML file that gives the same."""
    loaded = load_settings(config)
    if as_json:
        print_json({path: value for path, _, value in fields_of(loaded.config)})
    else:
        print(settings_toml(loaded))
        _tell_unknown_variables()
    return ExitCode.DONE


def explain_settings(as_json: JsonOption = False, config: ConfigOption = None) -> ExitCode:
    """Print every setting: value, where it comes from (default, file, environment), bound, what it trades."""
    rows = explain(load_settings(config))
    if as_json:
        print_json([setting_json(row) for row in rows])
    else:
        print_parts(*(part for row in rows for part in setting_parts(row)))
        _tell_unknown_variables()
    return ExitCode.DONE


def _tell_unknown_variables() -> None:
    for problem in unknown_variables():
        typer.echo(f"snapd: {problem}", err=True)


def setting_parts(setting: Explained) -> list[RenderableType]:
    """A setting: name and value, where it comes from, its bound; below, what it trades."""
    value = setting.value or '""'
    origin = "the default" if setting.source == "default" else f"from {setting.source}"
    facts = [origin, setting.bound]
    if setting.source != "default":
        facts.append(f"default {setting.default or 'empty'}")
    head = Text.assemble((setting.path, "bold"), f" = {value}  ({'; '.join(fact for fact in facts if fact)})")
    return [head, Padding(Text(setting.doc), (0, 0, 0, 4))]


def setting_json(setting: Explained) -> dict[str, object]:
    """One setting of the JSON, with the name of its variable."""
    return {
        "setting": setting.path,
        "variable": env_name(setting.path),
        "value": setting.value,
        "source": setting.source,
        "default": setting.default,
        "unit": setting.unit or None,
        "bound": setting.bound or None,
        "doc": setting.doc,
    }


def settings_toml(loaded: Loaded) -> str:
    """The settings as TOML; what is not the default says where it comes from."""
    lines: list[str] = []
    section = ""
    for path, setting, value in fields_of(loaded.config):
        head, _, name = path.partition(".")
        if head != section:
            lines += ["", f"[{head}]"] if section else [f"[{head}]"]
            section = head
        source = loaded.sources[path]
        comment = "" if source == "default" else f"  # from {source}"
        lines.append(f"{name} = {_toml_value(setting.metadata['kind'], value)}{comment}")
    return "\n".join(lines)


def _toml_value(kind: str, value: object) -> str:
    # JSON's strings and numbers are TOML's too. A duration is text with its unit, so that it reads.
    return json.dumps(f"{value:g}s") if kind == "duration" else json.dumps(value)


app.command("show")(reports_errors(show))
app.command("explain")(reports_errors(explain_settings))
