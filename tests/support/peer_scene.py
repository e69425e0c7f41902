"""Two nodes, `a` asking and `b` serving, over each of the bulk transports."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio
import xxhash
from snapd_proto import peer_pb2_grpc

from snapd.core.cluster import Token
from snapd.errors import CapacityError, IntegrityError, NotFoundError, UnavailableError
from snapd.peer.asking import Asking
from snapd.peer.base import Arrival, ChunkName, FragmentName, Name, PeerLink, Pushed
from snapd.peer.certificates import Issued, make_ca, make_node
from snapd.peer.deadline import Deadline
from snapd.peer.grpc_peer import CallContext, TransferService, dial_grpc, server_credentials
from snapd.peer.identity import Identity, admit_token
from snapd.peer.limits import PeerLimits
from snapd.peer.links import PeerLinks
from snapd.peer.rate import Pacer
from snapd.peer.serving import Serve, Serving, serve_stream
from snapd.peer.side_channel import BulkServer, dial_socket
from snapd.peer.stream import ByteStream
from snapd.peer.trust import Trust, TrustFiles

KINDS = ("side-plain", "side-tls", "grpc-plain", "grpc-tls")
LIMITS = PeerLimits(hello_s=5, idle_s=20, stall_s=5, backoff_first_s=0.01, backoff_max_s=0.05)


def digest_of(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def chunk(index: int, job: str = "job") -> ChunkName:
    return ChunkName(job, 3, 40, 1, index)


def push(link: PeerLink, name: FragmentName, data: memoryview, digest: bytes, *, timeout_s: float) -> None:
    """One fragment; raises what it is refused with."""
    (refusal,) = link.push([Pushed(name, data, digest)], timeout_s=timeout_s)
    if refusal is not None:
        raise refusal


def fragment(number: int, row: bytes = b"r" * 32) -> FragmentName:
    return FragmentName("job", row, number)


def room(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


class MemoryStore:
    """A `BulkStore` in a dict; records what is being written, and how many reads are open."""

    def __init__(self, capacity_bytes: int = 1 << 30) -> None:
        self.items: dict[Name, bytes] = {}
        self.digests: dict[Name, bytes] = {}
        self.capacity_bytes = capacity_bytes
        self.unplanned: set[bytes] = set()
        self.open_writes = 0
        self.freed = threading.Event()
        self._lock = threading.Lock()

    def put(self, name: Name, data: bytes) -> bytes:
        self.items[name], self.digests[name] = data, digest_of(data)
        return self.digests[name]

    @contextmanager
    def read(self, name: Name) -> Iterator[tuple[memoryview, bytes]]:
        if name not in self.items:
            kind = "chunk" if isinstance(name, ChunkName) else "fragment"
            raise NotFoundError(f"no such {kind}", kind=kind)
        yield memoryview(self.items[name]), self.digests[name]

    @contextmanager
    def write(self, name: FragmentName, nbytes: int, digest: bytes) -> Iterator[Arrival]:
        self._check_planned(name)
        if nbytes > self.capacity_bytes:
            raise CapacityError("no room for parity", nbytes=nbytes)
        with self._lock:
            self.open_writes += 1
        data = bytearray(nbytes)
        try:
            yield Arrival(memoryview(data))
            if digest_of(data) != digest:
                raise IntegrityError("other bytes arrived", kind="digest")
            self.put(name, bytes(data))
        finally:
            with self._lock:
                self.open_writes -= 1
            self.freed.set()

    def holds(self, names: Sequence[FragmentName]) -> list[bool]:
        for name in names:
            self._check_planned(name)
        return [name in self.items for name in names]

    def _check_planned(self, name: FragmentName) -> None:
        if name.row_id in self.unplanned:
            raise UnavailableError("no map of that row yet", kind="not_planned")


class Log:
    """Collects what is logged once."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, str]]] = []
        self._seen: set[str] = set()

    def once(self, key: str, event: str, **fields: str) -> None:
        if key not in self._seen:
            self._seen.add(key)
            self.lines.append((event, fields))

    def kinds(self) -> list[str]:
        return [fields.get("kind", "") for event, fields in self.lines]


