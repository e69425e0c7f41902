"""The cluster's wiring: store, state, peers' servers and links, protection, restores. Nothing is decided here."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd import __version__
from snapd.codec.ec import ErasureCodec
from snapd.config import Config
from snapd.config_cluster import ClusterPlan, is_loopback, join
from snapd.coordination.cluster import ClusterState
from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.coordination.etcd_url import open_etcd
from snapd.coordination.highwater import HighwaterFile
from snapd.coordination.kv import KeyValue
from snapd.coordination.settings import ClusterEnvironment, ClusterSettings
from snapd.core.cluster import Member, Token
from snapd.core.ids import SnapshotId
from snapd.core.keyspace import Keyspace
from snapd.core.manifest import ShardRecord
from snapd.core.placement import place
from snapd.core.protection import PlacedRecord, RowMap
from snapd.errors import ConfigError, NotFoundError, UnavailableError
from snapd.obs.log import EventLog
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.asking import Asking
from snapd.peer.grpc_peer import (
    TransferService,
    channel_credentials,
    channel_options,
    dial_grpc,
    server_credentials,
)
from snapd.peer.identity import Identity, admit_token
from snapd.peer.limits import PeerLimits
from snapd.peer.links import Dial, PeerLinks
from snapd.peer.rate import Pacer
from snapd.peer.serving import Serving
from snapd.peer.side_channel import BulkServer, dial_socket
from snapd.peer.traffic import TrafficMeter
from snapd.peer.trust import Trust, TrustFiles
from snapd.rpc.peer_calls import PEER_OPTIONS, MakeChannel, PeerCallsGrpc
from snapd.rpc.peer_service import PeerService, sender_of
from snapd.rpc.remote_kv import RemoteKeyValue
from snapd.runtime.bringing import Bringer
from snapd.runtime.bulk_store import NodeBulkStore
from snapd.runtime.cluster import Cluster, ClusterParts
from snapd.runtime.collecting import CollectorSettings
from snapd.runtime.node import Node
from snapd.runtime.node_protection import NodeProtection
from snapd.runtime.pipeline import Pipeline
from snapd.runtime.protecting import FetchRecords, Means
from snapd.runtime.recovering import RecoveryMeans
from snapd.runtime.world_restoring import WorldRestores

if TYPE_CHECKING:
    from snapd.coordination.etcd_kv import EtcdKeyValue  # its client is an extra

STOP_GRACE_S = 1.0


def arena_id(arena: Path) -> str:
    """The arena's id: new when it began empty, the same for as long as its files are there."""
    path = arena / "arena-id"
    try:
        known = path.read_text("ascii").strip()
    except FileNotFoundError:
        known = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", kind="folder") from error
    if not known:
        known = secrets.token_hex(8)
        path.write_text(known + "\n", "ascii")
    return known


@dataclass(slots=True)
class Clustering:
    """Everything of a running member; `stop` takes it down in reverse."""

    cluster: Cluster
    server: grpc.aio.Server
    bulk: BulkServer
    transfers: TransferService
    links: PeerLinks
    calls: PeerCallsGrpc
    pipeline: Pipeline
    protection: NodeProtection
    store: KeyValue
    kv_server: KvServer | None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def stop(self) -> None:
        await self.cluster.stop()
        await self.protection.close()
        for task in self.tasks:
            task.cancel()
        self.transfers.close()
        await self.server.stop(STOP_GRACE_S)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.bulk.close)
        await loop.run_in_executor(None, self.links.close)
        await loop.run_in_executor(None, self.pipeline.close)
        await self.calls.close()
        await self.store.close()
        if self.kv_server is not None:
            self.kv_server.close()


