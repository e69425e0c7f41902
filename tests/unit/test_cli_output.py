"""Rows, JSON and texts of the commands: pure functions of the daemon's messages."""

from __future__ import annotations

import pytest
from snapd_proto import admin_pb2, format_pb2

from snapd.cli.ls import HEADINGS as LS_HEADINGS
from snapd.cli.ls import format_state, summary_json, summary_row
from snapd.cli.output import format_age, format_moment, format_ranks, table
from snapd.cli.shard_facts import Shard, range_chunks, shards_of
from snapd.cli.show import format_chunks, format_unchanged, range_rows, tensor_rows
from snapd.cli.show_json import shard_json
from snapd.cli.status import JOB_HEADINGS, SESSION_HEADINGS, daemon_facts, job_row, session_row, status_json
from snapd.cli.verify import BadChunk, Verdict, bad_chunk_line, verdict_json, verdict_lines
from tests.support.shard_builder import ShardBuilder


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (59.4, "59 s"),
        (61, "1 min"),
        (3600, "1 h"),
        (7 * 86400, "7 d"),
        (-3, "in the future"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


def test_moments_show_the_date_when_it_is_another_day() -> None:
    assert format_moment(0, 100) == ""
    assert format_moment(1_700_000_000, 1_700_000_030).endswith("(30 s ago)")
    assert format_moment(1_700_000_000, 1_700_000_030).count("-") == 0
    assert format_moment(1_700_000_000, 1_700_200_000).startswith("2023-11-1")


@pytest.mark.parametrize(
    ("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 3, 7], "0-3,7"), ([5, 1, 0, 4], "0-1,4-5")]
)
def test_runs_of_ranks(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


def test_columns_without_text_are_left_out_and_brackets_stay() -> None:
    made = table(("A", "B", "C"), [("[x]", "", "1"), ("y", "", "2")], right=("C",))
    assert [column.header for column in made.columns] == ["A", "C"]
    assert [cell.plain for cell in made.columns[0].cells] == ["[x]", "y"]  # type: ignore[union-attr]


def _summary(**more: object) -> admin_pb2.SnapshotSummary:
    facts = {
        "job": "j",
        "generation": 2,
        "step": 9,
        "world_size": 3,
        "ranks_captured": [0, 2],
        "nbytes": 3 << 20,
    }
    return admin_pb2.SnapshotSummary(**{**facts, **more})  # type: ignore[arg-type]


def test_a_snapshot_in_a_row_and_in_json() -> None:
    part = _summary(
        has_parent=True, parent_generation=1, parent_step=4, problem="rank 0 chunk 3: hash differs"
    )
    row = dict(zip(LS_HEADINGS, summary_row(part, 0.0), strict=True))
    assert row["STATE"] == "unusable" and row["PARENT"] == "1/4" and row["SIZE"] == "3 MiB"
    assert row["PROBLEM"] == "rank 0 chunk 3: hash differs" and row["VERIFIED"] == ""
    found = summary_json(part)
    assert found["parent"] == {"generation": 1, "step": 4} and found["ranks_captured"] == [0, 2]
    assert format_state(_summary()) == "only ranks 0,2"
    bad = _summary(complete=True, verified=True, problem="rank 0 chunk 3: hash differs")
    assert format_state(bad) == "unusable" and summary_json(bad)["verified"] is False
    whole = _summary(complete=True, verified=True)
    assert format_state(whole) == "complete"
    assert summary_json(whole)["parent"] is None and summary_json(whole)["problem"] is None


def test_a_snapshot_of_a_world_that_spans_nodes() -> None:
    part = _summary(is_clustered=True, level="protected", complete=True)
    row = dict(zip(LS_HEADINGS, summary_row(part, 0.0), strict=True))
    assert (row["STATE"], row["HERE"]) == ("protected", "0,2") and summary_json(part)["level"] == "protected"
    alone = dict(zip(LS_HEADINGS, summary_row(_summary(complete=True), 0.0), strict=True))
    assert (alone["STATE"], alone["HERE"]) == ("complete", "")


def test_status_in_rows_and_in_json() -> None:
    session = admin_pb2.SessionStatus(
        job="j", rank=1, world_size=2, generation=3, pid=77, state="attached", chunks_in_use=10,
        chunks_set_aside=4, skipped_steps=2, discarded_steps=1, last_window_s=0.0421,
    )  # fmt: skip
    job = admin_pb2.JobStatus(job="j", generation=3, arena_bytes=1 << 30, sessions=[session])
    reply = admin_pb2.StatusReply(
        version="1.2",
        pid=5,
        uptime_s=90,
        arena_bytes=1 << 30,
        arena_bytes_limit=2 << 30,
        arena_path="/a",
        jobs=[job],
    )
    row = dict(zip(SESSION_HEADINGS, session_row(session), strict=True))
    assert (row["RANK"], row["CAPTURED"], row["SET ASIDE"], row["WINDOW"]) == ("1/2", "none", "4", "42 ms")
    assert (row["SKIPPED"], row["DISCARDED"]) == ("2", "1")
    row = dict(zip(JOB_HEADINGS, job_row(job), strict=True))
    assert (row["COMPLETE"], row["ARENA"], row["TRAINERS"]) == ("none", "1 GiB", "1")
    assert daemon_facts(reply)["arena"] == "1 GiB of at most 2 GiB in /a"
    found = status_json(reply)["jobs"][0]  # type: ignore[index]
    assert found["complete"] is None and found["sessions"][0]["newest_captured_step"] is None
    job.has_complete, job.complete_step = True, 0
    session.has_captured = True
    assert session_row(session)[5] == "0" and "step 0" in job_row(job)[2]


def _shard() -> Shard:
    builder = ShardBuilder()
    builder.plain("base", "uint8", [8192], bytes(8192), "frozen")
    builder.plain("w", "float32", [2048], bytes(8192))
    wrapper = builder.layout.tensors.add(name="m", dtype="float32", shape=[8, 4], role="optimizer")
    wrapper.global_shape.extend([8, 4])
    wrapper.local_offset.extend([4, 0])
    wrapper.distributed.placements.append("S(0)")
    wrapper.subclass.components.add(attribute="_local_tensor", tensor=3)
    builder.plain("m._local_tensor", "float32", [4, 4], bytes(64))
    built = builder.build()
    for index, chunk in enumerate(built.record.chunks):
        if index in (2, 3):
            chunk.since_generation, chunk.since_step = 1, index
    references = [1] * len(built.record.chunks)
    references[2] = 2
    return Shard(record=built.record, references=references, layout=built.layout)


def test_show_rows() -> None:
    shard = _shard()
    assert range_rows(shard)[1] == ("frozen", "2-3", "8 KiB", "1 of 2", "all since steps 2 to 3")
    rows = {row[0]: row for row in tensor_rows(shard)}
    assert list(rows) == ["base", "w", "m"]
    assert rows["base"][8:] == ("2-3", "1 of 2", "all since steps 2 to 3")
    assert rows["w"][8:] == ("4-5", "", "")
    assert rows["m"][2:6] == ("4x4", "8x4 at 4,0", "S(0)", "optimizer")
    assert format_unchanged(shard, range(3, 6)) == "1 of 3 since step 3"
    assert format_chunks(range(3, 4)) == "3" and format_chunks(range(0)) == ""


def test_show_json() -> None:
    found = shard_json(_shard())
    chunks = found["chunks"]
    assert chunks[2]["references"] == 2 and chunks[2]["unchanged_since"] == {"generation": 1, "step": 2}  # type: ignore[index]
    assert (found["nbytes_shared"], found["nbytes_unchanged"]) == (4096, 8192)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}  # type: ignore[union-attr]
    assert tensors["base"]["chunks"] == [2, 3] and tensors["base"]["chunks_shared"] == 1


def test_reference_counts_come_one_shard_after_the_other() -> None:
    records = [
        format_pb2.ShardRecord(rank=rank, chunks=[format_pb2.Chunk()] * count)
        for rank, count in ((1, 2), (0, 3))
    ]
    reply = admin_pb2.GetSnapshotReply(shards=records, chunk_reference_counts=[1, 2, 3, 4, 5])
    first, second = shards_of(reply, {})
    assert (first.record.rank, list(first.references)) == (0, [3, 4, 5])
    assert (second.record.rank, list(second.references)) == (1, [1, 2])


def test_ranges_never_reach_beyond_the_shard() -> None:
    shard = _shard()
    assert range_chunks(shard, format_pb2.Range(shard_offset=1 << 30, nbytes=9)) == range(
        len(shard.references), len(shard.references)
    )


def test_verdicts() -> None:
    bad = BadChunk(rank=1, chunk=4, what="hash differs", contents=[f"t{i}" for i in range(10)])
    verdict = Verdict(job="j", generation=2, step=9, nbytes=1 << 20, bad=[bad])
    assert verdict_lines(verdict)[0] == "j generation 2 step 9: 1 MiB hashed, 1 bad chunk"
    assert bad_chunk_line(bad).endswith("t6, t7 and 2 more")
    assert "unknown" in bad_chunk_line(BadChunk(rank=0, chunk=0, what="x", contents=[]))
    gone = Verdict(job="j", generation=2, step=9, nbytes=0, is_gone=True)
    assert "given up meanwhile" in verdict_lines(gone)[0]
    assert verdict_json(verdict)["bad_chunks"][0]["contents"] == bad.contents  # type: ignore[index]
    assert verdict_lines(Verdict(job="j", generation=1, step=1, nbytes=0))[0].endswith("all good")


def test_verdicts_of_what_other_nodes_brought_back() -> None:
    bad = BadChunk(rank=1, chunk=4, what="hash differs", contents=["w"])
    mended = Verdict(
        job="j", generation=2, step=9, nbytes=1 << 20, repaired=[bad], source="other nodes", fragments=(8, 1)
    )
    lines = verdict_lines(mended)
    assert lines[0].endswith("1 MiB hashed, 1 bad chunk brought back from other nodes")
    assert "rank 1 chunk 4" in lines[1] and lines[2].endswith("1 bad, forgotten and coded again")
    waiting = Verdict(job="j", generation=2, step=9, nbytes=0, bad=[bad], why="n2 is away", is_waiting=True)
    assert verdict_lines(waiting)[-1] == "  not yet brought back: n2 is away"
    found = verdict_json(mended)
    assert [chunk["chunk"] for chunk in found["repaired_chunks"]] == [4] and not found["bad_chunks"]  # type: ignore[union-attr,attr-defined]
