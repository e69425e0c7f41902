"""Keys and records of the cluster, and when a store is believed: pure, so in tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snapd.coordination import job_records
from snapd.coordination.job_records import Newest
from snapd.core import membership
from snapd.core.cluster import Code, Group, GroupTable
from snapd.core.generations import Generation
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.core.keyspace import Keyspace
from snapd.core.membership import Announcement, ClusterView, Highwater, Known, judge
from snapd.errors import ConfigError, RemoteProtocolError
from tests.support.clusters import member

KEYS = Keyspace("c")


def table(epoch: int, *nodes: str) -> GroupTable:
    return GroupTable(epoch, Code(1, 1), (Group(0, nodes or ("a", "b"), Code(1, 1)),), "why")


def view(cluster_id: str = "id", now: GroupTable | None = None, **floors: int) -> ClusterView:
    made = ClusterView(KEYS)
    made.apply(KEYS.id, cluster_id.encode(), 1)
    if floors:
        made.apply(KEYS.floors, membership.to_json(floors), 1)
    if now is not None:
        made.apply(KEYS.groups, membership.table_to_json(now), 1)
    return made


SEEN = Highwater("id", table(5), {"job": 3})


@pytest.mark.parametrize(
    ("seen", "now", "not_below", "is_trusted", "reason"),
    [
        (Highwater(), view(), 0, True, "as it was seen"),
        (Highwater(), view(now=table(9)), 0, True, "newer"),
        (SEEN, view(now=table(5)), 0, True, "as it was seen"),
        (SEEN, view(now=table(6)), 0, True, "newer"),
        (SEEN, view(now=table(4)), 0, False, "gone back to epoch 4; epoch 5 was seen"),
        (SEEN, view(), 0, False, "gone back to epoch 0"),
        (SEEN, view(now=table(5, "b", "a")), 0, False, "another table of epoch 5"),
        (SEEN, view("other"), 0, False, "begun anew"),
        (SEEN, view("other", table(5)), 0, False, "begun anew"),
        (SEEN, view("other", table(6)), 0, False, "too little of job 'job'"),
        (SEEN, view("other", table(6), job=2), 0, False, "too little of job 'job'"),
        (SEEN, view("other", table(6), job=3), 0, True, "newer"),
        (SEEN, view(now=table(5)), 5, False, "gone back at epoch 5"),
        (SEEN, view(now=table(6)), 6, False, "gone back at epoch 6"),
        (SEEN, view(now=table(7)), 6, True, "newer"),
        (Highwater("id"), view("other"), 0, False, "begun anew"),
        (Highwater("id"), view("other", table(1)), 0, True, "newer"),
    ],
)
def test_when_a_store_is_believed(
    seen: Highwater, now: ClusterView, not_below: int, is_trusted: bool, reason: str
) -> None:
    verdict = judge(seen, now, not_below=not_below)
    assert verdict.is_trusted is is_trusted
    assert reason in verdict.reason


def test_a_highwater_mark_never_falls() -> None:
    raised = membership.with_generation(SEEN, "job", 8)
    assert raised.generations == {"job": 8}
    assert membership.with_generation(raised, "job", 4) is raised
    assert membership.with_generation(raised, "other", 1).generations == {"job": 8, "other": 1}


def test_doubts_raise_the_floors_and_the_epoch() -> None:
    now = view(now=table(5), job=2, old=9)
    for node, needs, generations in (("a", 0, {}), ("b", 7, {"job": 4, "old": 3}), ("c", 6, {"new": 1})):
        announcement = Announcement(member(node), needs, generations)
        now.apply(KEYS.member(node), membership.announcement_to_json(announcement), 1)
    assert now.needs_epoch_above == 7
    assert now.floors_wanted() == {"job": 4, "old": 9, "new": 1}
    now.apply(KEYS.member("b"), None, 0)
    assert now.needs_epoch_above == 6 and now.version(KEYS.member("b")) == 0


def test_records_come_back_as_they_were() -> None:
    announcement = Announcement(member("a"), 3, {"job": 4})
    for one in (announcement, Announcement(member("b"))):
        assert membership.announcement_from_json(membership.announcement_to_json(one)) == one
    known = Known("a", "h", "d", "arena")
    assert membership.known_from_json(membership.known_to_json(known)) == known
    full = GroupTable(
        3, Code(6, 2), (Group(0, ("a",), None), Group(4, ("b", "c"), Code(1, 1))), "why", "less"
    )
    assert membership.table_from_json(membership.table_to_json(full)) == full
    rows = [Generation(2, "x", 0, 4), Generation(3, "x", 1, 4, SnapshotId(2, 17))]
    kept = job_records.bounded(rows)
    assert job_records.generations_from_json(job_records.generations_to_json(kept)) == kept
    whole = Newest(SnapshotId(1, 2), SnapshotId(1, 1), 3, 2, 1, Interval(5, 4, 80, 3))
    for newest in (Newest(SnapshotId(1, 2), None, 3), Newest(None, None, 0), whole):
        assert job_records.newest_from_json(job_records.newest_to_json(newest)) == newest
    of_a_version_before = b'{"complete":{"generation":1,"step":2},"protected":null,"epoch":3}'
    assert job_records.newest_from_json(of_a_version_before) == Newest(SnapshotId(1, 2), None, 3)


READERS: list[Callable[[bytes], object]] = [
    membership.announcement_from_json,
    membership.known_from_json,
    membership.table_from_json,
    membership.highwater_from_json,
    job_records.generations_from_json,
    job_records.newest_from_json,
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\xfe", b"{", b"null", b"1", b'"x"', b"[1]", b"[[1,2]]", b'{"member": 1}',
     b'{"epoch": -1, "groups": []}',
     b'{"epoch": 1, "groups": [[0, "9+9+9", []]], "asked": "1+1"}', b'{"epoch": 1, "groups": [1]}', b"[" * 100_000,
     b'{"member": {"node": "a"}}', b'{"cluster_id": "a", "table": 3}', b'{"epoch": true, "groups": [], "asked": "1+1"}',
     b'{"epoch": 1, "asked": "1+1", "groups": [[0, null, ["a", "a"]]]}',
     b'{"complete": 1, "protected": 2, "epoch": 3}',
     b'{"complete": null, "protected": null, "epoch": 3, "interval": [1, 0, 0, 0]}',
     b'{"complete": null, "protected": null, "epoch": 3, "interval": [1, 2]}'],
)  # fmt: skip
def test_garbage_is_refused_by_name(reader: Callable[[bytes], object], garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as error:
        reader(garbage)
    assert error.value.kind == "record"


def test_a_garbled_value_counts_as_absent_and_is_named() -> None:
    now = view(now=table(5))
    now.apply(KEYS.member("a"), b"garbage", 1)
    now.apply(KEYS.groups, b"garbage", 2)
    assert now.members == {} and now.table is None
    assert sorted(now.problems) == [KEYS.groups, KEYS.member("a")]
    now.apply(KEYS.groups, membership.table_to_json(table(6)), 3)
    assert now.table == table(6) and list(now.problems) == [KEYS.member("a")]


def test_a_member_under_anothers_key_counts_for_nothing() -> None:
    now = view()
    now.apply(KEYS.member("a"), membership.announcement_to_json(Announcement(member("b"))), 1)
    assert now.members == {} and "another's key" in now.problems[KEYS.member("a")]


@pytest.mark.parametrize("name", ["", "a/b", "-x", "x" * 65, "a b", "ä"])
def test_bad_cluster_names(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        Keyspace(name)
    assert error.value.kind == "cluster_name"


def test_generations_are_bounded_and_merged() -> None:
    rows = job_records.bounded(Generation(i, f"i{i}", 0, 1) for i in range(1, 200))
    assert len(rows) == job_records.GENERATIONS_KEPT and job_records.newest_number(rows) == 199
    stored = job_records.bounded([Generation(1, "a", 0, 1), Generation(2, "b", 0, 1)])
    known = job_records.bounded([Generation(2, "other", 0, 1), Generation(3, "c", 0, 1)])
    assert [row.incarnation for row in job_records.merged(stored, known).values()] == ["a", "b", "c"]
