"""A group table in the making: groups as lists of places, and how many nodes of each domain a group has."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

VACANT = ""
_PARTNER_GROUPS_MAX = 64  # looked at for one swap; more find hardly more


def deal(nodes: Sequence[str], domain_of: Mapping[str, str], group_count: int) -> list[list[str]]:
    """Deal nodes out to groups like cards, domain after domain.

    No group then gets more than ceil(nodes of the domain / groups) of any domain, which is the least possible; sizes
    differ by one at most. And groups are aligned: consecutive groups have their nodes in the same domains, so that
    there are at most as many different sets of domains as domains, and few pairs of racks whose joint loss hurts.

    Args:
        nodes: sorted by domain.
    """
    assert [domain_of[node] for node in nodes] == sorted(domain_of[node] for node in nodes)
    return [list(nodes[first::group_count]) for first in range(group_count)]


class Draft:
    """Groups by number. A vacant place keeps its position until `close` removes it.

    Args:
        size: places that a group should have, k + m of the code asked for.
        size_max: places that it may have.
        domain_of: of all nodes that will ever be put into it.
    """

    def __init__(self, size: int, size_max: int, domain_of: Mapping[str, str]) -> None:
        self.size = size
        self.size_max = size_max
        self.domain_of = domain_of
        self.groups: dict[int, list[str]] = {}
        self._domains: dict[int, Counter[str]] = {}
        self._lengths: dict[int, int] = {}

    def open(self, number: int, places: Iterable[str] = ()) -> None:
        self.groups[number] = list(places)
        nodes = [node for node in self.groups[number] if node != VACANT]
        self._domains[number] = Counter(self.domain_of[node] for node in nodes)
        self._lengths[number] = len(nodes)

    def open_next(self, places: Iterable[str] = ()) -> int:
        """Open a group with the lowest free number."""
        number = next(n for n in range(len(self.groups) + 1) if n not in self.groups)
        self.open(number, places)
        return number

    def drop(self, number: int) -> list[str]:
        """Remove a group and return its nodes."""
        del self._domains[number], self._lengths[number]
        return [node for node in self.groups.pop(number) if node != VACANT]

    def length(self, number: int) -> int:
        """Nodes that the group has."""
        return self._lengths[number]

    def numbers_by_length(self) -> list[int]:
        return sorted(self.groups, key=lambda number: (self._lengths[number], number))

    def clashes(self, number: int, node: str) -> int:
        """Nodes of that node's domain in the group, itself not counted."""
        own = node in self.groups[number]
        return self._domains[number][self.domain_of[node]] - own

    def domains(self, number: int) -> Mapping[str, int]:
        return self._domains[number]

    def put(self, number: int, node: str) -> None:
        """Give a node the first vacant place, or a new one at the end."""
        places = self.groups[number]
        if VACANT in places:
            places[places.index(VACANT)] = node
        else:
            places.append(node)
        self._domains[number][self.domain_of[node]] += 1
        self._lengths[number] += 1

    def take(self, number: int, node: str) -> None:
        """Take a node out; its place is vacant."""
        self.groups[number][self.groups[number].index(node)] = VACANT
        self._domains[number][self.domain_of[node]] -= 1
        self._lengths[number] -= 1

    def close(self) -> None:
        """Remove vacant places, and groups without nodes."""
        for number in list(self.groups):
            self.groups[number] = [node for node in self.groups[number] if node != VACANT]
            if not self.groups[number]:
                self.drop(number)

    def surplus(self) -> int:
        """Nodes above `size`, over all groups."""
        return sum(max(0, length - self.size) for length in self._lengths.values())

    def room(self, *, without: int) -> int:
        """How many more nodes the groups but one may take."""
        return sum(self.size_max - length for n, length in self._lengths.items() if n != without)

    def fill_short(self, pool: Pool, former: Mapping[int, Sequence[str]]) -> list[tuple[str, int]]:
        """Give places in groups below `size` to nodes of the pool, the shortest group first; return who went where.

        `former`: per group the domains of those who left; a node of the same domain keeps groups aligned.
        """
        filled = []
        left = {number: list(domains) for number, domains in former.items()}
        heap = [(length, number) for number, length in self._lengths.items() if length < self.size]
        heapq.heapify(heap)
        while heap and pool:
            _, number = heapq.heappop(heap)
            wishes = left.get(number, [])
            node = pool.take_for(self, number, wishes)
            if self.domain_of[node] in wishes:
                wishes.remove(self.domain_of[node])
            self.put(number, node)
            filled.append((node, number))
            if self._lengths[number] < self.size:
                heapq.heappush(heap, (self._lengths[number], number))
        return filled

    def borrow(self, number: int) -> list[tuple[str, int]]:
        """Fill a group up to `size` with nodes that others have above it; return who came from where."""
        moved = []
        while self._lengths[number] < self.size:
            longer = [n for n in self.numbers_by_length() if self._lengths[n] > self.size and n != number]
            givers = longer[-_PARTNER_GROUPS_MAX:]
            if not givers:
                break
            choices = [
                (
                    self.clashes(number, node),
                    -self._lengths[giver],
                    -self.clashes(giver, node),
                    -place,
                    giver,
                    node,
                )
                for giver in givers
                for place, node in enumerate(self.groups[giver])
                if node != VACANT
            ]
            *_, giver, node = min(choices)
            self.take(giver, node)
            self.put(number, node)
            moved.append((node, giver))
        return moved

    def extend(self, node: str) -> int | None:
        """Put a node that is left over where it clashes least, the smallest group first; None: no group has room."""
        numbers = [number for number, length in self._lengths.items() if length < self.size_max]
        if not numbers:
            return None
        best = min(numbers, key=lambda number: (self.clashes(number, node), self._lengths[number], number))
        self.put(best, node)
        return best

    def quotas(self) -> dict[str, int]:
        """Of each domain, how many nodes some group must have at least."""
        totals: Counter[str] = Counter()
        for counts in self._domains.values():
            totals.update(counts)
        return {domain: max(1, -(-count // len(self.groups))) for domain, count in totals.items()}

    def repair(self, is_free: Collection[str]) -> list[tuple[str, str]]:
        """Swap nodes between groups where a domain is in one of them more often than it must; return the swaps.

        Args:
            is_free: nodes that were nowhere before, which cost nothing to move.
        """
        swaps: list[tuple[str, str]] = []
        quotas = self.quotas()
        while True:  # each swap makes the groups more even, so this ends; one may make room for another
            before = len(swaps)
            for number in sorted(self.groups):
                for domain in sorted(d for d, count in self._domains[number].items() if count > quotas[d]):
                    swaps += self._swap_out(number, domain, quotas[domain], is_free)
            if len(swaps) == before:
                return swaps

    def _swap_out(
        self, number: int, domain: str, quota: int, is_free: Collection[str]
    ) -> Iterator[tuple[str, str]]:
        while self._domains[number][domain] > quota:
            swap = self._find_swap(number, domain, is_free)
            if swap is None:
                break
            self._swap(number, *swap)
            yield swap[0], swap[2]

    def _find_swap(self, number: int, domain: str, is_free: Collection[str]) -> tuple[str, int, str] | None:
        """(own node, other group, its node) with the fewest moves that makes both groups together more even."""
        own = [node for node in self.groups[number] if self.domain_of.get(node) == domain]
        mine = min(reversed(own), key=lambda node: node not in is_free)
        here = self._domains[number]
        others = [
            n for n in sorted(self.groups) if n != number and self._domains[n][domain] < here[domain] - 1
        ]
        others.sort(key=lambda n: self._domains[n][domain])
        best: tuple[int, int, int, str] | None = None
        for other in others[:_PARTNER_GROUPS_MAX]:
            there = self._domains[other]
            for node in self.groups[other]:
                theirs = self.domain_of[node]
                # Half the change of the sum of squares of all counts: below zero is more even.
                gain = there[domain] - here[domain] + here[theirs] - there[theirs] + 2
                if theirs != domain and gain < 0:
                    best = min(best or (2, 0, 0, ""), (node not in is_free, gain, other, node))
            if best is not None and best[0] == 0:
                break
        return None if best is None else (mine, best[2], best[3])

    def _swap(self, number: int, mine: str, other: int, theirs: str) -> None:
        self.take(number, mine)
        self.take(other, theirs)
        self.put(number, theirs)
        self.put(other, mine)


class Pool:
    """Nodes without a place, by domain."""

    def __init__(self, nodes: Iterable[str], domain_of: Mapping[str, str]) -> None:
        self._domain_of = domain_of
        self._nodes: dict[str, list[str]] = {}
        self.add(nodes)

    def __len__(self) -> int:
        return sum(map(len, self._nodes.values()))

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def add(self, nodes: Iterable[str]) -> None:
        for node in nodes:
            self._nodes.setdefault(self._domain_of[node], []).append(node)

    def sorted(self) -> list[str]:
        """All, by domain."""
        return [node for domain in sorted(self._nodes) for node in self._nodes[domain]]

    def remove(self, node: str) -> None:
        own = self._nodes[self._domain_of[node]]
        own.remove(node)
        if not own:
            del self._nodes[self._domain_of[node]]

    def take_for(self, draft: Draft, number: int, wishes: Sequence[str]) -> str:
        """Take the node that suits the group best: of a wished domain, else of one that the group has least of."""
        counts = draft.domains(number)
        for domain in wishes:
            if domain in self._nodes and not counts.get(domain):
                return self._take(domain)
        best, least = "", -1
        for domain, nodes in self._nodes.items():
            count = counts.get(domain, 0)
            if least < 0 or (count, -len(nodes), domain) < (least, -len(self._nodes[best]), best):
                best, least = domain, count
        return self._take(best)

    def _take(self, domain: str) -> str:
        node = self._nodes[domain].pop(0)
        if not self._nodes[domain]:
            del self._nodes[domain]
        return node
