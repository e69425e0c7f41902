"""Links to peers by node name: a few connections to each, made when needed, tried again when they fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from snapd.errors import AuthError, DeadlineExceeded, FencedError, SnapdError, UnavailableError
from snapd.peer.asking import Asking, PeerConnection
from snapd.peer.base import FragmentName, Links, Name, PeerLink, Pushed
from snapd.peer.deadline import Deadline
from snapd.peer.identity import Identity
from snapd.peer.rate import Pacer
from snapd.peer.stream import ByteStream

T = TypeVar("T")


class Dial(Protocol):
    """Opens a stream to a node's address (`host:port`); raises OSError, ConfigError or AuthError."""

    def __call__(self, node: str, address: str, deadline: Deadline) -> ByteStream: ...


@dataclass(slots=True)
class _Idle:
    connection: PeerConnection
    address: str
    since_s: float


class PeerLinks:
    """The `Links` of a node. Thread-safe."""

    def __init__(
        self, resolve: Callable[[str], str], dial: Dial, asking: Asking, *, pacer: Pacer | None = None
    ) -> None:
        """`resolve` gives a node's present address; raises UnavailableError (kind `peer_unknown`)."""
        self._resolve, self._dial, self._asking, self._pacer = resolve, dial, asking, pacer
        self._lock = threading.Lock()
        # Paced calls have connections of their own: one that waits for tokens must not hold up a restore.
        self._pools: dict[tuple[str, bool], _Pool] = {}
        self._is_closed = False

    def to(self, node: str) -> PeerLink:
        """At full speed: for restores."""
        return _Link(self._pool(node, is_paced=False), None)

    @property
    def paced(self) -> Links:
        """At the pacer's rate: for protection."""
        return _PacedLinks(self)

    def paced_to(self, node: str) -> PeerLink:
        return _Link(self._pool(node, is_paced=True), self._pacer)

    def forget(self, node: str) -> None:
        """Close what leads to a node that is no member any more."""
        with self._lock:
            pools = [pool for is_paced in (False, True) if (pool := self._pools.pop((node, is_paced), None))]
        for pool in pools:
            pool.close()

    def close(self) -> None:
        """Break off everything; later calls raise UnavailableError."""
        with self._lock:
            self._is_closed = True
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            pool.close()

    def _pool(self, node: str, *, is_paced: bool) -> _Pool:
        self._resolve(node)
        with self._lock:
            if self._is_closed:
                raise UnavailableError("the links are closed", kind="closed")
            pool = self._pools.get((node, is_paced))
            if pool is None:
                pool = _Pool(node, self._resolve, self._dial, self._asking)
                self._pools[node, is_paced] = pool
            return pool


class _PacedLinks:
    def __init__(self, links: PeerLinks) -> None:
        self._links = links

    def to(self, node: str) -> PeerLink:
        return self._links.paced_to(node)


class _Link:
    """A `PeerLink` over a pool."""

    def __init__(self, pool: _Pool, pacer: Pacer | None) -> None:
        self._pool, self._pacer = pool, pacer

    def fetch(self, wanted: Sequence[tuple[Name, memoryview]], *, timeout_s: float) -> list[bytes]:
        return self._pool.run(lambda c, d: c.fetch(wanted, d, self._pacer), timeout_s)

    def push(self, pushed: Sequence[Pushed], *, timeout_s: float) -> list[SnapdError | None]:
        return self._pool.run(lambda c, d: c.push(pushed, d, self._pacer), timeout_s)

    def holds(self, names: Sequence[FragmentName], *, timeout_s: float) -> list[bool]:
        return self._pool.run(lambda c, d: c.holds(names, d), timeout_s)

    def close(self) -> None:
        self._pool.close()


