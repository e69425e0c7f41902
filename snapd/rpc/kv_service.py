"""The Kv calls of the Peer service: the store of an embedded leader, for daemons that name it their coordinator.

A client's leases carry its node's name, so nobody can write under another's, or end it.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator

from snapd_proto import peer_pb2

from snapd.coordination.embedded_kv import KvServer
from snapd.coordination.kv import Check, Write
from snapd.errors import AuthError, SnapdError, UnavailableError
from snapd.rpc.guard import ServicerContext, refuse, told


class KeyValueService(abc.ABC):
    """A mixin: the servicer provides `node` (for `told`) and `_admit`. `server` None: this daemon is no leader."""

    def __init__(self, server: KvServer | None) -> None:
        self._kv_server = server

    @abc.abstractmethod
    def _admit(self, sender: peer_pb2.Sender, context: ServicerContext) -> None:
        """Raises what a caller is refused with."""

    @told
    async def KvRead(self, request: peer_pb2.KvReadRequest, context: ServicerContext) -> peer_pb2.KvReadReply:
        reading = self._server(request.sender, context).read(request.prefix)
        return peer_pb2.KvReadReply(
            revision=reading.revision,
            items=[
                peer_pb2.KvEntry(key=key, value=entry.value, version=entry.version)
                for key, entry in reading.items.items()
            ],
        )

    @told
    async def KvTransact(
        self, request: peer_pb2.KvTransactRequest, context: ServicerContext
    ) -> peer_pb2.KvTransactReply:
        server = self._server(request.sender, context)
        checks = [Check(check.key, check.version) for check in request.checks]
        writes = [
            Write(write.key, write.value if write.has_value else None, write.is_leased)
            for write in request.writes
        ]
        lease = _lease_of(request.sender, request.lease) if request.lease else ""
        return peer_pb2.KvTransactReply(done=server.transact(lease, checks, writes))

    @told
    async def KvKeepLease(
        self, request: peer_pb2.KvKeepLeaseRequest, context: ServicerContext
    ) -> peer_pb2.KvKeepLeaseReply:
        server = self._server(request.sender, context)
        server.keep_lease(_lease_of(request.sender, request.lease), request.ttl_s, is_new=request.is_new)
        return peer_pb2.KvKeepLeaseReply()

    @told
    async def KvEndLease(
        self, request: peer_pb2.KvEndLeaseRequest, context: ServicerContext
    ) -> peer_pb2.KvEndLeaseReply:
        self._server(request.sender, context).end_lease(_lease_of(request.sender, request.lease))
        return peer_pb2.KvEndLeaseReply()

    async def KvWatch(
        self, request: peer_pb2.KvWatchRequest, context: ServicerContext
    ) -> AsyncIterator[peer_pb2.KvChange]:
        try:
            server = self._server(request.sender, context)
            # So that the client knows that it is heard before anything changes.
            await context.send_initial_metadata(())
            async for change in server.watch(request.prefix, request.after_revision):
                yield peer_pb2.KvChange(
                    key=change.key,
                    has_value=change.value is not None,
                    value=change.value or b"",
                    version=change.version,
                    revision=change.revision,
                )
        except SnapdError as error:
            await refuse(context, error)

    def _server(self, sender: peer_pb2.Sender, context: ServicerContext) -> KvServer:
        self._admit(sender, context)
        if self._kv_server is None:
            raise UnavailableError(
                "this daemon does not lead a cluster",
                kind="not_leader",
                hint='set cluster.coordinator = "leader" on the daemon that the others name',
            )
        return self._kv_server


def _lease_of(sender: peer_pb2.Sender, lease: str) -> str:
    if not lease.startswith(sender.node + "/"):
        raise AuthError("the lease is another node's", kind="lease_owner", node=sender.node)
    return lease