async def start_cluster(config: Config, plan: ClusterPlan, node: Node) -> Clustering:
    """Join the cluster. The node's jobs are not taken up yet.

    Raises:
        ConfigError: an address that cannot be listened on, certificates that cannot be used, ...
    """
    environment = node.context.environment
    log = node.context.log
    member = Member(
        node=plan.node,
        host=plan.host,
        domain=plan.domain,
        address=plan.address,
        bulk_address=plan.bulk_address,
        arena_id=arena_id(node.context.arena.path),
        version=__version__,
    )
    kv_server = (
        KvServer(node.context.arena.path / "coordination.db", monotonic_s=environment.monotonic_s)
        if plan.is_leader
        else None
    )

    trust = _trust(config, plan, environment.monotonic_s, log)

    def make_channel(name: str, address: str) -> grpc.aio.Channel:
        if trust is None:
            return grpc.aio.insecure_channel(address, options=PEER_OPTIONS)
        options = [*PEER_OPTIONS, *channel_options(name)]
        return grpc.aio.secure_channel(address, channel_credentials(trust), options=options)

    def note(event: str, fields: Mapping[str, object]) -> None:
        log.info(
            event,
            **{key: value if isinstance(value, int | float) else str(value) for key, value in fields.items()},
        )

    def sender() -> peer_pb2.Sender:
        return sender_of(cluster)

    store = _store(config, plan, kv_server, make_channel, sender)
    state = ClusterState(
        store,
        member,
        ClusterSettings(
            asked=plan.code,
            lease_s=config.cluster.lease,
            lost_after_s=config.cluster.lost_after,
            allow_same_host=config.cluster.allow_same_host == "yes",
        ),
        keys=Keyspace(plan.name),
        environment=ClusterEnvironment(
            monotonic_s=environment.monotonic_s,
            chance=random.random,
            random_id=lambda: secrets.token_hex(8),
        ),
        highwater=HighwaterFile(node.context.arena.path / "highwater.json"),
        place=place,
        note=note,
    )

    def address_of(name: str) -> str | None:
        found = state.members.get(name)
        return found.address if found is not None else None

    def bulk_address_of(name: str) -> str:
        found = state.members.get(name)
        if found is None:
            raise UnavailableError(f"node {name} is no member now", kind="peer_unknown", node=name)
        return found.address if plan.bulk == "grpc" else found.bulk_address

    def identity() -> Identity:
        return Identity(plan.node, state.token or Token("", 0))

    meter = TrafficMeter()
    links = PeerLinks(
        bulk_address_of,
        _dial(plan, trust),
        Asking(identity=identity, clock=environment.monotonic_s, meter=meter),
        pacer=Pacer(environment.monotonic_s, config.cluster.rate or None),
    )
    calls = PeerCallsGrpc(address_of, make_channel, sender, trust.material if trust is not None else None)
    pipeline = Pipeline(bytes_max=config.cluster.inflight)
    metrics = ProtectionMetrics(node.context.metrics.registry)
    asked = _Asked(calls)

    def fetch_records(job: str) -> FetchRecords:
        return lambda name, snapshot: asked.own(name, job, snapshot)

    protection = NodeProtection(
        Means(
            node=plan.node,
            links=links.paced,
            pipeline=pipeline,
            make_codec=ErasureCodec,
            fetch_records=fetch_records,
            metrics=metrics,
        ),
        changed=lambda name: cluster.worlds[name].changed(),
        epoch=lambda: cluster.epoch,
        traffic=lambda: (meter.total().sent_bytes, meter.total().received_bytes),
    )
    settings = node.context.settings
    cluster = Cluster(
        ClusterParts(
            state=state,
            calls=calls,
            protection=protection,
            collector_settings=CollectorSettings(
                restore_settle_s=settings.restore_settle_s,
                restore_finish_s=settings.restore_finish_s,
                restore_wait_s=config.cluster.restore_wait,
                interval_factor_max=settings.interval_factor_max,
            ),
            jobs=node,
            log=log,
            instance=node.instance,
            version=__version__,
            monotonic_s=environment.monotonic_s,
            spawn=node.context.spawn,
            arena_bytes=lambda: sum(node.held_by_job().values()),
            kv_server=kv_server,
        )
    )
    asked.cluster = cluster
    bulk_store = NodeBulkStore(node.jobs.get, asyncio.get_running_loop())
    bringer = Bringer(
        RecoveryMeans(
            node=plan.node,
            store=bulk_store,
            links=links,
            pipeline=pipeline,
            make_codec=ErasureCodec,
            fetch_own=asked.own,
            fetch_rows=asked.rows,
            metrics=metrics,
        )
    )
    node.cluster = cluster
    node.restores = WorldRestores(cluster, bringer, wait_s=config.cluster.restore_wait)
    serving = Serving(
        store=bulk_store,
        identity=identity,
        admit=admit_token(lambda: state.token or Token("", 0)),
        clock=environment.monotonic_s,
        log_once=log.once,
        meter=meter,
    )
    bulk = BulkServer(serving, trust if plan.bulk == "tls" else None)
    if plan.bulk != "grpc":
        bulk.start(plan.listen_host, plan.bulk_port)
    transfers = TransferService(serving)
    server = grpc.aio.server(options=[*PEER_OPTIONS, ("grpc.so_reuseport", 0)])
    service = PeerService(node, cluster, transfers, is_tls=trust is not None)
    peer_pb2_grpc.add_PeerServicer_to_server(service, server)
    try:
        listen = join(plan.listen_host, plan.port)
        if trust is None:
            server.add_insecure_port(listen)
        else:
            server.add_secure_port(listen, server_credentials(trust))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {plan.listen_host}:{plan.port}",
            kind="address",
            hint="is another daemon there?",
        ) from error
    await server.start()
    tasks = [node.context.spawn(kv_server.run(), "coordinator")] if kv_server is not None else []
    parts = (cluster, server, bulk, transfers, links, calls, pipeline, protection, store, kv_server)
    return Clustering(*parts, tasks)


