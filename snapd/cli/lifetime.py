"""What a daemon that a trainer starts by itself would die with: the container, the Slurm step, the login.

Such a daemon has a session of its own, so it outlives the trainer and torchrun; what ends a whole container,
control group or login still ends it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_INIT_NAMES = ("systemd", "init", "launchd", "runit", "openrc-init", "s6-svscan")
_ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Risk:
    """One thing that the daemon's life hangs on; without a hint there is nothing to do."""

    what: str
    hint: str = ""


def check_lifetime(runtime: Path, environment: Mapping[str, str]) -> list[Risk]:
    """Every risk that is seen here, or one line that says that there is none."""
    group = Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace")
    init = Path("/proc/1/comm").read_text(encoding="utf-8", errors="replace").strip()
    found = [
        judge_container(
            init, group, has_marker=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
        ),
        judge_slurm(environment, group),
        judge_login(group, is_lingering=_is_lingering(), kills_processes=_kills_user_processes()),
        judge_runtime_folder(runtime, environment.get("XDG_RUNTIME_DIR", ""), is_lingering=_is_lingering()),
    ]
    risks = [risk for risk in found if risk is not None]
    return risks or [Risk(what="a daemon started here lives until it is stopped or the machine ends")]


def judge_container(init: str, group: str, *, has_marker: bool) -> Risk | None:
    """In a container the daemon ends with its first process."""
    marks = ("docker", "kubepods", "containerd", "libpod", "lxc")
    if not has_marker and init in _INIT_NAMES and not any(mark in group for mark in marks):
        return None
    hint = "to outlive it, run the daemon in a container of its own that shares both folders"
    return Risk(what=f"in a container (process 1 is {init}): the daemon and the arena end with it", hint=hint)


def judge_slurm(environment: Mapping[str, str], group: str) -> Risk | None:
    """In a Slurm step the daemon ends with the step."""
    job = environment.get("SLURM_JOB_ID")
    if job is None and "slurm" not in group:
        return None
    where = "the step's control group" if "step_" in group else "the job"
    hint = "start `snapd serve` in a step of its own (srun --overlap) before the training step"
    return Risk(what=f"in Slurm job {job or 'of unknown number'}: the daemon ends with {where}", hint=hint)


def judge_login(group: str, *, is_lingering: bool | None, kills_processes: bool) -> Risk | None:
    """In a login session systemd may end everything at logout."""
    if "session-" not in group or not kills_processes or is_lingering:
        return None
    hint = "loginctl enable-linger, and start `snapd serve` as a user service"
    return Risk(
        what="in a login session with KillUserProcesses=yes: the daemon ends with the login", hint=hint
    )


def judge_runtime_folder(runtime: Path, xdg: str, *, is_lingering: bool | None) -> Risk | None:
    """$XDG_RUNTIME_DIR is emptied at the last logout of a user who does not linger."""
    if not xdg or not runtime.is_relative_to(xdg) or is_lingering is not False:
        return None
    hint = "loginctl enable-linger, or set SNAPD_RUNTIME_DIR to another folder of yours"
    return Risk(what=f"{xdg} is emptied at your last logout: the sockets go with it", hint=hint)


def _is_lingering() -> bool | None:
    """Whether systemd keeps this user's services without a login; None without systemd."""
    answer = _ask("loginctl", "show-user", str(os.getuid()), "--property=Linger", "--value")
    if answer in ("yes", "no"):
        return answer == "yes"
    name = pwd.getpwuid(os.getuid()).pw_name
    linger = Path("/var/lib/systemd/linger")
    return (linger / name).exists() if linger.is_dir() else None


def _kills_user_processes() -> bool:
    name = "org.freedesktop.login1"
    answer = _ask(
        "busctl", "get-property", name, "/org/freedesktop/login1", f"{name}.Manager", "KillUserProcesses"
    )
    return answer == "b true"


def _ask(program: str, *arguments: str) -> str:
    """A program's answer without the line's end; empty when it is not there or fails."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
