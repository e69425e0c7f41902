"""`snapd gc`, `pin` and `unpin` straight on a tier in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from snapd.cli.main import app
from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys
from tests.support.tier_audit import audit
from tests.unit.test_tier_collecting import Tier

KEYS = TierKeys("job")


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    for name in ("SNAPD_JOB", "SNAPD_TIER_SHARED", "SNAPD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SNAPD_RUNTIME_DIR", str(tmp_path / "run"))
    made = Tier(tmp_path / "tier")
    for step in (1, 2, 3):
        made.commit(step)
    made.pass_time(8000)
    return made


def run(tier: Tier, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--from", str(tier.root)])
    assert result.exit_code == code, result.output
    return result.output


def as_json(tier: Tier, *arguments: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(tier, *arguments, "--json", code=code))
    return found


def test_a_dry_run_says_what_stays_and_why(tier: Tier) -> None:
    before = tier.keys()
    text = run(tier, "gc", "--dry-run", "--keep-last", "1")
    assert "one of the last 1" in text and "not kept by the last 1" in text and "would be condemned" in text
    found = as_json(tier, "gc", "--dry-run", "--keep-last", "1")
    assert [(s["step"], s["is_kept"]) for s in found["snapshots"]] == [(3, True), (2, False), (1, False)]
    assert tier.keys() == before


def test_it_condemns_first_and_deletes_a_round_later(tier: Tier) -> None:
    first = as_json(tier, "gc", "--keep-last", "1")
    assert first["condemned"] and not first["deleted"] and first["next_s"] > 3500
    assert not as_json(tier, "gc", "--keep-last", "1")["deleted"]
    tier.pass_time(3700)
    second = as_json(tier, "gc", "--keep-last", "1")
    assert {item["key"] for item in second["deleted"]} >= {item["key"] for item in first["condemned"]}
    assert {snapshot.step for snapshot in audit(tier.store, "job")} == {3}


def _id(step: int) -> SnapshotId:
    return SnapshotId(1, step)


def test_the_settings_are_not_meant_for_another_tier(tier: Tier) -> None:
    before = tier.keys()
    run(tier, "gc", code=2)
    assert tier.keys() == before
    run(tier, "gc", "--dry-run")


def test_a_pin_keeps_until_it_is_taken_away(tier: Tier) -> None:
    assert "is pinned as best" in run(tier, "pin", "best", "--step", "1")
    found = as_json(tier, "gc", "--keep-last", "1")
    kept = {s["step"]: s["reason"] for s in found["snapshots"] if s["is_kept"]}
    assert set(kept) == {1, 3} and "pinned as best" in kept[1]
    run(tier, "unpin", "best")
    assert {s["step"] for s in as_json(tier, "gc", "--keep-last", "1")["snapshots"] if s["is_kept"]} == {3}
    run(tier, "unpin", "best", code=1)


def test_pins_that_cannot_be(tier: Tier) -> None:
    run(tier, "pin", "best", "--step", "77", code=1)
    run(tier, "pin", "../x", "--step", "1", code=2)
    assert not list(tier.store.list(KEYS.pins))


def test_a_pin_of_what_is_condemned_is_refused_and_counts_if_it_is_in_time(tier: Tier) -> None:
    as_json(tier, "gc", "--keep-last", "1")
    result = CliRunner().invoke(app, ["pin", "best", "--step", "1", "--from", str(tier.root)])
    assert result.exit_code != 0 and "pin_condemned" in result.output
    tier.pass_time(3700)
    deleted = {item["key"] for item in as_json(tier, "gc", "--keep-last", "1")["deleted"]}
    assert KEYS.snapshot(_id(2)) in deleted and KEYS.snapshot(_id(1)) not in deleted


def test_what_cannot_be_judged_has_an_exit_code_of_its_own(tier: Tier) -> None:
    for key in (KEYS.snapshot(_id(3)), KEYS.shard(_id(3), 0)):
        path = tier.root / key
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
    found = as_json(tier, "gc", "--keep-last", "1", code=3)
    assert any("no pack is judged" in problem for problem in found["problems"])
