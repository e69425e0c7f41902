"""The nodes of `cluster_nodes` joined by the real side channel instead of by copies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from snapd.core.cluster import Token
from snapd.errors import UnavailableError
from snapd.peer.asking import Asking
from snapd.peer.identity import Identity, admit_token
from snapd.peer.links import PeerLinks
from snapd.peer.rate import Pacer
from snapd.peer.serving import Serving
from snapd.peer.side_channel import BulkServer, dial_socket
from snapd.peer.trust import Trust
from tests.support.cluster_nodes import FakeNode, Network
from tests.support.peer_scene import LIMITS, Authority, Log

TOKEN = Token("cluster-1", 5)


class Sockets:
    """A server and links for each node that `join` is called for."""

    def __init__(self, network: Network, folder: Path, *, is_tls: bool) -> None:
        self.network = network
        self.log = Log()
        self._authority = Authority(folder) if is_tls else None
        self._addresses: dict[str, str] = {}
        self._open: dict[str, tuple[BulkServer, PeerLinks]] = {}
        self._again: dict[str, Callable[[], tuple[BulkServer, PeerLinks]]] = {}

    def join(self, node: FakeNode) -> None:
        """From now on the node serves its store, and asks others, over sockets."""
        identity = Identity(node.name, TOKEN)
        trust = None
        if self._authority is not None:
            files = self._authority.files(node.name)
            trust = Trust(node.name, files, clock=time.monotonic, log_once=self.log.once)
        serving = Serving(
            store=node.store, identity=lambda: identity, admit=admit_token(lambda: TOKEN), clock=time.monotonic,
            log_once=self.log.once, limits=LIMITS,
        )  # fmt: skip
        server = self._serve(node.name, serving, trust)
        asking = Asking(identity=lambda: identity, clock=time.monotonic, limits=LIMITS)
        dial = dial_socket(trust, stall_s=LIMITS.stall_s)
        links = PeerLinks(self._resolve, dial, asking, pacer=Pacer(time.monotonic, None))
        node.links = links.paced
        self._open[node.name] = (server, links)
        self._again[node.name] = lambda: (self._serve(node.name, serving, trust), links)

    def _serve(self, name: str, serving: Serving, trust: Trust | None) -> BulkServer:
        server = BulkServer(serving, trust)
        self._addresses[name] = f"127.0.0.1:{server.start('127.0.0.1', 0)}"
        return server

    async def silence(self, name: str) -> None:
        """The node's server goes; nobody listens at its address."""
        await asyncio.to_thread(self._open[name][0].close)

    def speak(self, name: str) -> None:
        """It listens again, on another port."""
        self._open[name] = self._again[name]()

    def _resolve(self, node: str) -> str:
        try:
            return self._addresses[node]
        except KeyError:
            raise UnavailableError(f"{node} is no member", kind="peer_unknown") from None

    async def leave(self, name: str) -> None:
        del self._addresses[name]
        server, links = self._open.pop(name)
        links.close()
        await asyncio.to_thread(server.close)  # its threads may wait for this loop

    async def lose(self, name: str) -> None:
        await self.leave(name)
        await self.network.lose(name)


@contextlib.asynccontextmanager
async def joined(network: Network, folder: Path, *, is_tls: bool) -> AsyncIterator[Sockets]:
    """All nodes of `network` over sockets; they are closed at the end."""
    sockets = Sockets(network, folder, is_tls=is_tls)
    for node in network.nodes.values():
        sockets.join(node)
    try:
        yield sockets
    finally:
        for name in list(sockets._open):
            await sockets.leave(name)
