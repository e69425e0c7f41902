"""The gRPC server on its Unix socket: Trainer, Admin, health."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from snapd_proto import admin_pb2_grpc, trainer_pb2_grpc

from snapd.rpc.admin_service import AdminService
from snapd.rpc.trainer_service import TrainerService
from snapd.runtime.node import Node

REQUEST_BYTES_MAX = 4 << 20
REPLY_BYTES_MAX = 256 << 20
SERVICES = ("", "snapd.v1.Trainer", "snapd.v1.Admin")


class RpcServer:
    """Serves `node` on a socket of mode 0600 in a folder of mode 0700."""

    def __init__(self, node: Node, path: Path, *, calls_max: int) -> None:
        self._path = path
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=calls_max,
            options=[
                ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
                ("grpc.max_send_message_length", REPLY_BYTES_MAX),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = HealthServicer()
        trainer_pb2_grpc.add_TrainerServicer_to_server(TrainerService(node), self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(node), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self) -> None:
        """Bind and serve; the process's umask keeps the socket from others until its mode is set."""
        self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()
        os.chmod(self._path, 0o600)
        for name in SERVICES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say that we go, then let calls end for `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
