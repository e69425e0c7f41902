"""Mistakes on the command line itself: one line, the code in brackets, exit code 2; with --json an object as well."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from snapd.cli.main import app


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("statsu", "No such command 'statsu'"),
        ("status --jsn", "No such option: --jsn"),
        ("verify job --step abc", "'abc'"),
        ("verify job --step -1", "-1"),
        ("export", "Missing option '--to'"),
        ("export --format pickle --to x", "'pickle' is not one of 'safetensors', 'dcp', 'torch'"),
        ("rm", "Missing argument"),
        ("drain", "either --node or --job is needed"),
        ("serve --tier-sharde /x", "No such option: --tier-sharde"),
        ("certs ca --days=0", "'--days'"),
        ("doctor --need 24gigs", "not a size: '24gigs'"),
        ("plan --nodes 8 --step-time 5parsecs", "--step-time: not a duration"),
    ],
)
def test_one_line_and_exit_code_2(line: str, text: str) -> None:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    told = result.stderr.strip()
    assert told.startswith("snapd: ") and text in told and "\n" not in told
    assert "[arguments]" in told or "[plan]" in told


def test_with_json_it_is_an_object_too() -> None:
    result = CliRunner().invoke(app, ["status", "--json", "--what"])
    document = json.loads(result.stdout)
    assert result.exit_code == 2
    assert document["error"]["kind"] == "arguments" and document["error"]["exit_code"] == 2
    assert document["error"]["hint"].endswith("status --help")


@pytest.mark.parametrize("arguments", [[], ["certs"], ["config"]])
def test_without_a_command_there_is_help(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert "Usage:" in result.output and "snapd:" not in result.output


def test_a_file_that_cannot_be_written_is_no_traceback(tmp_path: object) -> None:
    result = CliRunner().invoke(app, ["plan", "--nodes", "8", "--plot", "/proc/nowhere/x.svg"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "/proc/nowhere" in result.stderr
