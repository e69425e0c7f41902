"""The gRPC ends between daemons: the server of the Peer service, and channels to other nodes."""

from __future__ import annotations

import grpc
from snapd_proto import peer_pb2_grpc

from snapd.errors import ConfigError
from snapd.peer.grpc_peer import TransferService, channel_credentials, channel_options, server_credentials
from snapd.peer.trust import Trust
from snapd.rpc.peer_calls import PEER_OPTIONS, MakeChannel
from snapd.rpc.peer_service import PeerService
from snapd.runtime.cluster import Cluster
from snapd.runtime.node import Node


def channels(trust: Trust | None) -> MakeChannel:
    """Makes channels to nodes by (name, address): with mutual TLS if there are certificates."""

    def make_channel(name: str, address: str) -> grpc.aio.Channel:
        if trust is None:
            return grpc.aio.insecure_channel(address, options=PEER_OPTIONS)
        options = [*PEER_OPTIONS, *channel_options(name)]
        return grpc.aio.secure_channel(address, channel_credentials(trust), options=options)

    return make_channel


class PeerServer:
    """Serves the Peer service over TCP."""

    def __init__(self, node: Node, cluster: Cluster, transfers: TransferService, trust: Trust | None) -> None:
        self._transfers = transfers
        self._trust = trust
        self._server = grpc.aio.server(options=[*PEER_OPTIONS, ("grpc.so_reuseport", 0)])
        service = PeerService(node, cluster, transfers, is_tls=trust is not None)
        peer_pb2_grpc.add_PeerServicer_to_server(service, self._server)

    async def start(self, address: str) -> None:
        """Listen on HOST:PORT.

        Raises:
            ConfigError: kind `address`: it cannot be listened on.
        """
        try:
            if self._trust is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, server_credentials(self._trust))
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}", kind="address", hint="is another daemon there?"
            ) from error
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        self._transfers.close()
        await self._server.stop(grace_s)
