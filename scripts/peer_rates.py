"""How fast, and for how much processor time, bulk bytes move between two processes on loopback.

    python scripts/peer_rates.py [--mib 1024] [--rounds 5]

Transports take turns, so that what else the machine does falls on all of them. `raw` is the floor: `sendall` and
`recv_into` of one socket, without frames. Processor time is of both processes together, kernel included.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
from snapd_proto import peer_pb2_grpc

from snapd.core.cluster import Token
from snapd.peer.asking import Asking
from snapd.peer.base import Arrival, ChunkName, FragmentName, Name, Pushed
from snapd.peer.certificates import make_ca, make_node
from snapd.peer.grpc_peer import CallContext, TransferService, dial_grpc, server_credentials
from snapd.peer.identity import Identity, admit_token
from snapd.peer.links import PeerLinks
from snapd.peer.serving import Serving
from snapd.peer.side_channel import BulkServer, dial_socket
from snapd.peer.trust import Trust, TrustFiles

KINDS = ("raw", "side-plain", "side-tls", "grpc-plain", "grpc-tls")
CHUNK_BYTES = 4 << 20
CHUNK_COUNT = 64
TOKEN = Token("rates", 1)


def memory() -> memoryview:
    """CHUNK_COUNT chunks of pages that are there already."""
    view = memoryview(mmap.mmap(-1, CHUNK_BYTES * CHUNK_COUNT))
    piece = os.urandom(CHUNK_BYTES)
    for index in range(CHUNK_COUNT):
        chunk_of(view, index)[:] = piece
    return view


def chunk_of(view: memoryview, index: int) -> memoryview:
    start = index % CHUNK_COUNT * CHUNK_BYTES
    return view[start : start + CHUNK_BYTES]


class Store:
    """Hands out the same memory again and again; hashes nothing, since that is not the transport's work."""

    def __init__(self) -> None:
        self._memory = memory()

    @contextmanager
    def read(self, name: Name) -> Iterator[tuple[memoryview, bytes]]:
        assert isinstance(name, ChunkName)
        yield chunk_of(self._memory, name.index), bytes(16)

    @contextmanager
    def write(self, name: FragmentName, nbytes: int, digest: bytes) -> Iterator[Arrival]:
        yield Arrival(chunk_of(self._memory, name.number)[:nbytes])

    def holds(self, names: Sequence[FragmentName]) -> list[bool]:
        return [False] * len(names)


def log_once(key: str, event: str, **fields: str) -> None:
    print(event, fields, file=sys.stderr)


def trust_of(folder: Path, node: str) -> Trust:
    files = TrustFiles(folder / f"{node}.crt", folder / f"{node}.key", folder / "ca.crt")
    return Trust(node, files, clock=time.monotonic, log_once=log_once)


def make_certificates(folder: Path) -> None:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    ca = make_ca("rates", now, day)
    (folder / "ca.crt").write_bytes(ca.certificate)
    for node in ("a", "b"):
        made = make_node(ca, node, now, day)
        (folder / f"{node}.crt").write_bytes(made.certificate)
        (folder / f"{node}.key").write_bytes(made.key)


def serve(kind: str, folder: Path) -> None:
    """The other process: prints its port, serves until its standard input ends."""
    serving = Serving(
        store=Store(),
        identity=lambda: Identity("b", TOKEN),
        admit=admit_token(lambda: TOKEN),
        clock=time.monotonic,
        log_once=log_once,
    )
    trust = trust_of(folder, "b") if kind.endswith("tls") else None
    if kind == "raw":
        serve_raw()
    elif kind.startswith("side"):
        server = BulkServer(serving, trust)
        print(server.start("127.0.0.1", 0), flush=True)
        sys.stdin.read()
        server.close()
    else:
        asyncio.run(serve_grpc(serving, trust))


async def serve_grpc(serving: Serving, trust: Trust | None) -> None:
    service = TransferService(serving)

    class Servicer(peer_pb2_grpc.PeerServicer):
        async def Transfer(self, request_iterator: object, context: CallContext) -> None:
            await service.serve(context)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    peer_pb2_grpc.add_PeerServicer_to_server(Servicer(), server)
    address = "127.0.0.1:0"
    port = (
        server.add_insecure_port(address)
        if trust is None
        else server.add_secure_port(address, server_credentials(trust))
    )
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    service.close()
    await server.stop(0.2)