class _Pool:
    """The connections to one node. A call has one to itself; who finds none free waits."""

    def __init__(self, node: str, resolve: Callable[[str], str], dial: Dial, asking: Asking) -> None:
        self._node, self._resolve, self._dial, self._asking = node, resolve, dial, asking
        self._changed = threading.Condition()
        self._idle: list[_Idle] = []
        self._busy: set[PeerConnection] = set()
        self._count = 0  # idle, busy, and being made
        self._is_closed = False
        self._failure: tuple[str, Identity, SnapdError] | None = None  # at which address, as whom
        self._pause_s, self._retry_at_s = 0.0, 0.0

    def run(self, call: Callable[[PeerConnection, Deadline], T], timeout_s: float) -> T:
        """Run `call` on a connection, once more on a new one if the peer had closed the old one meanwhile."""
        deadline = Deadline(self._asking.clock, timeout_s)
        try:
            connection, address = self._take(deadline)
            had_answered = connection.answered_count
            try:
                return self._run_on(connection, address, call, deadline)
            except ConnectionError:
                is_stale = had_answered > 0 and connection.answered_count == had_answered
                if not is_stale:
                    raise
            self._drop_idle()
            connection, address = self._take(deadline)
            return self._run_on(connection, address, call, deadline)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._node} did not answer in time", node=self._node, timeout_s=round(timeout_s, 3)
            ) from error
        except OSError as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                connection.stream.interrupt()
            self._changed.notify_all()
        for item in idle:
            item.connection.stream.close()

    def _run_on(
        self,
        connection: PeerConnection,
        address: str,
        call: Callable[[PeerConnection, Deadline], T],
        deadline: Deadline,
    ) -> T:
        is_kept = False
        try:
            result = call(connection, deadline)
            is_kept = True
            return result
        except (AuthError, FencedError):
            raise  # the server closes after these
        except SnapdError:
            is_kept = connection.is_usable
            raise
        finally:
            self._give_back(connection, address, is_kept)

    def _take(self, deadline: Deadline) -> tuple[PeerConnection, str]:
        """A connection for the caller alone; makes one if none is idle and there may be another."""
        limits = self._asking.limits
        while True:
            address, identity = self._resolve(self._node), self._asking.identity()
            with self._changed:
                if self._is_closed:
                    raise UnavailableError(f"the link to {self._node} is closed", kind="closed")
                self._drop_stale(address, identity)
                if self._idle:
                    connection = self._idle.pop().connection
                    self._busy.add(connection)
                    return connection, address
                self._raise_recent_failure(address, identity)
                if self._count < limits.connections_per_peer:
                    self._count += 1
                    break
                self._changed.wait(deadline.remaining_s())
        return self._connect(address, identity, deadline), address

    def _connect(self, address: str, identity: Identity, deadline: Deadline) -> PeerConnection:
        """Open and greet; the caller has counted it already."""
        connection: PeerConnection | None = None
        stream: ByteStream | None = None
        try:
            soon = deadline.within(self._asking.limits.hello_s)
            stream = self._dial(self._node, address, soon)
            connection = PeerConnection(self._node, stream, self._asking)
            connection.greet(soon)
        except (OSError, SnapdError) as error:
            if not (isinstance(error, TimeoutError) and deadline.is_over):
                self._note_failure(address, identity, error)
            raise
        finally:
            with self._changed:
                if connection is not None and connection.is_greeted and not self._is_closed:
                    self._busy.add(connection)
                    self._failure, self._pause_s = None, 0.0
                else:
                    self._count -= 1
                    self._changed.notify()
                    if stream is not None:
                        stream.close()
        return connection

    def _give_back(self, connection: PeerConnection, address: str, is_kept: bool) -> None:
        with self._changed:
            self._busy.discard(connection)
            if is_kept and not self._is_closed:
                self._idle.append(_Idle(connection, address, self._asking.clock()))
            else:
                self._count -= 1
                connection.stream.close()
            self._changed.notify()

    def _drop_stale(self, address: str, identity: Identity) -> None:
        """Close what leads to an old address, greeted with an old token, or will be closed by the peer soon."""
        oldest_s = self._asking.clock() - self._asking.limits.idle_s / 2
        for item in list(self._idle):
            is_current = item.address == address and item.connection.identity == identity
            if not is_current or item.since_s < oldest_s:
                self._idle.remove(item)
                self._count -= 1
                item.connection.stream.close()

    def _drop_idle(self) -> None:
        """The peer closed one: it has most likely closed the others too."""
        with self._changed:
            idle, self._idle = self._idle, []
            self._count -= len(idle)
        for item in idle:
            item.connection.stream.close()

    def _note_failure(self, address: str, identity: Identity, error: OSError | SnapdError) -> None:
        limits = self._asking.limits
        known = error if isinstance(error, SnapdError) else self._unavailable(error)
        with self._changed:
            self._failure = (address, identity, known)
            self._pause_s = min(limits.backoff_max_s, self._pause_s * 2 or limits.backoff_first_s)
            self._retry_at_s = self._asking.clock() + self._pause_s

    def _raise_recent_failure(self, address: str, identity: Identity) -> None:
        """What the last attempt ended with, while it is too early for another of the same kind."""
        if self._failure is None or self._failure[:2] != (address, identity):
            return
        if self._asking.clock() < self._retry_at_s:
            error = self._failure[2]
            raise type(error)(error.message, kind=error.kind, hint=error.hint, **error.context)

    def _unavailable(self, error: OSError) -> UnavailableError:
        why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return UnavailableError(f"{self._node} cannot be reached: {why}", kind="peer_away", node=self._node)
