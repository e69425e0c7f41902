"""Questions to a daemon through its Admin service, as the command line asks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from snapd_proto import admin_pb2, admin_pb2_grpc, trainer_pb2

from tests.support.fake_trainer import Handshake, Refused

MESSAGE_BYTES_MAX = 64 << 20


class Asker:
    """Keeps its connection from one question to the next; not thread-safe. A daemon that is away: OSError or
    grpc.RpcError."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self._channel: grpc.Channel | None = None
        self._greeting: Handshake | None = None

    def ask(self, method: str, request: Any, timeout_s: float = 5.0) -> Any:
        try:
            if self._greeting is None or self._channel is None:
                greeting = Handshake(self.runtime / "handshake.sock", trainer_pb2.PEER_ROLE_ADMIN)
                self._greeting = greeting.connect()
                self._channel = grpc.insecure_channel(
                    f"unix:{self.runtime / 'snapd.sock'}",
                    options=[
                        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                        ("grpc.use_local_subchannel_pool", 1),
                    ],
                )
            call = getattr(admin_pb2_grpc.AdminStub(self._channel), method)
            token = (("snapd-token", self._greeting.welcome.token),)
            return call(request, timeout=timeout_s, metadata=token)
        except (OSError, grpc.RpcError, Refused):
            self.forget()
            raise

    def status(
        self, job: str = "", *, ask_peers: bool = False, timeout_s: float = 5.0
    ) -> admin_pb2.StatusReply:
        return self.ask("Status", admin_pb2.StatusRequest(job=job, ask_peers=ask_peers), timeout_s)

    def snapshots(self, job: str) -> list[admin_pb2.SnapshotSummary]:
        return list(self.ask("ListSnapshots", admin_pb2.ListSnapshotsRequest(job=job)).snapshots)

    def remove(self, job: str) -> None:
        self.ask("RemoveJob", admin_pb2.RemoveJobRequest(job=job, force=True), 20.0)

    def forget(self) -> None:
        """Drop the connection: the next question goes to whoever serves then."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._greeting is not None:
            if hasattr(self._greeting, "connection"):
                self._greeting.close()
            self._greeting = None
