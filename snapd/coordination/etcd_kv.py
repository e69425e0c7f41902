"""The key-value store in etcd v3: for clusters of any size.

The messages and stubs are those of `aetcd`; connections, deadlines, leases and watches are ours, because its client
knows one server only and no TLS, hides most error codes, and its watch on a server that hangs does not end
(docs/adr/0009). Every call has a deadline. Reads and renewals are tried on each endpoint in turn; a transaction is sent
once, since its answer may be lost.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from aetcd import rpc

from snapd.coordination.kv import Change, Check, Entry, Reading, Write, check_transaction
from snapd.core.keyspace import checked_key
from snapd.errors import FencedError, SnapdError, UnavailableError

TIMEOUT_S = 3.0
MESSAGE_BYTES_MAX = 64 << 20
SILENCE_S = 5.0  # a watch that has told nothing for so long asks whether its server is alive
LEASE_S_MIN = 2  # etcd grants no shorter ones
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses pings closer than 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
# The server is not to be had, or does not know: another one may.
_TRY_ANOTHER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}
_TARGET_VERSION, _RESULT_EQUAL, _EVENT_DELETE = 0, 0, 1  # numbers of etcd's rpc.proto and kv.proto
_IS_STALE = "auth store is old"  # the token is older than the last change of users or roles
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAccess:
    """How to get in. `ca`, `cert`, `key`: PEM; with `is_tls` and no `ca`, the system's authorities count."""

    is_tls: bool = False
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    user: str = ""
    password: str = ""


