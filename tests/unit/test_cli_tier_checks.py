"""What `snapd doctor` says of durable tiers: judged from facts that are made up, and of folders that are there."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from snapd_proto import admin_pb2
from typer.testing import CliRunner

from snapd.cli import tier_checks
from snapd.cli.checks import Finding, Verdict
from snapd.cli.disk_checks import disk_findings, judge_disk
from snapd.cli.main import app
from snapd.cli.tier_checks import Questions, judge_daemon, judge_error, judge_probe, tier_findings
from snapd.cli.tier_folder import FolderLook, judge_folder, missing_mount
from snapd.config_tiers import TierConfig, hurried
from snapd.errors import AuthError, NotFoundError, SnapdError, UnavailableError
from snapd.store.base import Created, Probe
from tests.support.stores import directory_store

Said = tuple[str, Verdict, str]
GOOD_PROBE = Probe(refuses_existing=True, keeps_checksums=True, skew_s=0.4)


def said(findings: list[Finding]) -> list[Said]:
    return [(finding.check, finding.verdict, finding.kind) for finding in findings]


def findings_of(shared: str, tmp_path: Path) -> list[Finding]:
    return tier_findings(TierConfig(shared=shared), tmp_path / "none", Questions())


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# the node's own disk


def disk_said(node: str, tmp_path: Path) -> list[Said]:
    return said(disk_findings(TierConfig(node=node), tmp_path / "none", Questions()))


def test_the_disk_of_a_node(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    assert disk_said("", tmp_path) == []
    assert disk_said(str(disk), tmp_path) == [("node disk", Verdict.BAD, "tier_folder")]
    disk.mkdir()
    assert disk_said(str(disk), tmp_path) == [("node disk", Verdict.WARNING, "tier_empty")]
    (disk / ".snapd-node").write_text("a")
    assert disk_said(str(disk), tmp_path) == [("node disk", Verdict.GOOD, "")]
    assert disk_said("s3://bucket/x", tmp_path) == [("node disk", Verdict.BAD, "store")]
    assert entries(disk) == [".snapd-node"]
    shared = tmp_path / "shared"
    shared.mkdir()
    directory_store(shared).probe()
    assert disk_said(str(shared), tmp_path) == [("node disk", Verdict.BAD, "disk_shared")]


def test_a_disk_that_cannot_be_written() -> None:
    look = FolderLook(path=Path("/mnt/nvme"), is_folder=True, free_nbytes=1 << 30)
    finding = judge_disk(look, may_write=False)
    assert (finding.check, finding.verdict, finding.kind) == ("node disk", Verdict.BAD, "store_denied")
    assert "/mnt/nvme" in finding.found and finding.hint
    assert judge_disk(look, may_write=True).found == "/mnt/nvme, 1 GiB free"


# judging


def test_a_good_probe() -> None:
    assert said(judge_probe(GOOD_PROBE, single_writer=False)) == [
        ("tier commits", Verdict.GOOD, ""),
        ("tier checksums", Verdict.GOOD, ""),
        ("tier clock", Verdict.GOOD, ""),
    ]


@pytest.mark.parametrize(("single_writer", "verdict"), [(False, Verdict.BAD), (True, Verdict.WARNING)])
def test_a_server_that_ignores_conditions(single_writer: bool, verdict: Verdict) -> None:
    probe = Probe(False, False, -90.0, ("s3://b overwrites objects",))
    commits, checksums, clock = judge_probe(probe, single_writer=single_writer)
    assert (commits.verdict, commits.kind, commits.found) == (
        verdict,
        "store_conditional",
        "s3://b overwrites objects",
    )
    assert "tier.single_writer" in commits.hint
    assert (checksums.verdict, checksums.kind) == (Verdict.WARNING, "store_checksums")
    assert (clock.verdict, clock.kind) == (Verdict.WARNING, "store_skew") and "-90 s" in clock.found


def test_who_may_read_alone_is_warned() -> None:
    denied = AuthError("cannot write probe/x: AccessDenied", kind="store_denied", hint="rights")
    finding = judge_error("tier commits", denied)
    assert (finding.verdict, finding.kind) == (Verdict.WARNING, "store_read_only")
    assert "can restore" in finding.hint and "cannot flush" in finding.hint
    assert judge_error("tier listing", denied).verdict is Verdict.BAD


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("no such bucket", kind="bucket", hint="make it"),
        AuthError("who?", kind="store_credentials", hint="the chain"),
        UnavailableError("not trusted", kind="store_tls", hint="tier.ca"),
        UnavailableError("refused", kind="store_unreachable", hint="does it run?"),
    ],
)
def test_what_fails_keeps_its_kind_and_hint(error: SnapdError) -> None:
    finding = judge_error("tier listing", error)
    assert finding.verdict is Verdict.BAD
    assert (finding.kind, finding.found, finding.hint) == (error.kind, error.message, error.hint)


@pytest.mark.parametrize(
    ("facts", "verdict", "kind"),
    [
        ({"is_folder": False}, Verdict.BAD, "tier_folder"),
        ({"is_folder": False, "unmounted": "/mnt"}, Verdict.BAD, "tier_unmounted"),
        ({"is_folder": True, "is_empty": True, "unmounted": "/mnt"}, Verdict.BAD, "tier_unmounted"),
        ({"is_folder": True, "is_empty": True}, Verdict.WARNING, "tier_empty"),
        ({"is_folder": True}, Verdict.GOOD, ""),
        ({"is_folder": True, "marker": "ab" * 16, "unmounted": "/mnt"}, Verdict.GOOD, ""),
    ],
)
def test_folders(facts: dict[str, object], verdict: Verdict, kind: str) -> None:
    finding = judge_folder(FolderLook(path=Path("/mnt/tier"), **facts))  # type: ignore[arg-type]
    assert (finding.verdict, finding.kind) == (verdict, kind)
    assert bool(finding.hint) == (verdict is not Verdict.GOOD)


def test_a_disk_that_fstab_knows_and_nobody_mounted(tmp_path: Path) -> None:
    fstab, place = tmp_path / "fstab", tmp_path / "with blank"
    fstab.write_text(f"# /dev/x {tmp_path} ext4\n/dev/a / ext4\nproc /proc proc\n")
    assert missing_mount(place / "tier", fstab) == ""
    assert missing_mount(Path("/proc/tier"), fstab) == ""  # is mounted
    with fstab.open("a") as file:
        file.write("/dev/b " + str(place).replace(" ", "\\040") + " xfs defaults 0 2\n")
    assert missing_mount(place / "tier", fstab) == missing_mount(place, fstab) == str(place)
    assert missing_mount(tmp_path / "other", fstab) == ""
    assert missing_mount(place, tmp_path / "none") == ""


def test_what_the_daemon_says() -> None:
    def judged(**tier: object) -> tuple[Verdict, str]:
        finding = judge_daemon("/t", admin_pb2.StatusReply(tier=admin_pb2.TierStatus(**tier)))  # type: ignore[arg-type]
        return finding.verdict, finding.kind

    assert judged(url="/t", is_open=True) == (Verdict.GOOD, "")
    assert judged(url="/t") == (Verdict.GOOD, "")
    assert judged(url="/t", trouble="no bucket", trouble_kind="bucket") == (Verdict.BAD, "bucket")
    assert judged(url="/u") == (Verdict.BAD, "tier_daemon")
    assert judge_daemon("/t", admin_pb2.StatusReply()).kind == "tier_daemon"


def test_what_hangs_is_given_up() -> None:
    questions, end = Questions(give_up_s=0.05), threading.Event()
    with pytest.raises(UnavailableError) as error:
        questions.ask("listing", lambda: end.wait(30))
    assert error.value.kind == "store_slow" and "no answer in 0.05 s" in error.value.message
    assert questions.is_hanging
    end.set()
    assert questions.ask("another", lambda: 7) == 7


def test_a_request_is_given_up_in_seconds_and_never_later_than_configured() -> None:
    made = hurried(TierConfig())
    assert (made.connect, made.stall, made.deadline) == (2.5, 5.0, 5.0)
    patient = TierConfig(connect=0.5, stall=1.0, deadline=2.0)
    assert hurried(patient) == patient


# folders that are there


def test_nothing_is_said_without_a_tier(tmp_path: Path) -> None:
    assert findings_of("", tmp_path) == []


def test_a_url_that_is_none(tmp_path: Path) -> None:
    assert said(findings_of("gopher://x", tmp_path)) == [("tier", Verdict.BAD, "store")]


def test_a_missing_folder(tmp_path: Path) -> None:
    found = findings_of(str(tmp_path / "tier"), tmp_path)
    assert said(found)[1:] == [("tier folder", Verdict.BAD, "tier_folder")]
    assert not (tmp_path / "tier").exists()


def test_an_empty_folder_stays_empty(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    root.mkdir()
    found = findings_of(f"file://{root}", tmp_path)
    assert {finding.check: finding.kind for finding in found if finding.verdict is not Verdict.GOOD} == {
        "tier folder": "tier_empty"
    }
    assert [finding.check for finding in found][-3:] == ["tier commits", "tier checksums", "tier clock"]
    assert entries(root) == []


def test_a_tier_stays_as_it_is(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    assert store.create("jobs/a/x", b"1") is Created.OURS
    before = entries(tmp_path / "tier")
    found = findings_of(str(tmp_path / "tier"), tmp_path)
    assert {finding.verdict for finding in found} == {Verdict.GOOD}
    assert "has jobs" in next(f.found for f in found if f.check == "tier listing")
    assert entries(tmp_path / "tier") == before


def test_a_folder_that_can_only_be_read(tmp_path: Path) -> None:
    """Nobody can write into /sys, root neither."""
    found = findings_of("/sys/kernel", tmp_path)
    assert said(found)[-1] == ("tier commits", Verdict.WARNING, "store_read_only")
    assert all(finding.verdict is Verdict.GOOD for finding in found[:-1])


def test_a_file_system_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(tier_checks, "look_into", lambda _: end.wait(30))
    questions = Questions(give_up_s=0.05)
    found = tier_findings(TierConfig(shared=str(tmp_path)), tmp_path / "none", questions)
    assert said(found)[-1] == ("tier folder", Verdict.BAD, "store_slow") and questions.is_hanging
    end.set()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SNAPD_TIER_SHARED", str(tmp_path / "none"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    rows = {row["check"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 3
    assert rows["tier folder"]["kind"] == "tier_folder" and rows["tier folder"]["verdict"] == "BAD"
    assert rows["tier"]["kind"] is None
    assert "[tier_folder]" in CliRunner().invoke(app, ["doctor"]).stdout
