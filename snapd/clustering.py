"""The cluster's wiring: store, state, peers' servers and links, protection, restores. Nothing is decided here."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from snapd_proto import peer_pb2

from snapd import __version__
from snapd.codec.isal import make_codec
from snapd.config import Config
from snapd.config_cluster import ClusterPlan
from snapd.coordination.cluster import ClusterState
from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.coordination.etcd_url import open_etcd
from snapd.coordination.highwater import HighwaterFile
from snapd.coordination.kv import KeyValue
from snapd.coordination.settings import ClusterEnvironment, ClusterSettings
from snapd.core.addresses import is_loopback, join
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
from snapd.peer.grpc_peer import TransferService, dial_grpc
from snapd.peer.identity import Identity, admit_token
from snapd.peer.limits import PeerLimits
from snapd.peer.links import Dial, PeerLinks
from snapd.peer.rate import Pacer
from snapd.peer.serving import Serving
from snapd.peer.side_channel import BulkServer, dial_socket
from snapd.peer.traffic import TrafficMeter
from snapd.peer.trust import Trust, TrustFiles
from snapd.rpc.leader_finder import LeaderStore
from snapd.rpc.peer_calls import MakeChannel, PeerCallsGrpc
from snapd.rpc.peer_server import PeerServer, channels
from snapd.rpc.peer_service import sender_of
from snapd.runtime.bringing import Bringer
from snapd.runtime.bulk_store import NodeBulkStore
from snapd.runtime.cluster import Cluster
from snapd.runtime.cluster_parts import ClusterParts
from snapd.runtime.collecting import CollectorSettings
from snapd.runtime.node import Node
from snapd.runtime.node_protection import NodeProtection
from snapd.runtime.pipeline import Pipeline
from snapd.runtime.protecting import FetchRecords, Means
from snapd.runtime.recovering import RecoveryMeans
from snapd.runtime.repairing import Repairs
from snapd.runtime.world_restoring import WorldRestores

if TYPE_CHECKING:
    from snapd.coordination.etcd_kv import EtcdKeyValue  # its client is an extra

STOP_GRACE_S = 1.0


@dataclass(slots=True)
class Clustering:
    """Everything of a running member; `stop` takes it down in reverse."""

    cluster: Cluster
    server: PeerServer
    bulk: BulkServer
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
        await self.server.stop(STOP_GRACE_S)
        loop = asyncio.get_running_loop()
        for close in (self.bulk.close, self.links.close, self.pipeline.close):
            await loop.run_in_executor(None, close)
        await self.calls.close()
        await self.store.close()
        if self.kv_server is not None:
            self.kv_server.close()


async def start_cluster(config: Config, plan: ClusterPlan, node: Node) -> Clustering:
    """Join the cluster. The node's jobs are not taken up yet.

    Raises:
        ConfigError: an address that cannot be listened on, certificates that cannot be used, ...
    """
    wiring = _Wiring(config, plan, node)
    tasks = [node.context.spawn(wiring.kv_server.run(), "coordinator")] if wiring.kv_server else []
    cluster = wiring.make_cluster()
    serving = wiring.make_serving()
    bulk = BulkServer(serving, wiring.trust if plan.bulk == "tls" else None)
    if plan.bulk != "grpc":
        bulk.start(plan.listen_host, plan.bulk_port)
    server = PeerServer(node, cluster, TransferService(serving), wiring.trust)
    await server.start(join(plan.listen_host, plan.port))
    node.cluster = cluster
    bringer = wiring.make_bringer()
    node.restores = WorldRestores(cluster, bringer, wait_s=config.cluster.restore_wait)
    node.repairs = Repairs(cluster, bringer, wiring.metrics)
    return Clustering(
        cluster=cluster,
        server=server,
        bulk=bulk,
        links=wiring.links,
        calls=wiring.calls,
        pipeline=wiring.pipeline,
        protection=wiring.protection,
        store=wiring.store,
        kv_server=wiring.kv_server,
        tasks=tasks,
    )


class _Wiring:
    """The parts, in the order in which they need one another."""

    def __init__(self, config: Config, plan: ClusterPlan, node: Node) -> None:
        self.config, self.plan, self.node = config, plan, node
        self.log, self.clock = node.context.log, node.context.environment.monotonic_s
        self.trust = _trust(config, plan, self.clock, self.log)
        self.make_channel = channels(self.trust)
        arena = node.context.arena.path
        self.kv_server = (
            KvServer(arena / "coordination.db", monotonic_s=self.clock) if plan.is_leader else None
        )
        self.asked = _Asked()
        self.store = _store(config, plan, self.kv_server, self.make_channel, self.sender)
        self.state = self.make_state(arena)
        self.meter = TrafficMeter()
        self.links = PeerLinks(
            self.bulk_address_of,
            _dial(plan, self.trust),
            Asking(identity=self.identity, clock=self.clock, meter=self.meter),
            pacer=Pacer(self.clock, config.cluster.rate or None),
        )
        credentials = self.trust.material if self.trust is not None else None
        self.calls = PeerCallsGrpc(self.address_of, self.make_channel, self.sender, credentials)
        self.pipeline = Pipeline(bytes_max=config.cluster.inflight)
        self.metrics = ProtectionMetrics(node.context.metrics.registry)
        self.bulk_store = NodeBulkStore(node.jobs.get, asyncio.get_running_loop())
        self.protection = self.make_protection()

    # what the parts ask

    @property
    def cluster(self) -> Cluster:
        assert self.asked.cluster is not None
        return self.asked.cluster

    def sender(self) -> peer_pb2.Sender:
        return sender_of(self.cluster)

    def token(self) -> Token:
        return self.state.token or Token("", 0)

    def identity(self) -> Identity:
        return Identity(self.plan.node, self.token())

    def address_of(self, name: str) -> str | None:
        found = self.state.members.get(name)
        return found.address if found is not None else None

    def bulk_address_of(self, name: str) -> str:
        found = self.state.members.get(name)
        if found is None:
            raise UnavailableError(f"node {name} is no member now", kind="peer_unknown", node=name)
        return found.address if self.plan.bulk == "grpc" else found.bulk_address

    def note(self, event: str, fields: Mapping[str, object]) -> None:
        shown = {
            key: value if isinstance(value, int | float) else str(value) for key, value in fields.items()
        }
        self.log.info(event, **shown)

    def suspect(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        self.node.context.spawn(self.cluster.suspect(node, job, snapshot, rank), f"suspect {node}")

    # the parts

    def make_state(self, arena: Path) -> ClusterState:
        plan, settings = self.plan, self.config.cluster
        member = Member(
            node=plan.node,
            host=plan.host,
            domain=plan.domain,
            address=plan.address,
            bulk_address=plan.bulk_address,
            arena_id=arena_id(arena),
            version=__version__,
        )
        return ClusterState(
            self.store,
            member,
            ClusterSettings(
                asked=plan.code,
                lease_s=settings.lease,
                lost_after_s=settings.lost_after,
                allow_same_host=settings.allow_same_host == "yes",
            ),
            keys=Keyspace(plan.name),
            environment=ClusterEnvironment(
                monotonic_s=self.clock, chance=random.random, random_id=lambda: secrets.token_hex(8)
            ),
            highwater=HighwaterFile(arena / "highwater.json"),
            place=place,
            note=self.note,
        )

    def make_protection(self) -> NodeProtection:
        def fetch_records(job: str) -> FetchRecords:
            return lambda name, snapshot: self.asked.own(name, job, snapshot)

        means = Means(
            node=self.plan.node,
            links=self.links.paced,
            pipeline=self.pipeline,
            make_codec=make_codec,
            fetch_records=fetch_records,
            suspect=self.suspect,
            may_replace=lambda job, snapshot, epoch: self.cluster.worlds[job].may_replace(snapshot, epoch),
            metrics=self.metrics,
            commits=self.bulk_store.commits,
        )
        return NodeProtection(
            means,
            changed=lambda name: self.cluster.worlds[name].changed(),
            epoch=lambda: self.cluster.epoch,
            traffic=lambda: (self.meter.total().sent_bytes, self.meter.total().received_bytes),
        )

    def make_cluster(self) -> Cluster:
        node, settings = self.node, self.node.context.settings
        cluster = Cluster(
            ClusterParts(
                state=self.state,
                calls=self.calls,
                protection=self.protection,
                collector_settings=CollectorSettings(
                    restore_settle_s=settings.restore_settle_s,
                    restore_finish_s=settings.restore_finish_s,
                    restore_wait_s=self.config.cluster.restore_wait,
                    interval_factor_max=settings.interval_factor_max,
                ),
                jobs=node,
                log=self.log,
                instance=node.instance,
                version=__version__,
                monotonic_s=self.clock,
                spawn=node.context.spawn,
                arena_bytes=lambda: sum(node.held_by_job().values()),
                kv_server=self.kv_server,
            )
        )
        self.asked.cluster = cluster
        return cluster

    def make_bringer(self) -> Bringer:
        return Bringer(
            RecoveryMeans(
                node=self.plan.node,
                store=self.bulk_store,
                links=self.links,
                pipeline=self.pipeline,
                make_codec=make_codec,
                fetch_own=self.asked.own,
                fetch_rows=self.asked.rows,
                metrics=self.metrics,
            ),
            lambda: self.node.tier_restores,
        )

    def make_serving(self) -> Serving:
        return Serving(
            store=self.bulk_store,
            identity=self.identity,
            admit=admit_token(self.token),
            clock=self.clock,
            log_once=self.log.once,
            meter=self.meter,
        )


class _Asked:
    """Records for the protector and for recovery, by way of the cluster (the own node is asked as any other)."""

    cluster: Cluster | None = None

    async def own(self, node: str, job: str, snapshot: SnapshotId) -> list[ShardRecord]:
        assert self.cluster is not None
        records = await self.cluster.fetch_records(node, job, snapshot, own_only=True)
        return [record for _, record in records.placed]

    async def rows(
        self, node: str, job: str, snapshot: SnapshotId, epoch: int
    ) -> tuple[RowMap, list[PlacedRecord]]:
        assert self.cluster is not None
        records = await self.cluster.fetch_records(node, job, snapshot, epoch=epoch)
        if records.code is None or records.epoch != epoch:
            raise NotFoundError(
                "the node has no row map of that epoch", kind="row_map", node=node, epoch=epoch
            )
        row_map = RowMap(snapshot, records.epoch, records.group, records.nodes, records.code)
        return row_map, [PlacedRecord(owner, record) for owner, record in records.placed]


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
    return LeaderStore(plan.seeds, make_channel, sender, client=client)


def _etcd(config: Config, plan: ClusterPlan) -> EtcdKeyValue:
    """The store in etcd; `etcds://` speaks TLS with the cluster's files."""
    settings = config.cluster
    is_tls = plan.coordinator.startswith("etcds://")
    names = (settings.ca, settings.cert, settings.key) if is_tls else ("", "", "")
    try:
        ca, cert, key = (Path(name).read_bytes() if name else None for name in names)
        password = Path(settings.etcd_password_file).read_text("utf-8") if settings.etcd_password_file else ""
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", kind="etcd_access") from error
    return open_etcd(
        plan.coordinator, ca=ca, cert=cert, key=key, user=settings.etcd_user, password=password.strip()
    )
