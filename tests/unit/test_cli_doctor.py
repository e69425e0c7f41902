"""What `snapd doctor` says about facts that are made up here."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from snapd.cli import checks, lifetime
from snapd.cli.checks import Verdict

GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "kind", "needed", "verdict", "text"),
    [
        (64 << 20, "tmpfs", 0, Verdict.BAD, "--shm-size"),
        (64 * GIB, "tmpfs", 0, Verdict.GOOD, ""),
        (64 * GIB, "tmpfs", 65 * GIB, Verdict.BAD, "emptyDir"),
        (64 * GIB, "ext4", 0, Verdict.BAD, "SNAPD_ARENA_DIR"),
    ],
)
def test_shared_memory(size: int, kind: str, needed: int, verdict: Verdict, text: str) -> None:
    finding = checks.judge_shared_memory(Path("/dev/shm"), size, size, kind, needed)
    assert finding.verdict is verdict and text in finding.hint


def test_memory_limit() -> None:
    assert checks.judge_memory_limit(None, 0, "x", GIB).verdict is Verdict.GOOD
    assert checks.judge_memory_limit(4 * GIB, GIB, "x", 2 * GIB).verdict is Verdict.GOOD
    finding = checks.judge_memory_limit(4 * GIB, GIB, "x", 4 * GIB)
    assert finding.verdict is Verdict.BAD and "raise it by the arena's size" in finding.hint


def test_locked_memory_matters_with_a_gpu() -> None:
    assert checks.judge_memlock(65536, has_gpu=False).verdict is Verdict.GOOD
    assert checks.judge_memlock(65536, has_gpu=True).verdict is Verdict.WARNING
    assert checks.judge_memlock(resource.RLIM_INFINITY, has_gpu=True).verdict is Verdict.GOOD


def test_open_files() -> None:
    assert checks.judge_open_files(256).verdict is Verdict.WARNING
    assert checks.judge_open_files(resource.RLIM_INFINITY).verdict is Verdict.GOOD


@pytest.mark.parametrize(
    ("mode", "owner", "text"),
    [
        (stat.S_IFDIR | 0o700, 7, ""),
        (stat.S_IFDIR | 0o750, 7, "chmod 700"),
        (stat.S_IFDIR | 0o700, 8, "another user's"),
        (stat.S_IFREG | 0o700, 7, "remove it"),
        (stat.S_IFLNK | 0o777, 7, "remove it"),
    ],
)
def test_folders(mode: int, owner: int, text: str) -> None:
    finding = checks.judge_folder("runtime folder", Path("/r"), mode, owner, 7)
    assert (finding.verdict is Verdict.GOOD) == (text == "") and text in finding.hint


def test_a_folder_that_is_not_there_yet_is_fine(tmp_path: Path) -> None:
    assert checks.check_folder("runtime folder", tmp_path / "none").verdict is Verdict.GOOD
    assert checks.nearest_existing(tmp_path / "a" / "b") == tmp_path


def test_socket_paths_end_at_107_bytes() -> None:
    assert checks.judge_socket_path(Path("/" + "x" * 106)).verdict is Verdict.GOOD
    assert checks.judge_socket_path(Path("/" + "x" * 107)).verdict is Verdict.BAD


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    mounts = "\n".join(
        [
            "overlay / overlay rw 0 0",
            "tmpfs /dev tmpfs rw 0 0",
            "shm /dev/shm tmpfs rw 0 0",
            "x /with\\040blank ext4 rw 0 0",
        ]
    )
    assert checks.filesystem_type(Path("/dev/shm/a"), mounts) == "tmpfs"
    assert checks.filesystem_type(Path("/dev/shmx"), mounts.replace("tmpfs /dev ", "dev /dev ")) == "tmpfs"
    assert checks.filesystem_type(Path("/home"), mounts) == "overlay"
    assert checks.filesystem_type(Path("/with blank/y"), mounts) == "ext4"


def _write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def test_the_tightest_memory_limit_above_us_counts(tmp_path: Path) -> None:
    _write(tmp_path / "a", memory__max=f"{4 * GIB}\n", memory__current="100\n")
    _write(tmp_path / "a" / "b", memory__max="max\n", memory__current="50\n")
    limit, used, source = checks.read_cgroup_limit(tmp_path, "0::/a/b\n")
    assert (limit, used) == (4 * GIB, 100) and source.endswith("a/memory.max")
    assert checks.read_cgroup_limit(tmp_path / "none", "0::/\n")[0] is None


def test_the_old_kind_of_control_group(tmp_path: Path) -> None:
    folder = tmp_path / "memory" / "docker" / "x"
    _write(folder, memory__limit_in_bytes=f"{GIB}\n", memory__usage_in_bytes="7\n")
    limit, used, _ = checks.read_cgroup_limit(tmp_path, "9:cpu:/x\n4:memory:/docker/x\n")
    assert (limit, used) == (GIB, 7)
    _write(folder, memory__limit_in_bytes=f"{(1 << 63) - 4096}\n")
    assert checks.read_cgroup_limit(tmp_path, "4:memory:/docker/x\n")[0] is None


def test_no_daemon_is_no_problem(tmp_path: Path) -> None:
    finding = checks.check_daemon(tmp_path)
    assert finding.verdict is Verdict.GOOD and "starts one" in finding.found


def test_a_socket_that_nobody_serves_is_bad(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "handshake.sock").touch()
    assert checks.check_daemon(tmp_path).verdict is Verdict.BAD


# --- lifetime ---------------------------------------------------------------------------------------------------
def test_containers() -> None:
    assert lifetime.judge_container("systemd", "0::/user.slice/x", has_marker=False) is None
    for init, group, marker in (
        ("python", "0::/", False),
        ("systemd", "0::/kubepods/x", False),
        ("systemd", "", True),
    ):
        risk = lifetime.judge_container(init, group, has_marker=marker)
        assert risk is not None and "container" in risk.what and risk.hint


def test_slurm() -> None:
    assert lifetime.judge_slurm({}, "0::/user.slice") is None
    risk = lifetime.judge_slurm(
        {"SLURM_JOB_ID": "42"}, "0::/system.slice/slurmstepd.scope/job_42/step_0/user"
    )
    assert (
        risk is not None
        and "job 42" in risk.what
        and "step's control group" in risk.what
        and "srun" in risk.hint
    )


def test_logins() -> None:
    group = "0::/user.slice/user-7.slice/session-3.scope"
    assert lifetime.judge_login(group, is_lingering=False, kills_processes=False) is None
    assert lifetime.judge_login(group, is_lingering=True, kills_processes=True) is None
    risk = lifetime.judge_login(group, is_lingering=False, kills_processes=True)
    assert risk is not None and "enable-linger" in risk.hint


def test_the_runtime_folder_goes_with_the_last_logout() -> None:
    runtime = Path("/run/user/7/snapd-train")
    assert lifetime.judge_runtime_folder(runtime, "/run/user/7", is_lingering=True) is None
    assert lifetime.judge_runtime_folder(runtime, "/run/user/7", is_lingering=None) is None
    assert lifetime.judge_runtime_folder(Path("/tmp/x"), "/run/user/7", is_lingering=False) is None
    assert lifetime.judge_runtime_folder(runtime, "/run/user/7", is_lingering=False) is not None


def test_something_is_always_said(tmp_path: Path) -> None:
    assert lifetime.check_lifetime(tmp_path, os.environ)
