"""The checks of `snapd doctor` that concern the node's own disk (`tier.node`). Nothing is written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from snapd_proto import admin_pb2

from snapd.cli.checks import Finding, Verdict
from snapd.cli.tier_checks import Questions, judge_error
from snapd.cli.tier_folder import FolderLook, judge_folder, look_into
from snapd.cli.tier_view import scrub_text
from snapd.config_tiers import TierConfig, node_folder
from snapd.errors import SnapdError
from snapd.rpc.local_client import LocalClient
from snapd.units import format_size

CHECK = "node disk"


def disk_findings(config: TierConfig, runtime: Path, questions: Questions) -> list[Finding]:
    """Of the folder as it is, and of what the running daemon says of it."""
    if not config.node:
        return []
    try:
        folder = node_folder(config)
        look = questions.ask(f"cannot look into {folder}", lambda: look_into(folder))
        may_write = questions.ask(f"cannot look into {folder}", lambda: os.access(folder, os.W_OK | os.X_OK))
    except SnapdError as error:
        return [judge_error(CHECK, error)]
    found = [judge_disk(look, may_write=may_write)]
    if (runtime / "handshake.sock").exists() and found[0].verdict is not Verdict.BAD:
        found += _daemon_findings(folder, runtime)
    return found


def judge_disk(look: FolderLook, *, may_write: bool) -> Finding:
    """What a look says. A shared tier is no node's own."""
    finding = replace(judge_folder(look), check=CHECK)
    if finding.verdict is Verdict.BAD:
        return finding
    if look.marker:
        return replace(
            finding,
            verdict=Verdict.BAD,
            found=f"{look.path} is used as a shared tier",
            hint="give tier.node a folder of its own",
            kind="disk_shared",
        )
    if not may_write:
        return replace(
            finding,
            verdict=Verdict.BAD,
            found=f"{look.path} cannot be written",
            hint="the folder must belong to the user who runs snapd, on a disk that is mounted for writing",
            kind="store_denied",
        )
    if finding.verdict is Verdict.WARNING:
        return replace(finding, found=f"{look.path} is empty, {format_size(look.free_nbytes)} free")
    return replace(finding, found=f"{look.path}, {format_size(look.free_nbytes)} free")


def _daemon_findings(folder: Path, runtime: Path) -> list[Finding]:
    try:
        with LocalClient(runtime) as client:
            disk = client.status().disk
    except SnapdError:
        return []  # the check of the daemon says so
    check = "disk of daemon"
    if not disk.url or Path(disk.url) != folder:
        return [
            Finding(
                check=check,
                verdict=Verdict.BAD,
                found=f"the daemon has {disk.url}" if disk.url else "the daemon has no disk of its own",
                hint="start the daemon again with the same settings as this command",
                kind="tier_daemon",
            )
        ]
    if not disk.is_open:
        found = f"cannot be asked: {disk.trouble}" if disk.trouble else "not opened yet"
        verdict = Verdict.WARNING if disk.trouble else Verdict.GOOD
        return [Finding(check=check, verdict=verdict, found=found, kind=disk.trouble_kind)]
    return [judge_scrub(disk.scrub)]


def judge_scrub(scrub: admin_pb2.DiskScrub) -> Finding:
    """What reading the disk again has found."""
    text = f"opened; {scrub_text(scrub)}"
    if scrub.bad_count:
        return Finding(
            check="disk of daemon",
            verdict=Verdict.BAD,
            found=text,
            hint="snapd status names them; what memory still has is written again. Replace a disk that goes on so",
            kind="disk_rotten",
        )
    return Finding(check="disk of daemon", verdict=Verdict.GOOD, found=text)