class _Server:
    """One endpoint: its channel reconnects by itself and is kept until the end; closing it under a call that waits
    would look like a cancellation.
    """

    def __init__(self, endpoint: str, access: EtcdAccess) -> None:
        self.endpoint = endpoint
        if access.is_tls:
            credentials = grpc.ssl_channel_credentials(access.ca, access.key, access.cert)
            self.channel = grpc.aio.secure_channel(endpoint, credentials, OPTIONS)
        else:
            self.channel = grpc.aio.insecure_channel(endpoint, OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        self.watch = rpc.WatchStub(self.channel)
        self.auth = rpc.AuthStub(self.channel)


class EtcdKeyValue:
    """One client with one lease. Implements `KeyValue`; must be made on the running event loop.

    Where etcd asks for a user, its role needs read and write below the cluster's prefix.
    """

    def __init__(
        self, endpoints: Sequence[str], *, access: EtcdAccess | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._access = access or EtcdAccess()
        self._servers = [_Server(endpoint, self._access) for endpoint in endpoints]
        self._timeout_s = timeout_s
        self._at = 0
        self._lease = 0
        self._revision = 0  # the newest that an answer named
        self._metadata: tuple[tuple[str, str], ...] | None = None if self._access.user else ()

    async def read(self, prefix: str) -> Reading:
        first = checked_key(prefix).encode("ascii")
        request = rpc.RangeRequest(key=first, range_end=_end_of(first))
        reply = await self._ask(lambda server, rest: server.kv.Range(request, **rest))
        items = {kv.key.decode("ascii", "replace"): Entry(kv.value, kv.version) for kv in reply.kvs}
        self._revision = reply.header.revision
        return Reading(self._revision, items)

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        check_transaction(checks, writes)
        if not self._lease and any(write.is_leased and write.value is not None for write in writes):
            raise FencedError("the lease has ended, and its keys with it", kind="lease")
        request = rpc.TxnRequest(
            compare=[
                rpc.Compare(
                    result=_RESULT_EQUAL,
                    target=_TARGET_VERSION,
                    key=check.key.encode("ascii"),
                    version=check.version,
                )
                for check in checks
            ],
            success=[self._operation(write) for write in writes],
        )
        try:
            reply = await self._ask(lambda server, rest: server.kv.Txn(request, **rest), is_repeatable=False)
        except FencedError:
            self._lease = 0
            raise
        self._revision = reply.header.revision
        return bool(reply.succeeded)

    async def keep_lease(self, ttl_s: float) -> None:
        if not self._lease:
            request = rpc.LeaseGrantRequest(TTL=max(LEASE_S_MIN, math.ceil(ttl_s)), ID=0)
            self._lease = (await self._ask(lambda server, rest: server.lease.LeaseGrant(request, **rest))).ID
            return
        if await self._ask(self._renew) <= 0:
            self._lease = 0
            raise FencedError("the lease has ended, and its keys with it", kind="lease")

    async def end_lease(self) -> None:
        lease, self._lease = self._lease, 0
        if lease:
            request = rpc.LeaseRevokeRequest(ID=lease)
            try:
                await self._ask(lambda server, rest: server.lease.LeaseRevoke(request, **rest))
            except FencedError:
                return  # it had ended

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        """See `KeyValue.watch`; kinds `compacted`, `watch`, `unavailable`."""
        first = checked_key(prefix).encode("ascii")
        server = self._servers[self._at]
        create = rpc.WatchCreateRequest(
            key=first, range_end=_end_of(first), start_revision=after_revision + 1
        )
        call: Any = None
        try:
            # With `hasleader` a server that lost its quorum ends the stream instead of falling silent.
            metadata = (*(await self._credentials(server)), ("hasleader", "true"))
            call = server.watch.Watch(metadata=metadata)
            async with asyncio.timeout(self._timeout_s):
                await call.write(rpc.WatchRequest(create_request=create))
                created = await call.read()
            _check_watch(created)
            if created.header.revision < after_revision:
                raise UnavailableError("the store's revision has gone back", kind="compacted")
            while True:
                reply = await self._next_of(call, server, first)
                _check_watch(reply)
                self._revision = reply.header.revision
                for event in reply.events:
                    yield _change(event)
        except TimeoutError as error:
            self._turn_from(server)
            raise UnavailableError("etcd does not answer", kind="deadline") from error
        except asyncio.InvalidStateError as error:  # the stream had ended before it was written to
            self._turn_from(server)
            raise UnavailableError("etcd ended the watch", kind="watch") from error
        except grpc.aio.AioRpcError as error:
            self._turn_from(server)
            raise _told(error, server) from error
        finally:
            if call is not None:
                call.cancel()

    async def _next_of(self, call: Any, server: _Server, key: bytes) -> Any:
        """The watch's next answer. Silence is broken by a small question: pings do not find a server that hangs."""
        reading = asyncio.ensure_future(call.read())
        try:
            while True:
                done, _ = await asyncio.wait({reading}, timeout=SILENCE_S)
                if done:
                    return reading.result()
                probe = rpc.RangeRequest(key=key, count_only=True, serializable=True)
                await server.kv.Range(
                    probe, timeout=self._timeout_s, metadata=await self._credentials(server)
                )
        finally:
            reading.cancel()

    async def compact(self, keep_revisions: int) -> None:
        """Let etcd forget all but the newest `keep_revisions` revisions that this client knows of. One client of a
        cluster calls it, now and then.
        """
        revision = self._revision - keep_revisions
        if revision <= 0:
            return
        request = rpc.CompactionRequest(revision=revision)
        try:
            await self._ask(lambda server, rest: server.kv.Compact(request, **rest))
        except UnavailableError as error:
            if error.kind != "compacted":
                raise

    async def close(self) -> None:
        """The lease ends by itself, or by `end_lease` before."""
        for server in self._servers:
            await server.channel.close(None)

    async def _ask(
        self, call: Callable[[_Server, dict[str, Any]], Awaitable[Answer]], *, is_repeatable: bool = True
    ) -> Answer:
        """The answer of the first server that gives one, beginning with the last that did."""
        tries = len(self._servers) if is_repeatable else 1
        for left in range(tries - 1, -1, -1):
            server = self._servers[self._at]
            try:
                return await self._ask_one(server, call)
            except grpc.aio.AioRpcError as error:
                told = _told(error, server)
                if error.code() in _TRY_ANOTHER and told.kind != "compacted":
                    self._turn_from(server)
                    if left:
                        continue
                raise told from error
        raise UnavailableError("no etcd endpoint", kind="etcd")

    async def _ask_one(
        self, server: _Server, call: Callable[[_Server, dict[str, Any]], Awaitable[Answer]]
    ) -> Answer:
        rest = {"timeout": self._timeout_s, "metadata": await self._credentials(server)}
        try:
            return await call(server, rest)
        except grpc.aio.AioRpcError as error:
            is_stale = error.code() is grpc.StatusCode.UNAUTHENTICATED or _IS_STALE in (error.details() or "")
            if not is_stale or not self._access.user:
                raise
        self._metadata = (
            None  # tokens end after some minutes, with a server's restart, when users are changed
        )
        rest["metadata"] = await self._credentials(server)
        return await call(server, rest)

    async def _credentials(self, server: _Server) -> tuple[tuple[str, str], ...]:
        if self._metadata is None:
            request = rpc.AuthenticateRequest(name=self._access.user, password=self._access.password)
            try:
                reply = await server.auth.Authenticate(request, timeout=self._timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() in _TRY_ANOTHER:
                    raise
                raise UnavailableError(
                    f"etcd refuses user {self._access.user!r}: {error.details()}", kind="etcd_user"
                ) from error
            self._metadata = (("token", reply.token),)
        return self._metadata

    async def _renew(self, server: _Server, rest: dict[str, Any]) -> int:
        """The time to live that is left, in seconds; 0: the lease has ended."""
        call = server.lease.LeaseKeepAlive(**rest)
        try:
            await call.write(rpc.LeaseKeepAliveRequest(ID=self._lease))
            reply = await call.read()
        except asyncio.InvalidStateError as error:
            raise UnavailableError("etcd did not renew the lease", kind="etcd") from error
        finally:
            call.cancel()
        if not isinstance(reply, rpc.LeaseKeepAliveResponse):
            raise UnavailableError("etcd did not renew the lease", kind="etcd")
        return int(reply.TTL)

    def _operation(self, write: Write) -> Any:
        key = write.key.encode("ascii")
        if write.value is None:
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        lease = self._lease if write.is_leased else 0
        return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=write.value, lease=lease))

    def _turn_from(self, server: _Server) -> None:
        if self._servers[self._at] is server:
            self._at = (self._at + 1) % len(self._servers)


def _check_watch(reply: Any) -> None:
    if not isinstance(reply, rpc.WatchResponse):  # the end of the stream
        raise UnavailableError("etcd ended the watch", kind="watch")
    if reply.compact_revision:
        raise UnavailableError("this revision is not to be had any more", kind="compacted")
    if reply.canceled:
        raise UnavailableError(f"etcd ended the watch: {reply.cancel_reason}", kind="watch")


def _change(event: Any) -> Change:
    kv = event.kv
    if event.type == _EVENT_DELETE:
        return Change(kv.key.decode("ascii", "replace"), None, 0, kv.mod_revision)
    return Change(kv.key.decode("ascii", "replace"), kv.value, kv.version, kv.mod_revision)


def _end_of(prefix: bytes) -> bytes:
    """The first key behind all that begin with `prefix` (which ends in printable ASCII)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _told(error: grpc.aio.AioRpcError, server: _Server) -> SnapdError:
    """What etcd's error means to us. Its text decides where one code has several meanings."""
    code, details = error.code(), error.details() or ""
    text = f"etcd at {server.endpoint}: {details or code.name}"
    if "lease not found" in details:
        return FencedError("the lease has ended, and its keys with it", kind="lease")
    if "compacted" in details:
        return UnavailableError(text, kind="compacted")
    if "space exceeded" in details:
        return UnavailableError(
            text, kind="etcd_full", hint="compact and defragment etcd, then `etcdctl alarm disarm`"
        )
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return UnavailableError(text, kind="etcd_user", hint="user, password and role of etcd")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(text, kind="deadline")
    return UnavailableError(text, kind="etcd")