class Authority:
    """A certificate authority in a folder, for the nodes of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = datetime.datetime.now(datetime.UTC)
        self.ca = make_ca("test", self.now, datetime.timedelta(days=1))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.crt").write_bytes(self.ca.certificate)

    def files(self, node: str, *, ca: Issued | None = None, name: str = "", age_days: int = 0) -> TrustFiles:
        """Writes certificate and key of `node`; `age_days`: made so long ago, valid for one day."""
        made = self.now - datetime.timedelta(days=age_days)
        issued = make_node(ca or self.ca, name or node, made, datetime.timedelta(days=1))
        files = TrustFiles(self.folder / f"{node}.crt", self.folder / f"{node}.key", self.folder / "ca.crt")
        files.certificate.write_bytes(issued.certificate)
        files.key.write_bytes(issued.key)
        return files


class GrpcServer:
    """`TransferService` on an event loop of its own, as the daemon mounts it."""

    def __init__(self, serving: Serving, trust: Trust | None, *, serve: Serve) -> None:
        self._service, self._trust = TransferService(serving, serve=serve), trust
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self, host: str, port: int) -> int:
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._start(f"{host}:{port}"), self._loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, address: str) -> int:
        service = self._service

        class Servicer(peer_pb2_grpc.PeerServicer):
            async def Transfer(self, request_iterator: object, context: CallContext) -> None:
                await service.serve(context)

        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        peer_pb2_grpc.add_PeerServicer_to_server(Servicer(), self._server)
        if self._trust is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, server_credentials(self._trust))
        await self._server.start()
        return port

    async def _stop(self) -> None:
        self._service.close()
        await self._server.stop(0.5)


class Server:
    """Node `b`'s serving end over one transport; can be stopped and started again on the same port."""

    def __init__(self, kind: str, trust: Trust | None, limits: PeerLimits = LIMITS) -> None:
        self.kind, self.trust = kind, trust
        self.store, self.log = MemoryStore(), Log()
        self.identity = Identity("b", Token("cluster-1", 5))
        self.serving = Serving(
            store=self.store,
            identity=lambda: self.identity,
            admit=admit_token(lambda: self.identity.token),
            clock=time.monotonic,
            log_once=self.log.once,
            limits=limits,
        )
        self.serve: Serve = serve_stream
        self.port = 0

    def start(self) -> None:
        make = GrpcServer if self.kind.startswith("grpc") else BulkServer
        self._server = make(self.serving, self.trust, serve=lambda s, v: self.serve(s, v))
        self.port = self._server.start("127.0.0.1", self.port)

    def stop(self) -> None:
        self._server.close()


class Scene:
    """A server and links to it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.log = Log()
        self.authority = Authority(folder) if kind.endswith("tls") else None
        self.server = Server(kind, self.trust_of("b"))
        self.server.start()
        self.identity = Identity("a", Token("cluster-1", 5))
        self.addresses = {"b": f"127.0.0.1:{self.server.port}"}
        self.pacer = Pacer(time.monotonic, None)
        self.asking = Asking(identity=lambda: self.identity, clock=time.monotonic, limits=LIMITS)
        self._closers = [self.server.stop]
        self.links = self.links_with(self.asking)

    def trust_of(self, node: str) -> Trust | None:
        if self.authority is None:
            return None
        return Trust(node, self.authority.files(node), clock=time.monotonic, log_once=self.log.once)

    def links_with(self, asking: Asking, trust: Trust | None = None) -> PeerLinks:
        trust = trust or self.trust_of("a")
        is_grpc = self.kind.startswith("grpc")
        self.dial = dial_grpc(trust) if is_grpc else dial_socket(trust, stall_s=asking.limits.stall_s)
        links = PeerLinks(self.resolve, self.dial, asking, pacer=self.pacer)
        self._closers.insert(0, links.close)
        return links

    def resolve(self, node: str) -> str:
        try:
            return self.addresses[node]
        except KeyError:
            raise UnavailableError(f"{node} is no member", kind="peer_unknown") from None

    def raw(self) -> ByteStream:
        """A stream to the server on which nothing was said yet."""
        return self.dial("b", self.addresses["b"], self.deadline())

    def deadline(self, seconds: float = 5) -> Deadline:
        return Deadline(time.monotonic, seconds)

    def close(self) -> None:
        for close in self._closers:
            close()
