"""A tier that cannot be used is told before any job wants it: by `snapd doctor`, and by the daemon that starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.cli.checks import Finding, Verdict
from snapd.cli.status import daemon_facts, status_json
from snapd.cli.tier_checks import Questions, tier_findings
from snapd.config_tiers import TierConfig
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.seaweed import BUCKET, READ_ONLY_KEY, READ_ONLY_SECRET, Seaweed, running
from tests.support.waiting import wait_for

NOWHERE = "http://127.0.0.1:1"
WITHIN_S = 15.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running(tmp_path_factory.mktemp("weed")) as made:
        yield made


def looked(endpoint: str, tmp_path: Path, *, bucket: str = BUCKET) -> list[Finding]:
    config = TierConfig(shared=f"s3://{bucket}/doctor", endpoint=endpoint)
    return tier_findings(config, tmp_path / "none", Questions())


def last(found: list[Finding]) -> tuple[str, Verdict, str]:
    return found[-1].check, found[-1].verdict, found[-1].kind


# doctor


def test_a_good_bucket_is_left_as_it_was(server: Seaweed, tmp_path: Path) -> None:
    found = looked(server.endpoint, tmp_path)
    assert [finding.check for finding in found] == [
        "tier",
        "tier listing",
        "tier commits",
        "tier checksums",
        "tier clock",
    ]
    assert {finding.verdict for finding in found} == {Verdict.GOOD}
    store = server.store("doctor")
    assert list(store.list("")) == [] and list(store.unfinished()) == []
    store.close()


@pytest.mark.parametrize(
    ("key", "secret", "expected"),
    [
        ("AKNOBODY", "wrong-secret-1234", ("tier listing", Verdict.BAD, "store_credentials")),
        (READ_ONLY_KEY, READ_ONLY_SECRET, ("tier commits", Verdict.WARNING, "store_read_only")),
    ],
)
def test_credentials(
    server: Seaweed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    secret: str,
    expected: tuple[str, Verdict, str],
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    found = looked(server.endpoint, tmp_path)
    assert last(found) == expected
    assert not any(secret in finding.found + finding.hint for finding in found)


def test_a_missing_bucket(server: Seaweed, tmp_path: Path) -> None:
    assert last(looked(server.endpoint, tmp_path, bucket="nobodys")) == (
        "tier listing",
        Verdict.BAD,
        "bucket",
    )


def test_an_endpoint_where_nobody_listens(
    server: Seaweed,  # for its credentials
    tmp_path: Path,
) -> None:
    found = looked(NOWHERE, tmp_path)
    assert last(found) == ("tier listing", Verdict.BAD, "store_unreachable")
    assert "in 5 s" in found[-1].found


def test_a_server_that_does_not_speak_tls(server: Seaweed, tmp_path: Path) -> None:
    found = looked(server.endpoint.replace("http:", "https:"), tmp_path)
    assert last(found) == ("tier listing", Verdict.BAD, "store_tls")


def test_a_server_that_hangs(server: Seaweed, tmp_path: Path) -> None:
    server.hang()
    try:
        found = looked(server.endpoint, tmp_path)
    finally:
        server.go_on()
    assert last(found) == ("tier listing", Verdict.BAD, "store_slow")


# the daemon


def unusable(daemon: DaemonProcess) -> list[str]:
    return [event["kind"] for event in daemon.events("tier.unusable")]


def test_a_missing_folder_is_told_at_once_and_taken_when_it_is_there(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    with daemon_folders(SNAPD_TIER_SHARED=str(root)) as daemon:
        daemon.start()
        wait_for(lambda: daemon.status().tier.trouble, "the status says so", WITHIN_S)
        reply = daemon.status()
        assert reply.tier.trouble_kind == "bucket" and not reply.jobs
        assert f"CANNOT BE OPENED: the folder {root} is missing" in daemon_facts(reply)["tier"]
        shown = status_json(reply)["tier"]
        assert isinstance(shown, dict) and shown["trouble"]["kind"] == "bucket"
        time.sleep(1.0)  # it is tried again meanwhile, and not told again
        assert unusable(daemon) == ["bucket"]
        root.mkdir()
        wait_for(lambda: daemon.status().tier.is_open, "it is opened", WITHIN_S)
        assert not daemon.status().tier.trouble and len(daemon.events("tier.opened")) == 1
        assert daemon.stop() == 0


def test_a_server_that_does_not_answer_is_told_in_seconds_and_does_not_delay(server: Seaweed) -> None:
    settings = {"SNAPD_TIER_SHARED": f"s3://{BUCKET}/away", "SNAPD_TIER_ENDPOINT": NOWHERE}
    with daemon_folders(**settings) as daemon:
        daemon.start()
        assert daemon.events("daemon.started") and not daemon.events("tier.unusable")
        wait_for(lambda: unusable(daemon) == ["store_unreachable"], "the log says so", WITHIN_S)
        assert daemon.status().tier.trouble_kind == "store_unreachable"
        assert daemon.stop() == 0
        assert not daemon.events("daemon.killed")


def test_wrong_credentials_are_told_at_the_start(server: Seaweed) -> None:
    settings = {
        "SNAPD_TIER_SHARED": f"s3://{BUCKET}/refused",
        "SNAPD_TIER_ENDPOINT": server.endpoint,
        "AWS_ACCESS_KEY_ID": READ_ONLY_KEY,
        "AWS_SECRET_ACCESS_KEY": READ_ONLY_SECRET,
    }
    with daemon_folders(**settings) as daemon:
        daemon.start()
        wait_for(lambda: unusable(daemon) == ["store_denied"], "the log says so", WITHIN_S)