def _trust(config: Config, plan: ClusterPlan, clock: Callable[[], float], log: EventLog) -> Trust | None:
    """Our certificates; None in plaintext."""
    if plan.is_plaintext:
        if not is_loopback(plan.advertise):
            log.warning("cluster.plaintext", reason="peers are not authenticated and nothing is encrypted")
        return None
    settings = config.cluster
    files = TrustFiles(Path(settings.cert), Path(settings.key), Path(settings.ca))
    return Trust(plan.node, files, clock=clock, log_once=log.once)


def _dial(plan: ClusterPlan, trust: Trust | None) -> Dial:
    if plan.bulk == "grpc":
        return dial_grpc(trust)
    return dial_socket(trust if plan.bulk == "tls" else None, stall_s=PeerLimits().stall_s)


class _Asked:
    """Records for the protector and for recovery, by way of the cluster (the own node is asked as any other)."""

    def __init__(self, calls: PeerCallsGrpc) -> None:
        self.calls = calls
        self.cluster: Cluster | None = None

    async def own(self, node: str, job: str, snapshot: SnapshotId) -> list[ShardRecord]:
        assert self.cluster is not None
        records = await self.cluster.fetch_records(node, job, snapshot, own_only=True)
        return [record for _, record in records.placed]

    async def rows(
        self, node: str, job: str, snapshot: SnapshotId, epoch: int
    ) -> tuple[RowMap, list[PlacedRecord]]:
        assert self.cluster is not None
        records = await self.cluster.fetch_records(node, job, snapshot)
        if records.code is None or records.epoch != epoch:
            raise NotFoundError(
                "the node has no row map of that epoch", kind="row_map", node=node, epoch=epoch
            )
        row_map = RowMap(snapshot, records.epoch, records.group, records.nodes, records.code)
        return row_map, [PlacedRecord(owner, record) for owner, record in records.placed]


def _etcd(config: Config, plan: ClusterPlan) -> EtcdKeyValue:
    """The store in etcd; `etcds://` speaks TLS with the cluster's files."""
    settings = config.cluster
    names = (
        (settings.ca, settings.cert, settings.key)
        if plan.coordinator.startswith("etcds://")
        else ("", "", "")
    )
    try:
        ca, cert, key = (Path(name).read_bytes() if name else None for name in names)
        password = Path(settings.etcd_password_file).read_text("utf-8") if settings.etcd_password_file else ""
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", kind="etcd_access") from error
    return open_etcd(
        plan.coordinator, ca=ca, cert=cert, key=key, user=settings.etcd_user, password=password.strip()
    )


def _store(
    config: Config,
    plan: ClusterPlan,
    kv_server: KvServer | None,
    make_channel: MakeChannel,
    sender: Callable[[], peer_pb2.Sender],
) -> KeyValue:
    client = secrets.token_hex(8)
    if kv_server is not None:
        return LocalKeyValue(kv_server, f"{plan.node}/{client}")
    if plan.etcd_endpoints:
        return _etcd(config, plan)
    stub = peer_pb2_grpc.PeerStub(make_channel(plan.leader_node, plan.leader_address))
    return RemoteKeyValue(lambda: stub, sender, client=client)
