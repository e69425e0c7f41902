"""Snapshots that commands are reading: kept until they are done."""

from __future__ import annotations

import asyncio

from snapd.core.ids import SnapshotId
from snapd.runtime.job import Job
from snapd.runtime.liveness import Peer


class Readers:
    """A snapshot whose segments were handed to a command is kept until the command's connection ends, at most
    `held_max_s`: a command that is stopped (Ctrl-Z) must not take the slots of a running job for ever.
    """

    def __init__(self, held_max_s: float) -> None:
        self._held_max_s = held_max_s
        self._held: dict[Peer, list[tuple[Job, SnapshotId]]] = {}

    def hold(self, peer: Peer, job: Job, snapshot: SnapshotId) -> None:
        """`peer` reads `snapshot`. Idempotent."""
        held = self._held.setdefault(peer, [])
        if (job, snapshot) in held:
            return
        if not held:
            asyncio.get_running_loop().call_later(self._held_max_s, self.let_go, peer)
        job.ledger.hold(snapshot)
        held.append((job, snapshot))

    def let_go(self, peer: Peer) -> None:
        """The peer is done, or has had its time."""
        for job, snapshot in self._held.pop(peer, ()):
            job.ledger.unhold(snapshot)
            job.settle()
