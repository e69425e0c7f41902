"""Which of several daemons is the leader: a store that moves on to the next candidate when one does not answer as such.

Candidates are a static list, `[NODE@]HOST:PORT,...`, or `dns:NAME:PORT`: every address of a name (a headless service of
Kubernetes), resolved anew whenever all that are known were tried in vain.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.coordination.kv import Change, Check, Reading, Write
from snapd.core.addresses import join, split
from snapd.core.cluster import Seed
from snapd.errors import UnavailableError
from snapd.rpc.peer_calls import MakeChannel
from snapd.rpc.remote_kv import RemoteKeyValue

RESOLVE_TIMEOUT_S = 5.0
Answer = TypeVar("Answer")


class LeaderStore:
    """A `coordination.kv.KeyValue`: that of whichever seed is the leader."""

    def __init__(
        self,
        seeds: Sequence[Seed],
        make_channel: MakeChannel,
        sender: Callable[[], peer_pb2.Sender],
        *,
        client: str,
    ) -> None:
        self._seeds = tuple(seeds)
        self._make_channel = make_channel
        self._known = [
            (seed.node, seed.address) for seed in seeds
        ]  # a name to resolve is a target as it is, too
        self._at = 0
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self._store = RemoteKeyValue(self._stub, sender, client=client)

    def _stub(self) -> peer_pb2_grpc.PeerAsyncStub:
        name = self._known[self._at % len(self._known)]
        if name not in self._channels:
            self._channels[name] = self._make_channel(*name)
        return peer_pb2_grpc.PeerStub(self._channels[name])

    async def _seek(self, answer: Awaitable[Answer]) -> Answer:
        try:
            return await answer
        except UnavailableError:
            await self._next()
            raise

    async def _next(self) -> None:
        self._at += 1
        if self._at % len(self._known) == 0 and any(seed.is_dns for seed in self._seeds):
            self._known = await self._resolved() or self._known

    async def _resolved(self) -> list[tuple[str, str]]:
        loop = asyncio.get_running_loop()
        found: set[tuple[str, str]] = set()
        for seed in self._seeds:
            if not seed.is_dns:
                found.add((seed.node, seed.address))
                continue
            host, port = split(seed.address, "the leader's address")
            try:
                answers = await asyncio.wait_for(
                    loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), RESOLVE_TIMEOUT_S
                )
            except (OSError, TimeoutError):
                continue  # the store is away; its own error says so
            hosts = (str(answer[4][0]) for answer in answers)
            found.update((seed.node, join(ip, port)) for ip in hosts)
        return sorted(found)

    # KeyValue

    async def read(self, prefix: str) -> Reading:
        return await self._seek(self._store.read(prefix))

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        return await self._seek(self._store.transact(checks, writes))

    async def keep_lease(self, ttl_s: float) -> None:
        await self._seek(self._store.keep_lease(ttl_s))

    async def end_lease(self) -> None:
        await self._store.end_lease()

    def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        return self._store.watch(prefix, after_revision)

    async def compact(self, keep_revisions: int) -> None:
        """The leader's own history is bounded."""

    async def close(self) -> None:
        await self._store.close()
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
