"""The Peer service: what other daemons ask of this one. See proto/snapd/v1/peer.proto."""

from __future__ import annotations

from typing import cast

from snapd_proto import peer_pb2, peer_pb2_grpc, trainer_pb2

from snapd import __version__
from snapd.core.cluster import checked_node_name
from snapd.core.ids import checked_job_name
from snapd.errors import AuthError, ConfigError, FencedError, UnavailableError
from snapd.peer.grpc_peer import CallContext, TransferService, certificate_names
from snapd.rpc import peer_convert as convert
from snapd.rpc.guard import ServicerContext, told
from snapd.rpc.kv_service import KeyValueService
from snapd.runtime.cluster import Cluster
from snapd.runtime.node import Node

PROTOCOL_VERSION = 1
PROTOCOL_VERSIONS = (1, 2)  # neighbours one version apart work together


class PeerService(KeyValueService, peer_pb2_grpc.PeerServicer):
    """One per daemon of a cluster. `is_trusted_transport`: mutual TLS names the caller."""

    def __init__(self, node: Node, cluster: Cluster, transfers: TransferService, *, is_tls: bool) -> None:
        KeyValueService.__init__(self, cluster.kv_server)
        self.node = node
        self.cluster = cluster
        self._is_tls = is_tls
        self._transfers = transfers

    def sender(self) -> peer_pb2.Sender:
        return sender_of(self.cluster)

    def _admit(self, sender: peer_pb2.Sender, context: ServicerContext) -> None:
        """Raises AuthError: another name or cluster; FencedError: an older epoch after a store was wiped."""
        checked_node_name(sender.node)
        if sender.protocol_version not in PROTOCOL_VERSIONS:
            raise ConfigError(
                f"node {sender.node} speaks protocol {sender.protocol_version}",
                kind="peer_version",
                hint="neighbours one version apart work together: update the older one",
            )
        if self._is_tls:
            names = certificate_names(cast(CallContext, context)) or ()
            if sender.node not in names:
                raise AuthError(
                    f"the certificate is not of node {sender.node}",
                    kind="peer_name",
                    hint="`snapd certs show` lists the names of a certificate",
                    names=", ".join(sorted(names))[:200],
                )
        if sender.cluster_id and self.cluster.cluster_id and sender.cluster_id != self.cluster.cluster_id:
            raise FencedError(
                f"node {sender.node} belongs to another cluster", kind="cluster_id", node=sender.node
            )

    @told
    async def Greet(self, request: peer_pb2.GreetRequest, context: ServicerContext) -> peer_pb2.GreetReply:
        self._admit(request.sender, context)
        return peer_pb2.GreetReply(answerer=self.sender(), software_version=__version__)

    @told
    async def Report(self, request: peer_pb2.ReportRequest, context: ServicerContext) -> peer_pb2.ReportReply:
        self._admit(request.sender, context)
        report = convert.report_from_proto(request)
        answer = await self.cluster.take_report(
            request.job,
            report,
            known_orders=request.known_orders,
            hold_s=min(max(0.0, request.hold_s), convert.HOLD_S_MAX),
        )
        return peer_pb2.ReportReply(
            is_collector=answer.is_collector,
            collector=answer.collector,
            orders=convert.orders_to_proto(answer.orders),
        )

    @told
    async def PlanWorldRestore(
        self, request: peer_pb2.PlanWorldRestoreRequest, context: ServicerContext
    ) -> peer_pb2.PlanWorldRestoreReply:
        self._admit(request.sender, context)
        ask = convert.ask_from_proto(request)
        return convert.plan_to_proto(await self.cluster.collector(request.job).plan(ask))

    @told
    async def FinishWorldRestore(
        self, request: peer_pb2.FinishWorldRestoreRequest, context: ServicerContext
    ) -> trainer_pb2.FinishRestoreReply:
        self._admit(request.sender, context)
        checked_job_name(request.job)
        verdicts = await self.cluster.collector(request.job).finish(
            request.generation, request.report.round, request.rank, convert.rank_report_from_proto(request)
        )
        return convert.verdicts_to_proto(verdicts)

    @told
    async def Inventory(
        self, request: peer_pb2.InventoryRequest, context: ServicerContext
    ) -> peer_pb2.InventoryReply:
        self._admit(request.sender, context)
        checked_job_name(request.job)
        return convert.inventory_to_proto(self.sender(), self.cluster.own_inventory(request.job))

    @told
    async def FetchRecords(
        self, request: peer_pb2.FetchRecordsRequest, context: ServicerContext
    ) -> peer_pb2.FetchRecordsReply:
        self._admit(request.sender, context)
        checked_job_name(request.job)
        records = self.cluster.own_records(
            request.job,
            convert.snapshot_of(request.generation, request.step),
            ranks=set(request.ranks),
            own_only=request.own_only,
            epoch=request.epoch,
        )
        return convert.records_to_proto(records)

    @told
    async def TakeShard(
        self, request: peer_pb2.TakeShardRequest, context: ServicerContext
    ) -> peer_pb2.TakeShardReply:
        self._admit(request.sender, context)
        checked_job_name(request.job)
        snapshot = convert.snapshot_of(request.generation, request.step)
        if self.node.repairs is None:
            raise UnavailableError("this node is not ready", kind="starting")
        await self.node.repairs.take(self.node.job_for(request.job), snapshot, request.rank)
        return peer_pb2.TakeShardReply()

    @told
    async def Suspect(
        self, request: peer_pb2.SuspectRequest, context: ServicerContext
    ) -> peer_pb2.SuspectReply:
        self._admit(request.sender, context)
        checked_job_name(request.job)
        self.cluster.own_suspect(
            request.job, convert.snapshot_of(request.generation, request.step), request.rank
        )
        return peer_pb2.SuspectReply()

    @told
    async def NodeStatus(
        self, request: peer_pb2.NodeStatusRequest, context: ServicerContext
    ) -> peer_pb2.NodeStatusReply:
        self._admit(request.sender, context)
        facts = self.cluster.own_facts()
        return peer_pb2.NodeStatusReply(
            answerer=self.sender(),
            arena_bytes=facts.arena_bytes,
            parity_bytes=facts.parity_bytes,
            sent_bytes=facts.sent_bytes,
            received_bytes=facts.received_bytes,
            trouble=facts.trouble,
            jobs=facts.jobs,
            exposure_byte_s=facts.exposure_byte_s,
            software_version=__version__,
            is_draining=facts.is_draining,
            drain_waits_for=facts.drain_waits_for,
        )

    async def Transfer(  # type: ignore[override]  # read and write on the context: the stubs know generators only
        self, request_iterator: object, context: ServicerContext
    ) -> None:
        """Bulk bytes where the side channel is not to be had."""
        await self._transfers.serve(cast(CallContext, context))


def sender_of(cluster: Cluster) -> peer_pb2.Sender:
    return peer_pb2.Sender(
        node=cluster.name,
        cluster_id=cluster.cluster_id,
        epoch=cluster.epoch,
        arena_id=cluster.arena_id,
        protocol_version=PROTOCOL_VERSION,
    )
