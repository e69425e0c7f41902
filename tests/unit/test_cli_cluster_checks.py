"""What `snapd doctor` says of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from snapd_proto import admin_pb2

from snapd.cli.checks import Verdict
from snapd.cli.cluster_checks import cluster_findings, judge_cluster
from snapd.config_cluster import ClusterConfig


def node(name: str, domain: str, *, is_silent: bool = False) -> admin_pb2.NodeRow:
    trouble = "does not answer: refused" if is_silent else ""
    return admin_pb2.NodeRow(
        node=name, state="living", domain=domain, answered=not is_silent, trouble=trouble
    )


def healthy() -> admin_pb2.ClusterStatus:
    return admin_pb2.ClusterStatus(
        cluster_id="c1",
        epoch=3,
        groups=[admin_pb2.GroupRow(number=0, nodes=["a", "b", "c"], code="2+1")],
        nodes=[node("a", "r1"), node("b", "r2"), node("c", "r3")],
    )


def verdicts(status: admin_pb2.ClusterStatus) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in judge_cluster(status)}


def test_a_healthy_cluster() -> None:
    assert set(verdicts(healthy()).values()) == {Verdict.GOOD}


@pytest.mark.parametrize(
    ("change", "check", "verdict", "words"),
    [
        ({"distrust": "the store was begun anew"}, "coordinator", Verdict.BAD, "begun anew"),
        (
            {"is_away": True, "away_s": 12, "away_reason": "refused"},
            "coordinator",
            Verdict.BAD,
            "12 s: refused",
        ),
        ({"degraded": "asked 6+2, 3 nodes allow 2+1"}, "protection", Verdict.WARNING, "allow 2+1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], check: str, verdict: Verdict, words: str) -> None:
    status = healthy()
    for name, value in change.items():
        setattr(status, name, value)
    found = next(finding for finding in judge_cluster(status) if finding.check == check)
    assert found.verdict is verdict and words in found.found and found.hint


def test_a_silent_peer_and_a_single_domain_are_named() -> None:
    status = healthy()
    del status.nodes[:]
    status.nodes.extend([node("a", "r1"), node("b", "r1", is_silent=True)])
    found = {finding.check: finding for finding in judge_cluster(status)}
    assert found["peers"].verdict is Verdict.BAD and "b: does not answer" in found["peers"].found
    assert found["failure domains"].verdict is Verdict.WARNING and "only r1" in found["failure domains"].found


def test_settings_are_judged_before_anything_is_asked(tmp_path: Path) -> None:
    assert cluster_findings(ClusterConfig(), tmp_path) == []
    [bad] = cluster_findings(ClusterConfig(coordinator="leader", code="6-2"), tmp_path)
    assert bad.verdict is Verdict.BAD and "bad code" in bad.found
    [plain] = cluster_findings(ClusterConfig(coordinator="leader", listen="127.0.0.1:7421"), tmp_path)
    assert plain.check == "certificate" and plain.verdict is Verdict.WARNING
    files = {"cert": str(tmp_path / "no.crt"), "key": str(tmp_path / "no.key"), "ca": str(tmp_path / "no.ca")}
    [missing] = cluster_findings(
        ClusterConfig(coordinator="leader", listen="127.0.0.1:7421", **files), tmp_path
    )
    assert missing.verdict is Verdict.BAD and "no.crt" in missing.found
