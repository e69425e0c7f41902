"""Scenarios of placement as text: what happens to nodes, and after `----` the table that follows.

code 6+2
join rack-a: a1 a2
lose a1          away, its place is kept
gone a1          away for good
back a1          the same node again
drain a1
----
0  1+1  a1? a2       (? lost)
moved   ...
"""

from __future__ import annotations

from snapd.core.cluster import Code, GroupTable, Member
from snapd.core.placement import place


def member(node: str, domain: str, host: str = "") -> Member:
    return Member(
        node=node,
        host=host or node,
        domain=domain,
        address="",
        bulk_address="",
        arena_id="",
        version="",
    )


class Script:
    """A cluster whose table is made anew after each block."""

    def __init__(self) -> None:
        self.asked = Code(6, 2)
        self.members: dict[str, Member] = {}
        self.lost: dict[str, Member] = {}
        self.draining: set[str] = set()
        self.domains: dict[str, str] = {}
        self.table: GroupTable | None = None

    def run(self, text: str) -> str:
        """The text again, with what really follows behind each `----`."""
        blocks = [block.split("----")[0].strip() for block in text.split("\n\n")]
        return "\n\n".join(f"{block}\n----\n{self.step(block)}" for block in blocks if block) + "\n"

    def step(self, block: str) -> str:
        for line in block.splitlines():
            if not line.startswith("#"):
                verb, _, rest = line.partition(" ")
                self.happen(verb, rest)
        before = self.table
        made = place(
            before,
            list(self.members.values()),
            self.asked,
            lost=set(self.lost),
            draining=self.draining,
            domains=self.domains,
        )
        self.table = made.table(1 if before is None else before.epoch + 1, self.asked)
        lines = []
        for group in made.groups:
            nodes = " ".join(node + "?" * (node in self.lost) for node in group.nodes)
            lines.append(f"{group.number:<3}{group.code or 'none'!s:<6}{nodes}")
        lines.append(f"reason    {made.reason}")
        lines += [f"moved     {' '.join(made.moved)}"] if made.moved else []
        lines += [f"degraded  {part}" for part in made.degraded.split("; ") if part]
        return "\n".join(lines)

    def happen(self, verb: str, rest: str) -> None:
        if verb == "code":
            self.asked = Code.parse(rest)
        elif verb == "join":
            domain, names = rest.split(":")
            for node in names.split():
                self.members[node] = member(node, domain)
                self.domains[node] = domain
        elif verb == "drain":
            self.draining.update(rest.split())
        elif verb == "lose":
            self.lost.update({node: self.members.pop(node) for node in rest.split()})
        elif verb == "back":
            self.members.update({node: self.lost.pop(node) for node in rest.split()})
        else:
            assert verb == "gone", verb
            for node in rest.split():
                found = self.members.pop(node, None) or self.lost.pop(node, None)
                assert found is not None, node
