"""`snapd doctor`: what bites people, looked at before it does."""

from __future__ import annotations

from typing import Annotated

import typer

from snapd.cli.checks import Finding, Verdict, run_checks
from snapd.cli.cluster_checks import cluster_findings
from snapd.cli.connect import find_paths
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json, print_parts, table
from snapd.cli.settings import ConfigOption, load_settings
from snapd.units import parse_size

HEADINGS = ("", "CHECK", "FOUND")


def doctor(
    need: Annotated[
        str,
        typer.Option(
            "--need",
            help="Arena that the job will want, e.g. 24GiB: judge the sizes by it.",
            show_default=False,
        ),
    ] = "",
    config: ConfigOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Check the machine: shared memory, limits, folders, the daemon, what it would die with, and its cluster.

    Ends with 3 when something is bad, with 0 when there are warnings only.
    """
    try:
        needed_bytes = parse_size(need) if need else 0
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    paths = find_paths(runtime_dir)
    findings = run_checks(paths, needed_bytes=needed_bytes)
    findings += cluster_findings(load_settings(config).config.cluster, paths.runtime)
    if as_json:
        print_json([finding_json(finding) for finding in findings])
    else:
        print_parts(
            table(HEADINGS, [row for finding in findings for row in finding_rows(finding)], text=HEADINGS[2:])
        )
    is_bad = any(finding.verdict is Verdict.BAD for finding in findings)
    return ExitCode.UNUSABLE if is_bad else ExitCode.DONE


def finding_rows(finding: Finding) -> list[tuple[str, ...]]:
    """A row under HEADINGS, and below it what to do, if there is something."""
    row = (finding.verdict.value, finding.check, finding.found)
    return [row, ("", "", f"-> {finding.hint}")] if finding.hint else [row]


def finding_json(finding: Finding) -> dict[str, object]:
    """One check of the JSON."""
    return {
        "check": finding.check,
        "verdict": finding.verdict.value,
        "found": finding.found,
        "hint": finding.hint or None,
    }
