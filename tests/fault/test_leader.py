"""A leader's store for a few nodes, over gRPC: the leader is killed, restarted from its file, and loses its file.

In one process, on loopback, in real time; "killed" means that its server, its state and its store stop without a word.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.coordination.highwater import HighwaterStore
from snapd.coordination.kv import KeyValue, Write
from snapd.coordination.settings import ClusterSettings
from snapd.core.cluster import Seed
from snapd.errors import UnavailableError
from snapd.rpc.kv_service import KeyValueService
from snapd.rpc.leader_finder import LeaderStore
from snapd.rpc.remote_kv import CHANNEL_OPTIONS, RemoteKeyValue
from tests.support.clusters import ASKED, Cluster, Daemon, member, settled

SETTINGS = ClusterSettings(asked=ASKED, lease_s=1.0, lost_after_s=3.0, retry_max_s=0.5)


class Service(KeyValueService, peer_pb2_grpc.PeerServicer):
    class node:
        class context:
            class log:
                @staticmethod
                def info(event: str, **fields: object) -> None:
                    """The log of a daemon; nobody reads it here."""

    def _admit(self, sender: peer_pb2.Sender, context: Any) -> None:
        assert sender.node


class Leader:
    """A daemon that others name their coordinator."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.port = 0
        self.starts = 0
        self.client: KeyValue | None = None

    async def start(self) -> None:
        self.starts += 1
        self._store = KvServer(self.file, monotonic_s=time.monotonic)
        self._running = asyncio.ensure_future(self._store.run())
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        peer_pb2_grpc.add_PeerServicer_to_server(Service(self._store), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        self.client = LocalKeyValue(self._store, f"leader/{self.starts}")

    async def kill(self) -> None:
        self._running.cancel()
        self._store.close()
        await self._server.stop(None)


@asynccontextmanager
async def scene(file: Path) -> AsyncIterator[tuple[Leader, Cluster]]:
    leader = Leader(file)
    await leader.start()
    channels: list[grpc.aio.Channel] = []

    def connect(node: str) -> KeyValue:
        if node == "leader":
            assert leader.client is not None
            return leader.client
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{leader.port}", CHANNEL_OPTIONS))
        stub = peer_pb2_grpc.PeerStub(channels[-1])
        return RemoteKeyValue(
            lambda: stub, lambda: peer_pb2.Sender(node=node), client=f"life-{len(channels)}", timeout_s=1.0
        )

    cluster = Cluster(connect, SETTINGS)
    try:
        async with asyncio.timeout(60):
            yield leader, cluster
    finally:
        await cluster.stop()
        for channel in channels:
            await channel.close()
        await leader.kill()


async def restarted(
    cluster: Cluster, leader: Leader, died: Daemon, highwater: HighwaterStore | None
) -> Daemon:
    await leader.start()
    await died.stop()
    return cluster.start(member("leader"), highwater)


async def dies(leader: Leader, daemons: list[Daemon]) -> None:
    await leader.kill()
    for daemon in daemons:
        await daemon.until(lambda state: state.away is not None, 10)


def test_a_leader_that_restarts_finds_its_cluster_as_it_was(tmp_path: Path) -> None:
    async def work() -> None:
        async with scene(tmp_path / "kv.db") as (leader, cluster):
            daemons = [cluster.start(member(name)) for name in ("leader", "a", "b")]
            table = await settled(daemons, "leader", "a", "b")
            await dies(leader, daemons)
            assert all(daemon.state.table == table for daemon in daemons)
            daemons[0] = await restarted(cluster, leader, daemons[0], daemons[0].highwater)
            assert await settled(daemons, "leader", "a", "b") == table
            assert not any(daemon.events("cluster.distrusted") for daemon in daemons)

    asyncio.run(work())


def test_a_leader_that_lost_everything_is_rebuilt_from_the_others(tmp_path: Path) -> None:
    """Its machine was replaced: no file, no highwater mark, another arena."""

    async def work() -> None:
        file = tmp_path / "kv.db"
        async with scene(file) as (leader, cluster):
            daemons = [cluster.start(member(name)) for name in ("leader", "a", "b")]
            table = await settled(daemons, "leader", "a", "b")
            daemons[1].state.saw_generation("job", 5)
            await dies(leader, daemons)
            for path in tmp_path.glob("kv.db*"):
                path.unlink()
            daemons[0] = await restarted(cluster, leader, daemons[0], None)
            newer = await settled(daemons, "leader", "a", "b")
            assert newer.epoch > table.epoch
            assert all(daemon.events("cluster.distrusted") for daemon in daemons[1:]), "they had seen more"
            assert all(daemon.state.generation_seen("job") == 5 for daemon in daemons)

    asyncio.run(work())


def test_a_node_that_dies_is_lost_and_its_successor_taken_up(tmp_path: Path) -> None:
    async def work() -> None:
        async with scene(tmp_path / "kv.db") as (_, cluster):
            daemons = [cluster.start(member(name)) for name in ("leader", "a", "b")]
            table = await settled(daemons, "leader", "a", "b")
            await daemons[2].stop()
            newer = await settled(daemons[:2], "leader", "a")
            assert newer.epoch > table.epoch
            daemons[2] = cluster.start(member("b", arena="arena-2"))
            await settled(daemons, "leader", "a", "b")
            assert daemons[0].state.members["b"].arena_id == "arena-2"

    asyncio.run(work())


def test_one_of_several_seeds_is_found_to_be_the_leader(tmp_path: Path) -> None:
    """The first seed is dead, the second is a daemon that does not lead, the third leads."""

    async def work() -> None:
        bystander = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        peer_pb2_grpc.add_PeerServicer_to_server(Service(None), bystander)
        other = bystander.add_insecure_port("127.0.0.1:0")
        await bystander.start()
        async with scene(tmp_path / "kv.db") as (leader, _):
            seeds = [Seed("", f"127.0.0.1:{port}") for port in (9, other)] + [
                Seed("", f"localhost:{leader.port}", is_dns=True)
            ]
            store = LeaderStore(
                seeds,
                lambda _, address: grpc.aio.insecure_channel(address, CHANNEL_OPTIONS),
                lambda: peer_pb2.Sender(node="seeker"),
                client="life",
            )
            assert leader.client is not None
            await leader.client.transact([], [Write("/snapd/t/a", b"1")])
            kinds = []
            for _ in range(12):
                try:
                    reading = await store.read("/snapd/")
                    break
                except UnavailableError as error:
                    kinds.append(error.kind)
            assert "/snapd/t/a" in reading.items
            assert "not_leader" in kinds and len(set(kinds)) > 1
            await store.close()
        await bystander.stop(None)

    asyncio.run(work())
