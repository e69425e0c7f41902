"""The key-value store of another daemon, the leader, over the Kv calls of peer.proto: a `coordination.kv.KeyValue`.

Every call has a deadline, so a leader that hangs is one that is away. The channel reconnects by itself; a watch ends
with the connection. The calls carry no cluster id and no epoch: those are what is found out by them, and a daemon that
knows old ones must be able to learn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.coordination.kv import Change, Check, Entry, Reading, Write
from snapd.errors import ConfigError, FencedError, SnapdError, UnavailableError
from snapd.rpc.status import error_of

TIMEOUT_S = 5.0
MESSAGE_BYTES_MAX = 64 << 20
# What a channel to a leader is made with: a dead connection is found within seconds, also while only a watch waits.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class RemoteKeyValue:
    """`make_stub` is called for each call (and may return the same stub); `sender` says who calls, as of now; `client`
    is a fresh name of this daemon's life: leases are `NODE/client.N`.
    """

    def __init__(
        self,
        make_stub: Callable[[], peer_pb2_grpc.PeerAsyncStub],
        sender: Callable[[], peer_pb2.Sender],
        *,
        client: str,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._make_stub, self._sender, self._client = make_stub, sender, client
        self._timeout_s = timeout_s
        self._count = 0
        self._is_open = False

    async def read(self, prefix: str) -> Reading:
        request = peer_pb2.KvReadRequest(sender=self._caller(), prefix=prefix)
        try:
            reply = await self._make_stub().KvRead(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _told(error) from error
        return Reading(reply.revision, {item.key: Entry(item.value, item.version) for item in reply.items})

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        request = peer_pb2.KvTransactRequest(
            sender=self._caller(),
            checks=[peer_pb2.KvCheck(key=check.key, version=check.version) for check in checks],
            writes=[
                peer_pb2.KvWrite(
                    key=write.key,
                    has_value=write.value is not None,
                    value=write.value or b"",
                    is_leased=write.is_leased,
                )
                for write in writes
            ],
            lease=self._lease() if self._is_open else "",
        )
        try:
            reply = await self._make_stub().KvTransact(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _told(error) from error
        return reply.done

    async def keep_lease(self, ttl_s: float) -> None:
        if not self._is_open:
            self._count += 1
        request = peer_pb2.KvKeepLeaseRequest(
            sender=self._caller(), lease=self._lease(), ttl_s=ttl_s, is_new=not self._is_open
        )
        try:
            await self._make_stub().KvKeepLease(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            told = _told(error)
            if isinstance(told, FencedError) and told.kind == "lease":
                self._is_open = False
            raise told from error
        self._is_open = True

    async def end_lease(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        request = peer_pb2.KvEndLeaseRequest(sender=self._caller(), lease=self._lease())
        try:
            await self._make_stub().KvEndLease(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _told(error) from error

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        request = peer_pb2.KvWatchRequest(sender=self._caller(), prefix=prefix, after_revision=after_revision)
        call = self._make_stub().KvWatch(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                await call.initial_metadata()  # the leader sends it at once
            async for change in call:
                yield Change(
                    change.key, change.value if change.has_value else None, change.version, change.revision
                )
        except TimeoutError as error:
            raise UnavailableError("the leader does not answer", kind="deadline") from error
        except grpc.RpcError as error:
            raise _told(error) from error
        finally:
            call.cancel()
        raise UnavailableError("the leader ended the watch", kind="watch")

    async def close(self) -> None:
        """The channel belongs to whoever made it; the lease ends by itself, or by `end_lease`."""

    def _caller(self) -> peer_pb2.Sender:
        sender = peer_pb2.Sender()
        sender.CopyFrom(self._sender())
        sender.cluster_id, sender.epoch = "", 0
        return sender

    def _lease(self) -> str:
        return f"{self._sender().node}/{self._client}.{self._count}"


def _told(error: grpc.RpcError) -> SnapdError:
    """A lease that ended, and what is wrong with our own call, stay as they are; all else is a leader that is away."""
    told = error_of(error)
    if isinstance(told, UnavailableError | ConfigError) or (
        isinstance(told, FencedError) and told.kind == "lease"
    ):
        return told
    return UnavailableError(f"the leader refused or failed: {told.message}", kind=told.kind, hint=told.hint)
