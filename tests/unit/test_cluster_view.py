"""`snapd status` over a cluster, as text and as JSON."""

from __future__ import annotations

import io
import json

from rich.console import Console
from snapd_proto import admin_pb2

from snapd.cli.cluster_view import cluster_json, cluster_parts, protection_json
from snapd.cli.output import print_parts
from snapd.cli.status import job_json, status_json

MIB = 1 << 20


def reply(**cluster: object) -> admin_pb2.StatusReply:
    facts: dict[str, object] = {
        "node": "a",
        "cluster_id": "c1",
        "epoch": 7,
        "asked_code": "2+1",
        "reason": "3 nodes",
        "groups": [admin_pb2.GroupRow(number=0, nodes=["a", "b", "c"], code="2+1")],
        "nodes": [
            admin_pb2.NodeRow(
                node="a", state="living", domain="r1", host="h1", address="h1:7421", version="0.1", group=0,
                answered=True, arena_bytes=3 * MIB, parity_bytes=2 * MIB, sent_bytes=MIB, received_bytes=5 * MIB,
                exposure_byte_s=1.5,
            ),
            admin_pb2.NodeRow(
                node="b", state="living", domain="r2", host="h2", address="h2:7421", version="0.1", group=0,
                trouble="does not answer: refused",
            ),
            admin_pb2.NodeRow(node="d", state="lost", group=-1, absent_s=61),
        ],
    }  # fmt: skip
    facts.update(cluster)
    return admin_pb2.StatusReply(cluster=admin_pb2.ClusterStatus(**facts), jobs=[job(), alone()])


def job(**facts: object) -> admin_pb2.JobStatus:
    return admin_pb2.JobStatus(
        job="gpt", is_clustered=True, generation=2, collector="b", protection="being protected",
        parity_bytes=2 * MIB, has_complete=True, complete_generation=2, complete_step=40, has_protected=True,
        protected_generation=1, protected_step=39, **facts,
    )  # fmt: skip


def alone() -> admin_pb2.JobStatus:
    return admin_pb2.JobStatus(job="other", generation=1)


def printed(parts: list[object]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=220, color_system=None)
    for part in parts:
        console.print(part)
    return out.getvalue()


def test_a_machine_alone_says_nothing_of_a_cluster() -> None:
    alone_reply = admin_pb2.StatusReply(jobs=[alone()])
    assert cluster_parts(alone_reply) == []
    assert status_json(alone_reply)["cluster"] is None
    assert "protected" not in job_json(alone_reply.jobs[0])


def test_the_text_names_nodes_groups_and_what_is_protected() -> None:
    text = printed(list(cluster_parts(reply())))
    lines = [line for line in text.splitlines() if line.strip()]
    assert any("c1, epoch 7, node a" in line for line in lines)
    assert any("asked 2+1, 1 groups with 2+1" in line or "asked 2+1, 1 group" in line for line in lines)
    row = next(line for line in lines if line.lstrip().startswith("a*"))
    assert all(word in row for word in ("living", "r1", "3 MiB", "2 MiB", "5 MiB"))
    silent = next(line for line in lines if line.lstrip().startswith("b "))
    assert "does not answer: refused" in silent
    assert "MiB" not in silent, "sizes that nobody has told are left out"
    lost = next(line for line in lines if line.lstrip().startswith("d "))
    assert "lost 1 min" in lost
    assert "none" in lost
    protected = next(line for line in lines if line.lstrip().startswith("gpt"))
    assert "step 40 (generation 2)" in protected
    assert "step 39 (generation 1)" in protected
    assert not any(line.lstrip().startswith("other") for line in lines)


def test_a_broken_promise_and_an_absent_store_are_said() -> None:
    text = printed(
        list(
            cluster_parts(
                reply(degraded="2 nodes are too few", is_away=True, away_s=12, away_reason="refused")
            )
        )
    )
    assert "DEGRADED" in text
    assert "2 nodes are too few" in text
    assert "refused" in text
    assert "away for" in text
    whole = printed(list(cluster_parts(reply())))
    assert "DEGRADED" not in whole
    assert "not believed" not in whole
    assert "not believed" in printed(list(cluster_parts(reply(distrust="the store was wiped"))))


def test_the_json_has_everything_with_units_of_bytes_and_seconds() -> None:
    found = json.loads(json.dumps(cluster_json(reply(degraded="too few").cluster)))
    assert found["groups"] == [{"number": 0, "nodes": ["a", "b", "c"], "code": "2+1"}]
    assert (found["epoch"], found["degraded"], found["distrust"], found["away_reason"]) == (
        7,
        "too few",
        None,
        None,
    )
    told, silent, lost = found["nodes"]
    assert (told["arena_bytes"], told["parity_bytes"], told["exposure_byte_s"]) == (3 * MIB, 2 * MIB, 1.5)
    assert "arena_bytes" not in silent
    assert (silent["answered"], silent["trouble"]) == (False, "does not answer: refused")
    assert (lost["group"], lost["absent_s"], lost["state"]) == (None, 61, "lost")


def test_the_json_of_a_job_says_what_is_protected() -> None:
    found = protection_json(job(has_target=True, target_generation=2, target_step=40))
    assert found["protected"] == {"generation": 1, "step": 39}
    assert found["target"] == {"generation": 2, "step": 40}
    assert protection_json(admin_pb2.JobStatus(job="x"))["protected"] is None
    assert protection_json(admin_pb2.JobStatus(job="x"))["collector"] is None
    assert job_json(job())["protection"] == "being protected"


def test_all_parts_can_be_printed(capsys: object) -> None:
    print_parts(*cluster_parts(reply()))
