"""Calls to other daemons over gRPC: PeerCalls of runtime/peers.py. One channel per peer and address."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import NodeReport
from snapd.core.restore import RankReport, Verdicts
from snapd.errors import UnavailableError
from snapd.rpc import peer_convert as convert
from snapd.rpc.status import error_of
from snapd.runtime.peers import NodeFacts, Records, ReportAnswer, WorldAsk, WorldPlan

CALL_TIMEOUT_S = 5.0
RECORDS_TIMEOUT_S = 30.0
TAKE_TIMEOUT_S = 600.0
MESSAGE_BYTES_MAX = 256 << 20
PEER_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]
Reply = TypeVar("Reply")
MakeChannel = Callable[[str, str], grpc.aio.Channel]  # (node, address)


class PeerCallsGrpc:
    """Implements PeerCalls. `address_of` gives a node's address or None; `sender` says who we are, at every call;
    `credentials`: another object when the certificates have changed."""

    def __init__(
        self,
        address_of: Callable[[str], str | None],
        make_channel: MakeChannel,
        sender: Callable[[], peer_pb2.Sender],
        credentials: Callable[[], object] | None = None,
    ) -> None:
        self._address_of = address_of
        self._make_channel = make_channel
        self._sender = sender
        self._credentials = credentials or (lambda: None)
        self._channels: dict[str, tuple[str, object, grpc.aio.Channel]] = {}
        self._closing: list[grpc.aio.Channel] = []

    def stub(self, node: str) -> Any:
        """Raises UnavailableError (kind `peer_unknown`): no such member."""
        address = self._address_of(node)
        if address is None:
            raise UnavailableError(f"node {node} is no member now", kind="peer_unknown", node=node)
        known, credentials = self._channels.get(node), self._credentials()
        if known is None or known[0] != address or known[1] is not credentials:
            if known is not None:
                self._closing.append(known[2])
            known = self._channels[node] = (address, credentials, self._make_channel(node, address))
        return peer_pb2_grpc.PeerStub(known[2])

    async def close(self) -> None:
        for channel in [*self._closing, *(channel for _, _, channel in self._channels.values())]:
            await channel.close(None)
        self._channels.clear()
        self._closing.clear()

    async def _call(self, node: str, call: Awaitable[Reply]) -> Reply:
        try:
            return await call
        except grpc.RpcError as error:
            found = error_of(error)
            if isinstance(found, UnavailableError):
                found.context.setdefault("node", node)
            raise found from error

    async def report(
        self, node: str, job: str, report: NodeReport, *, known_orders: int, hold_s: float
    ) -> ReportAnswer:
        request = convert.report_to_proto(
            self._sender(), job, report, known_orders=known_orders, hold_s=hold_s
        )
        reply = await self._call(node, self.stub(node).Report(request, timeout=hold_s + CALL_TIMEOUT_S))
        return convert.answer_from_proto(reply)

    async def inventory(self, node: str, job: str) -> Inventory:
        request = peer_pb2.InventoryRequest(sender=self._sender(), job=job)
        reply = await self._call(node, self.stub(node).Inventory(request, timeout=CALL_TIMEOUT_S))
        return convert.inventory_from_proto(reply)

    async def fetch_records(
        self,
        node: str,
        job: str,
        snapshot: SnapshotId,
        *,
        ranks: Sequence[int] = (),
        own_only: bool = False,
        epoch: int = 0,
    ) -> Records:
        request = peer_pb2.FetchRecordsRequest(
            sender=self._sender(),
            job=job,
            generation=snapshot.generation,
            step=snapshot.step,
            ranks=ranks,
            own_only=own_only,
            epoch=epoch,
        )
        reply = await self._call(node, self.stub(node).FetchRecords(request, timeout=RECORDS_TIMEOUT_S))
        return convert.records_from_proto(reply)

    async def plan_world_restore(self, node: str, job: str, ask: WorldAsk, *, timeout_s: float) -> WorldPlan:
        request = convert.ask_to_proto(self._sender(), job, ask)
        reply = await self._call(node, self.stub(node).PlanWorldRestore(request, timeout=timeout_s))
        return convert.plan_from_proto(reply)

    async def finish_world_restore(
        self,
        node: str,
        job: str,
        generation: int,
        number: int,
        rank: int,
        report: RankReport,
        *,
        timeout_s: float,
    ) -> Verdicts:
        request = peer_pb2.FinishWorldRestoreRequest(
            sender=self._sender(),
            job=job,
            generation=generation,
            rank=rank,
            report=convert.rank_report_to_proto(number, report),
        )
        reply = await self._call(node, self.stub(node).FinishWorldRestore(request, timeout=timeout_s))
        return convert.verdicts_from_proto(reply)

    async def take_shard(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        request = peer_pb2.TakeShardRequest(
            sender=self._sender(), job=job, generation=snapshot.generation, step=snapshot.step, rank=rank
        )
        await self._call(node, self.stub(node).TakeShard(request, timeout=TAKE_TIMEOUT_S))

    async def suspect(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        request = peer_pb2.SuspectRequest(
            sender=self._sender(), job=job, generation=snapshot.generation, step=snapshot.step, rank=rank
        )
        await self._call(node, self.stub(node).Suspect(request, timeout=CALL_TIMEOUT_S))

    async def node_facts(self, node: str) -> NodeFacts:
        request = peer_pb2.NodeStatusRequest(sender=self._sender())
        reply = await self._call(node, self.stub(node).NodeStatus(request, timeout=CALL_TIMEOUT_S))
        return convert.facts_from_proto(reply, reply.software_version)
