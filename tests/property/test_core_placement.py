"""Placement: golden scenarios as text, and what holds for every cluster, however nodes come and go."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapd.core.cluster import DATA_FRAGMENTS_MAX, Code, GroupTable, Member
from snapd.core.placement import Placement, code_for, place
from tests.support.placement_script import Script, member

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "placement"
CODES = st.sampled_from([Code(6, 2), Code(4, 2), Code(2, 1), Code(1, 1), Code(24, 2)])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_golden_scenarios(path: Path) -> None:
    """SNAPD_REWRITE_GOLDEN=1 writes them anew: commit what changed only if you know why."""
    expected = path.read_text(encoding="utf-8")
    happened = Script().run(expected)
    if os.environ.get("SNAPD_REWRITE_GOLDEN"):
        path.write_text(happened, encoding="utf-8")
    assert happened == expected


def test_there_are_scenarios() -> None:
    assert len(list(GOLDEN.glob("*.txt"))) >= 4


@st.composite
def clusters(draw: st.DrawFn, nodes_max: int = 60) -> list[Member]:
    domains = draw(st.integers(1, 20))
    homes = draw(st.lists(st.integers(0, domains - 1), max_size=nodes_max))
    return [member(f"n{i}", f"rack-{home}") for i, home in enumerate(homes)]


def check(
    made: Placement, members: list[Member], asked: Code, away: set[str], *, may_hold_short: bool = False
) -> None:
    """What holds whatever came before."""
    placed = [node for group in made.groups for node in group.nodes]
    assert len(set(placed)) == len(placed)
    assert {m.node for m in members} <= set(placed) <= {m.node for m in members} | away
    assert [group.number for group in made.groups] == sorted({group.number for group in made.groups})
    for group in made.groups:
        assert group.nodes
        assert group.code == code_for(len(group.nodes), asked)
        assert group.code is None or group.code.size == len(group.nodes)
        assert group.code is None or group.code.k <= DATA_FRAGMENTS_MAX
    if len(placed) >= asked.size:
        assert all(group.code is not None and group.code.m == asked.m for group in made.groups)
        short = [group for group in made.groups if len(group.nodes) < asked.size]
        # Shorter than that only where its nodes elsewhere would be too many of a domain.
        unkept = [group for group in short if group.code is None or 2 * group.code.k <= asked.k]
        assert not unkept or may_hold_short
    else:
        assert len(made.groups) <= 1
    is_short = any(len(group.nodes) < asked.size for group in made.groups)
    assert not is_short or "too few for" in made.degraded or "alone" in made.degraded


def worst(made: Placement, domain_of: dict[str, str]) -> list[int]:
    """Of each group, most nodes in one domain."""
    return [max(Counter(domain_of[n] for n in group.nodes).values()) for group in made.groups]


@given(clusters(), CODES)
def test_a_first_placement_is_as_even_as_can_be(members: list[Member], asked: Code) -> None:
    made = place(None, members, asked)
    check(made, members, asked, set())
    assert made.moved == ()
    if not members:
        assert made.groups == ()
        return
    sizes = [len(group.nodes) for group in made.groups]
    assert max(sizes) - min(sizes) <= 1
    domain_of = {m.node: m.domain for m in members}
    fullest = max(Counter(domain_of.values()).values())
    assert max(worst(made, domain_of)) == -(-fullest // len(made.groups))
    sharing = [
        count
        for count, group in zip(worst(made, domain_of), made.groups, strict=True)
        if group.code is not None
    ]
    assert ("losing it loses" in made.degraded) == any(count > 1 for count in sharing)


@given(clusters(), CODES, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(
    members: list[Member], asked: Code, lots: random.Random
) -> None:
    before = place(None, members[::2], asked).table(1, asked)
    lost = {m.node for m in members[:3]}
    living = [m for m in members if m.node not in lost]
    made = place(before, living, asked, lost=lost)
    assert place(before, lots.sample(living, len(living)), asked, lost=lost) == made
    assert place(None, lots.sample(members, len(members)), asked) == place(None, members, asked)


@given(clusters(), clusters(), CODES)
def test_a_table_that_fits_is_left_alone(first: list[Member], second: list[Member], asked: Code) -> None:
    table = place(None, first, asked).table(1, asked)
    for epoch in (2, 3):
        made = place(table, second, asked)
        table = made.table(epoch, asked)
    assert made.moved == ()
    assert made.reason == ("nothing changed" if second else "first placement of 0 nodes in 0 domains")


@given(
    st.integers(2, 12), st.integers(0, 7), st.sampled_from([Code(6, 2), Code(4, 2), Code(2, 1), Code(1, 1)])
)
def test_one_node_more_or_less_moves_hardly_anyone(groups: int, over: int, asked: Code) -> None:
    """Every host its own domain."""
    count = groups * asked.size + min(over, asked.size - 1)
    members = [member(f"n{i:03}", f"n{i:03}") for i in range(count)]
    before = place(None, members, asked)
    table = before.table(1, asked)
    fewer = place(table, members[1:], asked)
    assert len(fewer.moved) <= max(1, asked.size - 1 if asked.size < 4 else 1)
    more = place(table, [*members, member("x", "x")], asked)
    opens_group = len(more.groups) > len(before.groups)
    assert len(more.moved) <= (asked.size - 1 if opens_group else 0)
    assert opens_group == ((count + 1) % asked.size == 0)
    away = place(table, members[1:], asked, lost=["n000"])
    assert (away.groups, away.moved) == (before.groups, ())
    instead = place(table, [*members[1:], member("x", "x")], asked, lost=["n000"])
    assert instead.moved == ()
    renamed = [tuple("x" if n == "n000" else n for n in group.nodes) for group in before.groups]
    assert [group.nodes for group in instead.groups] == renamed


def test_a_domain_never_takes_more_than_parity_bears_where_that_can_be_avoided() -> None:
    """Racks come up one after the other; with four racks of eight, 6+2 bears each of them."""
    asked, members = Code(6, 2), list[Member]()
    table: GroupTable | None = None
    for rack in "abcd":
        for i in range(8):
            members.append(member(f"{rack}{i}", rack))
            made = place(table, members, asked)
            table = made.table(1, asked)
    assert max(worst(made, {m.node: m.domain for m in members})) == 2
    assert "and the group bears" not in made.degraded
    assert len(made.groups) == 4


def test_aligned_groups_stand_in_few_sets_of_racks() -> None:
    """64 racks: two racks lost together hurt two nodes of a group only where they are in one of 8 sets."""
    members = [member(f"n{i}", f"rack-{i % 64:02}") for i in range(2048)]
    made = place(None, members, Code(6, 2))
    sets = {frozenset(int(node[1:]) % 64 for node in group.nodes) for group in made.groups}
    assert {len(racks) for racks in sets} == {8}
    assert len(sets) == 8
    uneven = [m for i, m in enumerate(members) if i % 97]
    sets = {
        frozenset(int(node[1:]) % 64 for node in group.nodes)
        for group in place(None, uneven, Code(6, 2)).groups
    }
    assert len(sets) <= 64


def test_daemons_of_one_host_are_kept_apart_within_a_domain() -> None:
    members = [member(f"n{i}", f"rack-{i // 4 % 4}", host=f"host-{i // 2}") for i in range(32)]
    hosts = {m.node: m.host for m in members}
    for group in place(None, members, Code(6, 2)).groups:
        assert len({hosts[node] for node in group.nodes}) == len(group.nodes)


def test_draining_nodes_hold_no_place() -> None:
    members = [member(f"n{i}", f"n{i}") for i in range(9)]
    table = place(None, members, Code(6, 2)).table(1, Code(6, 2))
    made = place(table, members, Code(6, 2), draining=["n4"])
    assert "n4" not in made.groups[0].nodes
    assert made == place(
        table, [m for m in members if m.node != "n4"], Code(6, 2), lost=["n4"], draining=["n4"]
    )


def test_a_code_with_few_free_places_leaves_nobody_alone() -> None:
    """24+2 is as large as groups get: the 27th node makes two groups of the one."""
    asked = Code(24, 2)
    members = [member(f"n{i:02}", f"n{i:02}") for i in range(27)]
    table = place(None, members[:26], asked).table(1, asked)
    made = place(table, members, asked)
    assert sorted(len(group.nodes) for group in made.groups) == [13, 14]
    assert "12+2" in made.degraded or "11+2" in made.degraded


class Comings(RuleBasedStateMachine):
    """Nodes come, go for a while, go for good, drain, and the code changes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Code(4, 2)
        self.living: dict[str, Member] = {}
        self.lost: dict[str, Member] = {}
        self.table: GroupTable | None = None
        self.made: Placement | None = None
        self.count = 0

    def place(self) -> None:
        before, members = self.table, list(self.living.values())
        domains = {node: m.domain for node, m in self.lost.items()}
        self.made = place(before, members, self.asked, lost=set(self.lost), domains=domains)
        self.table = self.made.table(1 if before is None else before.epoch + 1, self.asked)
        self.lost = {node: m for node, m in self.lost.items() if self.table.group_of(node) is not None}
        was = {n: group.number for group in before.groups for n in group.nodes} if before else {}
        now = {n: group.number for group in self.made.groups for n in group.nodes}
        again = place(self.table, members, self.asked, lost=set(self.lost), domains=domains)
        assert again.groups == self.made.groups
        assert set(self.made.moved) == {n for n in now if n in was and was[n] != now[n]}

    @rule(count=st.integers(1, 7), domains=st.integers(1, 9))
    def come(self, count: int, domains: int) -> None:
        for _ in range(count):
            self.count += 1
            node = f"n{self.count}"
            self.living[node] = member(node, f"rack-{self.count * 7 % domains}")
        self.place()

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        for node in data.draw(st.sets(st.sampled_from(sorted(self.living)), max_size=3)):
            self.lost[node] = self.living.pop(node)
        before = self.table
        self.place()
        assert before is not None and self.table is not None
        assert self.table.groups == before.groups  # their places are kept

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.lost)))
        self.living[node] = self.lost.pop(node)
        self.place()

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        names = sorted([*self.living, *self.lost])
        for node in data.draw(st.sets(st.sampled_from(names), max_size=4)) if names else ():
            self.living.pop(node, None)
            self.lost.pop(node, None)
        self.place()

    @rule(asked=CODES)
    def ask(self, asked: Code) -> None:
        self.asked = asked
        self.place()

    @invariant()
    def the_rules_hold(self) -> None:
        if self.made is not None:
            check(self.made, list(self.living.values()), self.asked, set(self.lost), may_hold_short=True)


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
