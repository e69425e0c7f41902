"""What `snapd doctor` looks at in the folder of a tier: is it there, is it a tier, is a disk missing from it."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from snapd.cli.checks import Finding, Verdict
from snapd.store.base import Probe
from snapd.store.directory import DirectoryStore
from snapd.store.directory_files import MARKER, Root
from snapd.store.surroundings import Surroundings
from snapd.units import format_size

FSTAB = Path("/etc/fstab")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLook:
    """`marker`: which tier it says that it is; empty: none. `unmounted`: the mount point above it where a disk should
    be, and none is. `free_nbytes`: for the user.
    """

    path: Path
    is_folder: bool
    unmounted: str = ""
    marker: str = ""
    is_empty: bool = False
    free_nbytes: int = 0


def look_into(folder: Path) -> FolderLook:
    """Look, and write nothing. Blocks where the file system hangs.

    Raises:
        SnapdError: in the words of a store.
    """
    unmounted = missing_mount(folder, FSTAB)
    root = Root(folder, single_writer=False)
    missing = root.missing()
    if missing is not None and missing.kind != "bucket":
        raise missing
    if missing is not None:
        return FolderLook(path=folder, is_folder=False, unmounted=unmounted)
    with root.speaking("look into the folder"):
        names = os.listdir(folder)
        marker = (folder / MARKER).read_text("ascii", "replace").strip() if MARKER in names else ""
        facts = os.statvfs(folder)
    return FolderLook(
        path=folder,
        is_folder=True,
        unmounted=unmounted,
        marker=marker,
        is_empty=not names,
        free_nbytes=facts.f_bavail * facts.f_frsize,
    )


def missing_mount(folder: Path, fstab: Path) -> str:
    """The place, at `folder` or above it, that fstab has a disk for and where none is mounted; empty: none."""
    try:
        lines = fstab.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for fields in (line.split() for line in lines if not line.lstrip().startswith("#")):
        if len(fields) < 2 or not fields[1].startswith("/") or fields[1] == "/":
            continue
        place = fields[1].replace("\\040", " ")
        if folder.is_relative_to(place) and not os.path.ismount(place):
            return place
    return ""


def judge_folder(look: FolderLook) -> Finding:
    """What a look says."""
    check, path = "tier folder", look.path
    if look.unmounted and not look.marker:
        return Finding(
            check=check,
            verdict=Verdict.BAD,
            found=f"{path}: nothing is mounted at {look.unmounted}, and /etc/fstab has a disk for it",
            hint=f"mount {look.unmounted}",
            kind="tier_unmounted",
        )
    if not look.is_folder:
        return Finding(
            check=check,
            verdict=Verdict.BAD,
            found=f"the folder {path} is missing",
            hint="mount its disk, or make it once (it is not made by snapd, so that no other disk is filled)",
            kind="tier_folder",
        )
    free = f"{format_size(look.free_nbytes)} free"
    if look.marker:
        return Finding(check=check, verdict=Verdict.GOOD, found=f"tier {look.marker[:8]}, {free}")
    if look.is_empty:
        return Finding(
            check=check,
            verdict=Verdict.WARNING,
            found=f"{path} is empty, no tier yet, {free}",
            hint="if a disk should be mounted there, it is not; for a new tier that is how it begins",
            kind="tier_empty",
        )
    return Finding(check=check, verdict=Verdict.GOOD, found=f"no tier yet, {free}")


def probe_aside(folder: Path, surroundings: Surroundings) -> Probe:
    """Probe the file system of a folder that is no tier yet, in a hidden folder that goes away: in the folder itself a
    probe would leave the marker of a tier, also where a disk is to be mounted.

    Raises:
        SnapdError: as a store.
    """
    with Root(folder, single_writer=False).speaking("write"):
        aside = tempfile.mkdtemp(prefix=".snapd-doctor-", dir=folder)
    try:
        return DirectoryStore(Path(aside), surroundings).probe()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
