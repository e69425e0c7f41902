"""Placement: which nodes protect one another.

A pure function of the table so far, the members with their failure domains, and the code asked for. In this order:

1. No group has more than `m` nodes of one domain, where that can be avoided: the loss of a rack costs nothing then.
2. Nodes that have a place keep it, in its order, while they are members or lost for a short while only; whoever is new
   takes a vacant place first, then a lost node's.
3. Groups have `k + m` nodes, one of each domain where there are enough domains, and consecutive groups stand in the
   same domains. Nodes left over extend groups: `k` grows, `m` stays. As many as make a group become one.
4. A group that lost nodes for good, and for which nobody is left over, goes on with a smaller `k` as long as its parity
   takes less than twice the memory asked for; below that its nodes go to other groups.
5. With fewer nodes than `k + m` all are one group with the best code that they allow.

What is asked for and not given is said in `degraded`, never left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from snapd.core.cluster import DATA_FRAGMENTS_MAX, Code, Group, GroupTable, Member
from snapd.core.placement_draft import VACANT, Draft, Pool, deal
from snapd.core.words import listed

_LISTED_MAX = 3  # groups or nodes that a text names one by one


@dataclass(frozen=True, slots=True)
class Placement:
    """The groups, in the order of their numbers. `moved`: nodes that had a place and are in another group now; their
    new groups, and the ones they left, are coded anew. `degraded`: in words, what was asked for and is not given.
    """

    groups: tuple[Group, ...]
    moved: tuple[str, ...]
    reason: str
    degraded: str

    def table(self, epoch: int, asked: Code) -> GroupTable:
        return GroupTable(epoch, asked, self.groups, self.reason, self.degraded)


def code_for(node_count: int, asked: Code) -> Code | None:
    """The code of a group of that many nodes: `m` stays, `k` is what is left; with too few, at most half is parity.

    None: one node, which protects nothing.
    """
    if node_count < 2:
        return None
    m = min(asked.m, node_count // 2)
    return Code(node_count - m, m)


def place(
    previous: GroupTable | None,
    members: Iterable[Member],
    asked: Code,
    *,
    lost: Collection[str] = (),
    draining: Collection[str] = (),
    domains: Mapping[str, str] | None = None,
) -> Placement:
    """Place the members.

    Args:
        previous: the table so far; its order of nodes within groups is kept.
        members: the living, in any order, each once; a draining one gets no place.
        lost: nodes that are away for less than the time after which their place is given up. A member is not lost.
        draining: names of nodes that get no place, members or not.
        domains: last known domains of nodes that are no members; one that is missing counts as a domain of its own.
    """
    living = {member.node: member for member in members}
    out = {*draining, *(node for node, member in living.items() if member.is_draining)}
    away = {node for node in lost if node not in living and node not in out}
    domain_of = {node: (domains or {}).get(node, f"unknown domain of {node}") for node in _nodes_of(previous)}
    domain_of.update((node, member.domain) for node, member in living.items())
    placeable = sorted(
        (member for node, member in living.items() if node not in out),
        key=lambda member: (member.domain, member.host, member.node),
    )
    names = [member.node for member in placeable]
    if previous is None or not previous.groups:
        best, change = _placed_anew(None, names, asked, domain_of), _words_first(names, domain_of)
    elif previous.asked.size != asked.size:
        kept = [node for node in _nodes_of(previous) if node in away]
        best = _placed_anew(previous, [*names, *kept], asked, domain_of)
        change = f"the code asked for is {asked}"
    else:
        best, change = _changed(previous, names, away, asked, domain_of)
    return _placement(previous, best, asked, domain_of, change)


def _changed(
    previous: GroupTable,
    names: Sequence[str],
    away: Collection[str],
    asked: Code,
    domain_of: Mapping[str, str],
) -> tuple[dict[int, list[str]], str]:
    """The next table and why: with few moves if that has no faults, else with the fewest faults."""

    def change(may_dissolve: bool) -> tuple[dict[int, list[str]], str]:
        return _Change(previous, names, away, asked, domain_of).run(may_dissolve)

    options = [change(True)]
    if _faults(options[0][0], asked, domain_of) != (0, 0):
        options.append(change(False))
        anew = _placed_anew(previous, [*names, *_staying(options[0][0], away)], asked, domain_of)
        options.append((anew, f"all placed anew, to lose less with a domain or a group; {options[0][1]}"))
    best, words = min(options, key=lambda option: _faults(option[0], asked, domain_of))
    return best, words if previous.asked == asked else f"the code asked for is {asked}; {words}"


def _nodes_of(table: GroupTable | None) -> list[str]:
    return [] if table is None else [node for group in table.groups for node in group.nodes]


def _staying(groups: Mapping[int, Sequence[str]], away: Collection[str]) -> list[str]:
    return [node for number in sorted(groups) for node in groups[number] if node in away]


def _size_max(asked: Code) -> int:
    """Places in a group at most: one more and it could be two, or it would have more data fragments than a code may."""
    return min(2 * asked.size - 1, DATA_FRAGMENTS_MAX + asked.m)


def _faults(
    groups: Mapping[int, Sequence[str]], asked: Code, domain_of: Mapping[str, str]
) -> tuple[int, int]:
    """(Nodes in groups with less parity than asked for, nodes that are one too many of their domain in their group.)

    With a domain of which a group has more than `m` nodes the group would be lost.
    """
    weak, excess = 0, 0
    for nodes in groups.values():
        code = code_for(len(nodes), asked)
        m = code.m if code is not None else 0
        weak += len(nodes) if m < asked.m else 0
        if code is not None:
            counts = Counter(domain_of[node] for node in nodes).values()
            excess += sum(max(0, count - m) for count in counts)
    return weak, excess


def _placed_anew(
    previous: GroupTable | None, nodes: Iterable[str], asked: Code, domain_of: Mapping[str, str]
) -> dict[int, list[str]]:
    """Deal all nodes out; each group then takes the number and the order of the one that it shares most nodes with."""
    ordered = sorted(nodes, key=lambda node: domain_of[node])  # stable: within a domain by host and name
    if not ordered:
        return {}
    count = max(len(ordered) // asked.size, -(-len(ordered) // _size_max(asked)))
    dealt = deal(ordered, domain_of, count)
    former = {
        node: (group.number, place)
        for group in (previous.groups if previous else ())
        for place, node in enumerate(group.nodes)
    }
    shared = Counter(
        (i, former[node][0]) for i, nodes in enumerate(dealt) for node in nodes if node in former
    )
    numbers: dict[int, int] = {}
    for (i, number), _ in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
        if i not in numbers and number not in numbers.values():
            numbers[i] = number
    unused = (number for number in range(2 * count) if number not in set(numbers.values()))
    groups = {}
    for i, nodes in enumerate(dealt):
        number = numbers[i] if i in numbers else next(unused)
        first = [node for node in nodes if former.get(node, (-1, 0))[0] == number]
        first.sort(key=lambda node: former[node][1])
        groups[number] = [*first, *(node for node in nodes if node not in set(first))]
    return groups


class _Change:
    """From a table to the next one with as few moves as the rules allow. Says in words what it does."""

    def __init__(
        self,
        previous: GroupTable,
        names: Sequence[str],
        away: Collection[str],
        asked: Code,
        domain_of: Mapping[str, str],
    ) -> None:
        self._asked = asked
        self._domain_of = domain_of
        self._away = away
        self._draft = Draft(asked.size, _size_max(asked), domain_of)
        self._former: dict[int, list[str]] = {}
        self._words: list[str] = []
        staying = {*names, *away}
        for group in previous.groups:
            gone = [node for node in group.nodes if node not in staying]
            self._draft.open(group.number, [node if node in staying else VACANT for node in group.nodes])
            self._former[group.number] = [domain_of[node] for node in gone]
            if gone:
                self._words.append(
                    f"group {group.number} lost its place for {listed(gone, shown=_LISTED_MAX)}"
                )
        had = set(_nodes_of(previous))
        self._new = [node for node in names if node not in had]
        self._pool = Pool(self._new, domain_of)

    def run(self, may_dissolve: bool) -> tuple[dict[int, list[str]], str]:
        draft = self._draft
        if sum(map(draft.length, draft.groups)) + len(self._pool) < self._asked.size:
            self._unite()
        else:
            self._fill_short()
            self._replace_lost()
            self._borrow()
            if may_dissolve:
                self._dissolve_short()
            self._open_groups()
            self._extend()
        draft.close()
        for mine, theirs in draft.repair(set(self._new)):
            self._words.append(f"{mine} and {theirs} change places, for their domains")
        draft.close()
        return draft.groups, "; ".join(_shortened(self._words)) or "nothing changed"

    def _unite(self) -> None:
        """Too few for one group: all into the one that has most already."""
        draft = self._draft
        home = max(draft.groups, key=lambda number: (draft.length(number), -number))
        for number in sorted(draft.groups):
            if number != home:
                nodes = draft.drop(number)
                self._pool.add(nodes)
                self._words += [f"group {number} goes into group {home}"] * bool(nodes)
        self._fill_short()

    def _fill_short(self) -> None:
        for node, number in self._draft.fill_short(self._pool, self._former):
            self._words.append(f"{node} joins group {number}")

    def _replace_lost(self) -> None:
        """Whoever is still without a place takes that of a lost node: it may never come back."""
        for number in sorted(self._draft.groups):
            for node in self._draft.groups[number]:
                if node in self._away and self._pool:
                    self._draft.take(number, node)
                    newcomer = self._pool.take_for(self._draft, number, [self._domain_of[node]])
                    self._draft.put(number, newcomer)
                    self._words.append(
                        f"{newcomer} takes the place of {node}, which is lost, in group {number}"
                    )

    def _borrow(self) -> None:
        """Groups below their size get nodes that others have above it."""
        for number in self._draft.numbers_by_length():
            for node, giver in self._draft.borrow(number):
                self._words.append(f"{node} moves from group {giver} to group {number}")

    def _dissolve_short(self) -> None:
        """Groups whose parity would take twice the memory asked for go to others, as far as these have room."""
        draft = self._draft
        shortest_kept = self._asked.m + self._asked.k // 2 + 1
        while len(draft.groups) > 1:
            number = draft.numbers_by_length()[0]
            if draft.length(number) >= shortest_kept or draft.room(without=number) < draft.length(number):
                break
            nodes = draft.drop(number)
            self._pool.add(nodes)
            self._words.append(f"group {number} is dissolved: {_counted(len(nodes), 'node')} left")
            self._fill_short()

    def _open_groups(self) -> None:
        """New groups, from those without a place first, then from those that other groups have above their size."""
        draft, pool, size = self._draft, self._pool, self._asked.size
        count = len(pool) // size
        if count:
            dealt = deal(pool.sorted(), self._domain_of, count)
            for nodes in dealt:
                number = draft.open_next(nodes[:size])
                self._words.append(f"group {number} is new")
                for node in nodes[:size]:
                    pool.remove(node)
        while len(pool) + draft.surplus() >= size:
            number = draft.open_next()
            self._words.append(f"group {number} is new")
            self._fill_short()
            for node, giver in draft.borrow(number):
                self._words.append(f"{node} moves from group {giver} to group {number}")

    def _extend(self) -> None:
        """Left over, and too few for a group."""
        for node in self._pool.sorted():
            number = self._draft.extend(node)
            if number is None:
                break
            self._pool.remove(node)
            self._words.append(f"{node} extends group {number}")
        if self._pool:
            number = self._draft.open_next(self._pool.sorted())
            self._words.append(f"group {number} is new")


def _placement(
    previous: GroupTable | None,
    groups: Mapping[int, Sequence[str]],
    asked: Code,
    domain_of: Mapping[str, str],
    change: str,
) -> Placement:
    before = {node: group.number for group in (previous.groups if previous else ()) for node in group.nodes}
    made = tuple(
        Group(number, tuple(groups[number]), code_for(len(groups[number]), asked))
        for number in sorted(groups)
    )
    moved = tuple(
        sorted(n for group in made for n in group.nodes if before.get(n, group.number) != group.number)
    )
    degraded = "; ".join([*_words_codes(made, asked), *_words_domains(made, domain_of)])
    return Placement(made, moved, change, degraded)


def _words_first(nodes: Sequence[str], domain_of: Mapping[str, str]) -> str:
    domains = len({domain_of[node] for node in nodes})
    return f"first placement of {_counted(len(nodes), 'node')} in {_counted(domains, 'domain')}"


def _words_codes(groups: Sequence[Group], asked: Code) -> list[str]:
    """Groups that are smaller than the code asks for."""
    words = []
    for group in groups:
        count, code = len(group.nodes), group.code
        if count >= asked.size:
            continue
        if code is None:
            words.append(f"{group.nodes[0]} is alone in group {group.number}: nothing protects it")
            continue
        share = f"parity takes {code.m / code.k:.2f} of the state instead of {asked.m / asked.k:.2f}"
        loss = f"any {code.m} of its nodes may be lost" if code.m > 1 else "any one of its nodes may be lost"
        loss += "" if code.m == asked.m else f" instead of {asked.m}"
        words.append(f"group {group.number} has {count} nodes, too few for {asked}: {code}, {loss}, {share}")
    return _shortened(words, what="group")


def _words_domains(groups: Sequence[Group], domain_of: Mapping[str, str]) -> list[str]:
    """Groups of which a domain holds several nodes; those first that would not survive its loss."""
    fatal, bearable = [], []
    for group in groups:
        if group.code is None:
            continue
        domain, count = max(
            Counter(domain_of[node] for node in group.nodes).items(), key=lambda item: (item[1], item[0])
        )
        words = f"group {group.number} has {count} nodes in {domain}: losing it loses {count}"
        if count > group.code.m:
            fatal.append(f"{words}, and the group bears {group.code.m}")
        elif count > 1:
            bearable.append(words)
    return [*_shortened(fatal, what="group"), *_shortened(bearable, what="group")]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _shortened(words: Sequence[str], what: str = "change") -> list[str]:
    more = len(words) - _LISTED_MAX
    return [*words[:_LISTED_MAX], *([_counted(more, f"more {what}")] if more > 0 else [])]
