"""What the cluster's keys say, as data; when a store may be believed; when a member counts as lost.

Pure: fed with keys and values by `coordination/cluster.py`. A value that cannot be read counts as absent and is named
in `problems`; it never stops anybody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from snapd.core.cluster import Code, Group, GroupTable, Member
from snapd.core.keyspace import Keyspace
from snapd.errors import ConfigError, RemoteProtocolError

PROBLEMS_MAX = 16


@dataclass(frozen=True, slots=True)
class Announcement:
    """A member, and what it has seen of the past.

    `needs_epoch_above`: it distrusts the store up to this epoch (0: it has no doubts). `generations`: per job, the
    highest generation that it has seen, told while it distrusts.
    """

    member: Member
    needs_epoch_above: int = 0
    generations: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """A node that was a member once."""

    node: str
    host: str
    domain: str
    arena_id: str


@dataclass(frozen=True, slots=True)
class Highwater:
    """The farthest that a daemon has ever seen: it never believes a store that knows less."""

    cluster_id: str = ""
    table: GroupTable | None = None
    generations: Mapping[str, int] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        return self.table.epoch if self.table else 0


@dataclass(frozen=True, slots=True)
class Verdict:
    is_trusted: bool
    reason: str


class ClusterView:
    """The keys below `cluster/`, decoded. Fed in the order in which they changed."""

    def __init__(self, keys: Keyspace) -> None:
        self._keys = keys
        self.cluster_id = ""
        self.table: GroupTable | None = None
        self.epoch_version = 0
        self.floors: dict[str, int] = {}
        self.planner = ""
        self.members: dict[str, Announcement] = {}
        self.known: dict[str, Known] = {}
        self.drains: set[str] = set()
        self.hosts: dict[str, str] = {}
        self.versions: dict[str, int] = {}
        self.problems: dict[str, str] = {}

    def apply(self, key: str, value: bytes | None, version: int) -> None:
        """Take up one key. `value` None: it is gone."""
        self.versions[key] = version if value is not None else 0
        self.problems.pop(key, None)
        try:
            self._apply(key, value, self.versions[key])
        except RemoteProtocolError as error:
            if len(self.problems) < PROBLEMS_MAX:
                self.problems[key] = str(error)
        if value is None:
            del self.versions[key]

    def version(self, key: str) -> int:
        """0: absent."""
        return self.versions.get(key, 0)

    def _apply(self, key: str, value: bytes | None, version: int) -> None:
        keys = self._keys
        if key == keys.id:
            self.cluster_id = value.decode("ascii", "replace") if value else ""
        elif key == keys.epoch:
            self.epoch_version = version
        elif key == keys.groups:
            self.table = None
            self.table = table_from_json(value) if value else None
        elif key == keys.floors:
            self.floors = {}
            self.floors = _counts(_object(value)) if value else {}
        elif key == keys.planner:
            self.planner = value.decode("ascii", "replace") if value else ""
        else:
            self._apply_node(key, value)

    def _apply_node(self, key: str, value: bytes | None) -> None:
        kind, _, name = key.removeprefix(self._keys.cluster).partition("/")
        if kind == "members":
            self.members.pop(name, None)
            if value:
                announcement = announcement_from_json(value)
                _require(announcement.member.node == name, "a member under another's key")
                self.members[name] = announcement
        elif kind == "known":
            self.known.pop(name, None)
            if value:
                self.known[name] = known_from_json(value)
        elif kind == "drains":
            (self.drains.add if value is not None else self.drains.discard)(name)
        elif kind == "hosts":
            self.hosts.pop(name, None)
            if value:
                self.hosts[name] = value.decode("ascii", "replace")

    @property
    def needs_epoch_above(self) -> int:
        """The next table's epoch must be above this, for some living member; 0 if nobody doubts."""
        return max((each.needs_epoch_above for each in self.members.values()), default=0)

    def floors_wanted(self) -> dict[str, int]:
        """The floors as they stand, raised to what members that doubt have seen."""
        wanted = dict(self.floors)
        for each in self.members.values():
            if each.needs_epoch_above:
                for job, number in each.generations.items():
                    wanted[job] = max(number, wanted.get(job, 0))
        return wanted


def judge(seen: Highwater, view: ClusterView, *, not_below: int) -> Verdict:
    """Whether a daemon that has seen `seen` may believe what the store says now.

    `not_below`: doubts that came up besides (revisions or generations that went back) hold until the epoch is above.
    """
    epoch = view.table.epoch if view.table else 0
    if epoch > max(seen.epoch, not_below):
        behind = [job for job, number in seen.generations.items() if view.floors.get(job, 0) < number]
        if seen.cluster_id and view.cluster_id != seen.cluster_id and behind:
            return Verdict(
                False, f"the store was begun anew, and its table knows too little of job {behind[0]!r}"
            )
        return Verdict(True, "its table is newer than all that was seen")
    if seen.cluster_id and view.cluster_id != seen.cluster_id:
        return Verdict(
            False, f"the store was begun anew (cluster {seen.cluster_id} is now {view.cluster_id})"
        )
    if epoch < seen.epoch:
        return Verdict(False, f"the store has gone back to epoch {epoch}; epoch {seen.epoch} was seen")
    if not_below and epoch <= not_below:
        return Verdict(False, f"the store has gone back at epoch {epoch}")
    if seen.table is not None and view.table != seen.table:
        return Verdict(False, f"the store has another table of epoch {epoch} than was seen")
    return Verdict(True, "as it was seen")


