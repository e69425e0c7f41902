"""`snapd doctor`: what bites people, looked at before it does."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from snapd.cli.checks import Finding, Verdict, run_checks
from snapd.cli.cluster_checks import cluster_findings
from snapd.cli.connect import find_paths
from snapd.cli.disk_checks import disk_findings
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json, print_parts, table
from snapd.cli.settings import ConfigOption, load_settings
from snapd.cli.tier_checks import Questions, tier_findings
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
    """Check the machine: shared memory, limits, folders, the daemon, what it would die with, its cluster and tiers.

    Ends with 3 when something is bad, with 0 when there are warnings only.
    """
    try:
        needed_bytes = parse_size(need) if need else 0
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    paths = find_paths(runtime_dir)
    findings = run_checks(paths, needed_bytes=needed_bytes)
    settings, questions = load_settings(config).config, Questions()
    findings += cluster_findings(settings.cluster, paths.runtime)
    findings += tier_findings(settings.tier, paths.runtime, questions)
    findings += disk_findings(settings.tier, paths.runtime, questions)
    if as_json:
        print_json([finding_json(finding) for finding in findings])
    else:
        print_parts(
            table(HEADINGS, [row for finding in findings for row in finding_rows(finding)], text=HEADINGS[2:])
        )
    is_bad = any(finding.verdict is Verdict.BAD for finding in findings)
    code = ExitCode.UNUSABLE if is_bad else ExitCode.DONE
    if questions.is_hanging:  # in the kernel, or in a request that cannot be called off
        sys.stdout.flush()
        os._exit(code)
    return code


def finding_rows(finding: Finding) -> list[tuple[str, ...]]:
    """A row under HEADINGS, and below it what to do, if there is something."""
    kind = f" [{finding.kind}]" if finding.kind else ""
    row = (finding.verdict.value, finding.check, f"{finding.found}{kind}")
    return [row, ("", "", f"-> {finding.hint}")] if finding.hint else [row]


def finding_json(finding: Finding) -> dict[str, object]:
    """One check of the JSON."""
    return {
        "check": finding.check,
        "verdict": finding.verdict.value,
        "kind": finding.kind or None,
        "found": finding.found,
        "hint": finding.hint or None,
    }
