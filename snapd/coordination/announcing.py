"""How a daemon takes its place in the cluster: one daemon to a node name, and to a host unless allowed otherwise."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from snapd.coordination.kv import Check, Write
from snapd.core.cluster import Member
from snapd.core.membership import Announcement, Known, announcement_to_json, known_to_json
from snapd.errors import ConflictError, FencedError

if TYPE_CHECKING:
    from snapd.coordination.cluster import ClusterState

CONFLICT_LEASES = 2.0  # so many leases long the one before us may still be seen after its end
POLL_S_MAX = 0.5
RETRY_S = 0.1


class Announcer:
    """Belongs to one `ClusterState`."""

    def __init__(self, state: ClusterState, member: Member) -> None:
        self._state = state
        self.member = member
        self.wake = asyncio.Event()
        self._told: tuple[int, bytes] = (0, b"")  # under which lease, what
        self._conflict_since_s: float | None = None

    async def announce(self) -> None:
        """Write this member, leased. Waits while the place is held by one that may be our predecessor.

        Raises:
            ConflictError: kinds `duplicate_node`, `same_host`. UnavailableError, FencedError.
        """
        state = self._state
        while True:
            conflict = self._conflict()
            if conflict is None:
                self._conflict_since_s = None
                if self._is_told() or await self._write():
                    return
            else:
                self._wait_or_raise(conflict)
            await asyncio.sleep(min(POLL_S_MAX, state.settings.lease_s / 4))
            await state.store.keep_lease(state.settings.lease_s)
            await state.read_anew()

    async def keep_announced(self) -> None:
        """Announce again whenever there is something else to say (a doubt)."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            while not self._is_told():
                if not await self._write():
                    await asyncio.sleep(RETRY_S)  # our view of our own key is behind; the watch brings it

    def check_ours(self) -> None:
        """Our key has changed.

        Raises:
            FencedError: kind `lease`: it is gone. ConflictError: kind `duplicate_node`: another daemon took it.
        """
        found = self._state.view.members.get(self.member.node)
        if found is None:
            self._told = (0, b"")
            raise FencedError("this node's announcement is gone", kind="lease")
        if not self._is_ours(found.member):
            raise _duplicate(self.member, found.member)

    def _is_told(self) -> bool:
        key = self._state.keys.member(self.member.node)
        return self._told == (self._state.lease_serial, self._body()) and self._state.view.version(key) > 0

    def _body(self) -> bytes:
        needs = self._state.needs_epoch_above
        generations = self._state.seen.generations if needs else {}
        return announcement_to_json(Announcement(self.member, needs, generations))

    async def _write(self) -> bool:
        state, keys, member = self._state, self._state.keys, self.member
        key, body, serial = keys.member(member.node), self._body(), state.lease_serial
        version = state.view.version(key)
        checks, writes = [Check(key, version)], [Write(key, body, is_leased=True)]
        known = Known(member.node, member.host, member.domain, member.arena_id)
        if state.view.known.get(member.node) != known:
            writes.append(Write(keys.known_node(member.node), known_to_json(known)))
        if not state.settings.allow_same_host:
            host = keys.host(member.host)
            checks.append(Check(host, state.view.version(host)))
            writes.append(Write(host, member.node.encode("ascii"), is_leased=True))
        if not await state.store.transact(checks, writes):
            return False
        self._told = (serial, body)
        if state.view.version(key) == version:  # the watch may have been quicker than the answer
            state.view.apply(key, body, version + 1)
        return True

    def _conflict(self) -> ConflictError | None:
        view, member = self._state.view, self.member
        found = view.members.get(member.node)
        if found is not None and not self._is_ours(found.member):
            return _duplicate(member, found.member)
        other = "" if self._state.settings.allow_same_host else view.hosts.get(member.host, "")
        if other and other != member.node:
            return ConflictError(
                f"host {member.host!r} has a daemon already, node {other!r}: both would be lost together",
                kind="same_host",
                hint="one daemon per host; for a trial a cluster.host of its own, or cluster.allow_same_host",
                node=member.node,
            )
        return None

    def _is_ours(self, other: Member) -> bool:
        """Ourselves, or a predecessor that must be dead: the same arena, or the same address of the same host (we
        listen there now).
        """
        mine = self.member
        return other.host == mine.host and (other.arena_id == mine.arena_id or other.address == mine.address)

    def _wait_or_raise(self, conflict: ConflictError) -> None:
        now_s = self._state.environment.monotonic_s()
        if self._conflict_since_s is None:
            self._conflict_since_s = now_s
            self._state.note("member.conflict", {"kind": conflict.kind, "reason": str(conflict)})
        if now_s - self._conflict_since_s >= CONFLICT_LEASES * self._state.settings.lease_s + 1:
            raise conflict


def _duplicate(mine: Member, other: Member) -> ConflictError:
    return ConflictError(
        f"node {mine.node!r} is another living daemon's name: host {other.host!r} at {other.address}",
        kind="duplicate_node",
        hint="give each daemon a node name of its own, and stop the one that is not wanted",
        host=mine.host,
    )
