"""Thousands of nodes in one process: what would be quadratic in their number is done once.

All daemons look at one view of the cluster's keys, which the store itself keeps, instead of each at its own copy (4,096
copies of 12,288 keys, fed by 50 million changes); and the store begins with all of them as members, as if they had
joined one after the other. Everything else is as in a small run: every daemon holds its lease, watches, stands for
election, and hears of each change after the network's delay; only what it then reads is what the store says by that
time. Wiped and rolled-back stores are for small runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapd.coordination.cluster import ClusterState
from snapd.coordination.kv import Change, Write
from snapd.core.membership import ClusterView, Known, known_to_json

if TYPE_CHECKING:
    from snapd.sim.simulation import Simulation


class CrowdView(ClusterView):
    """Fed by the store; what daemons say of it is known already."""

    def apply(self, key: str, value: bytes | None, version: int) -> None:
        """Nothing: `feed` did it."""

    member_changes = 0

    def feed(self, change: Change) -> None:
        self.member_changes += change.key.startswith(self._keys.members)
        super().apply(change.key, change.value, change.version)


class CrowdState(ClusterState):
    """A daemon's cluster, read from the view of all."""

    crowd: CrowdView

    @property
    def members_mark(self) -> int:
        return self.crowd.member_changes

    async def read_anew(self) -> None:
        reading = await self.store.read(self.keys.id)
        self.view, self._revision = self.crowd, reading.revision
        self._count_absent()
        self._judge()
        self._tell()


def admit(sim: Simulation) -> None:
    """Put all daemons, which have just been started, into the store as members."""
    sim.store.after_change.append(sim.crowd.feed)
    sim.store.admit("", [Write(sim.keys.id, sim.random_id().encode("ascii"))], ttl_s=0.0)
    for machine in sim.machines.values():
        daemon = machine.daemon
        assert daemon is not None and isinstance(daemon.state, CrowdState)
        state, member = daemon.state, machine.member()
        state.view = sim.crowd
        body = state._announcer._body()
        known = Known(member.node, member.host, member.domain, member.arena_id)
        sim.store.admit(
            daemon.client.first_lease,
            [
                Write(sim.keys.member(member.node), body, is_leased=True),
                Write(sim.keys.host(member.host), member.node.encode("ascii"), is_leased=True),
                Write(sim.keys.known_node(member.node), known_to_json(known)),
            ],
            ttl_s=sim.settings.lease_s,
        )
        state._announcer._told = (state.lease_serial, body)