def advanced(seen: Highwater, view: ClusterView) -> Highwater:
    """What has been seen once `view` is believed."""
    return Highwater(view.cluster_id, view.table, seen.generations)


def with_generation(seen: Highwater, job: str, number: int) -> Highwater:
    """Raise one job's generation; never lowers it."""
    if seen.generations.get(job, 0) >= number:
        return seen
    return Highwater(seen.cluster_id, seen.table, {**seen.generations, job: number})


def announcement_to_json(announcement: Announcement) -> bytes:
    body: dict[str, Any] = {"member": asdict(announcement.member)}
    if announcement.needs_epoch_above:
        body |= {
            "needs_epoch_above": announcement.needs_epoch_above,
            "generations": dict(announcement.generations),
        }
    return to_json(body)


def announcement_from_json(value: bytes) -> Announcement:
    """Raise RemoteProtocolError for anything else."""
    body = _object(value)
    member, needs = body.get("member"), body.get("needs_epoch_above", 0)
    _require(_is_count(needs), "a doubt that is no epoch")
    return Announcement(member_from_fields(member), needs, _counts(body.get("generations", {})))


def member_from_fields(fields: object) -> Member:
    """Unknown fields are left out: a newer neighbour may send more."""
    _require(isinstance(fields, dict), "a member without its facts")
    assert isinstance(fields, dict)
    texts = ("node", "host", "domain", "address", "bulk_address", "arena_id", "version")
    _require(all(isinstance(fields.get(name), str) for name in texts), "a member lacks a field")
    return Member(
        **{name: fields[name] for name in texts}, is_draining=bool(fields.get("is_draining", False))
    )


def known_to_json(known: Known) -> bytes:
    return to_json(asdict(known))


def known_from_json(value: bytes) -> Known:
    body = _object(value)
    names = ("node", "host", "domain", "arena_id")
    _require(all(isinstance(body.get(name), str) for name in names), "a known node lacks a field")
    return Known(*(body[name] for name in names))


def table_to_fields(table: GroupTable) -> dict[str, Any]:
    return {
        "epoch": table.epoch,
        "asked": str(table.asked),
        "groups": [
            [group.number, str(group.code) if group.code else None, list(group.nodes)]
            for group in table.groups
        ],
        "reason": table.reason,
        "degraded": table.degraded,
    }


def table_to_json(table: GroupTable) -> bytes:
    return to_json(table_to_fields(table))


def table_from_json(value: bytes) -> GroupTable:
    """Raise RemoteProtocolError for anything else."""
    return table_from_fields(_object(value))


def table_from_fields(body: Mapping[str, Any]) -> GroupTable:
    _require(_is_count(body.get("epoch")) and isinstance(body.get("groups"), list), "not a group table")
    try:
        groups = tuple(_group(row) for row in body["groups"])
        asked = Code.parse(str(body.get("asked")))
    except ConfigError as error:
        raise RemoteProtocolError(f"a group table with a {error.message}", kind="record") from error
    nodes = [node for group in groups for node in group.nodes]
    _require(len(set(nodes)) == len(nodes), "a group table names a node twice")
    return GroupTable(
        body["epoch"], asked, groups, str(body.get("reason", "")), str(body.get("degraded", ""))
    )


def _group(row: object) -> Group:
    _require(isinstance(row, list) and len(row) == 3, "not a group")
    assert isinstance(row, list)
    number, code, nodes = row
    _require(_is_count(number) and isinstance(nodes, list), "not a group")
    _require(all(isinstance(node, str) for node in nodes), "not a group")
    parsed = Code.parse(code) if isinstance(code, str) else None
    _require(parsed is None or parsed.size == len(nodes), "a group that its code does not fit")
    return Group(number, tuple(nodes), parsed)


def highwater_to_json(seen: Highwater) -> bytes:
    table = table_to_fields(seen.table) if seen.table else None
    return to_json(
        {"cluster_id": seen.cluster_id, "table": table, "generations": dict(sorted(seen.generations.items()))}
    )


def highwater_from_json(value: bytes) -> Highwater:
    """Raise RemoteProtocolError for anything else."""
    body = _object(value)
    cluster_id, table = body.get("cluster_id"), body.get("table")
    _require(isinstance(cluster_id, str) and isinstance(table, dict | None), "not a highwater mark")
    assert isinstance(cluster_id, str)
    return Highwater(
        cluster_id, table_from_fields(table) if table else None, _counts(body.get("generations", {}))
    )


def to_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _object(value: bytes) -> dict[str, Any]:
    try:
        body = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError("a record is not JSON", kind="record") from error
    _require(isinstance(body, dict), "a record is not an object")
    assert isinstance(body, dict)
    return body


def _counts(body: object) -> dict[str, int]:
    _require(isinstance(body, dict), "not a table of numbers")
    assert isinstance(body, dict)
    _require(all(_is_count(number) for number in body.values()), "not a table of numbers")
    return body


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _require(is_good: bool, problem: str) -> None:
    if not is_good:
        raise RemoteProtocolError(problem, kind="record")