def serve_raw() -> None:
    """Sends or takes as many chunks as each connection asks for."""
    view = memory()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            while request := connection.recv(5):
                count = int.from_bytes(request[1:], "big")
                for index in range(count):
                    if request[:1] == b"f":
                        connection.sendall(chunk_of(view, index))
                    else:
                        receive(connection, chunk_of(view, index))
                connection.sendall(b"k")


def receive(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        view = view[connection.recv_into(view) :]


def processor_s(pid: int) -> float:
    """Processor seconds of all threads of a process so far, by the kernel's clock for it."""
    return time.clock_gettime((~pid << 3) | 2)


class Peer:
    """The asking side of one transport, and the process that it asks."""

    def __init__(self, kind: str, folder: Path, view: memoryview) -> None:
        self.kind, self._view = kind, view
        command = [sys.executable, __file__, "--serve", kind, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._links: PeerLinks | None = None
        if kind == "raw":
            self._socket = socket.create_connection(("127.0.0.1", port))
            return
        trust = trust_of(folder, "a") if kind.endswith("tls") else None
        dial = dial_grpc(trust) if kind.startswith("grpc") else dial_socket(trust, stall_s=15)
        asking = Asking(identity=lambda: Identity("a", TOKEN), clock=time.monotonic)
        self._links = PeerLinks(lambda node: f"127.0.0.1:{port}", dial, asking)

    def run(self, direction: str, count: int) -> None:
        if self._links is None:
            self._run_raw(direction, count)
        elif direction == "fetch":
            wanted = [(ChunkName("j", 1, 1, 0, i), chunk_of(self._view, i)) for i in range(count)]
            self._links.to("b").fetch(wanted, timeout_s=60)
        else:
            for index in range(count):
                name = FragmentName("j", b"r" * 32, index % CHUNK_COUNT)
                self._links.to("b").push([Pushed(name, chunk_of(self._view, index), bytes(16))], timeout_s=60)

    def _run_raw(self, direction: str, count: int) -> None:
        self._socket.sendall(direction[:1].encode() + count.to_bytes(4, "big"))
        for index in range(count):
            if direction == "fetch":
                receive(self._socket, chunk_of(self._view, index))
            else:
                self._socket.sendall(chunk_of(self._view, index))
        receive(self._socket, memoryview(bytearray(1)))

    def processor_s(self) -> float:
        """Of both processes so far."""
        return processor_s(os.getpid()) + processor_s(self._process.pid)

    def close(self) -> None:
        if self._links is not None:
            self._links.close()
        else:
            self._socket.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def measure(peer: Peer, direction: str, count: int) -> tuple[float, float]:
    """GB/s, and processor seconds per GB."""
    used_s, began_s = peer.processor_s(), time.perf_counter()
    peer.run(direction, count)
    took_s = time.perf_counter() - began_s
    gigabytes = count * CHUNK_BYTES / 1e9
    return gigabytes / took_s, (peer.processor_s() - used_s) / gigabytes


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024, help="bytes of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    count = max(1, (options.mib << 20) // CHUNK_BYTES)
    kinds = options.kinds.split(",")
    results: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        view = memory()
        peers = [Peer(kind, Path(folder), view) for kind in kinds]
        for peer in peers:
            for direction in ("fetch", "push"):
                peer.run(direction, CHUNK_COUNT)
        for _ in range(options.rounds):
            for peer in peers:
                for direction in ("fetch", "push"):
                    pair = measure(peer, direction, count)
                    results.setdefault((peer.kind, direction), []).append(pair)
        for peer in peers:
            peer.close()
    print(
        "| transport | fetch, GB/s | CPU s per GB | push, GB/s | CPU s per GB |\n| --- | --- | --- | --- | --- |"
    )
    for kind in kinds:
        cells = [
            spread([pair[i] for pair in results[kind, direction]])
            for direction in ("fetch", "push")
            for i in (0, 1)
        ]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
