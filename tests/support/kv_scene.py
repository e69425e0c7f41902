"""A store whose server can be exchanged under its clients, and clients that can be cut off; for virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.errors import UnavailableError
from tests.support.clusters import Cluster, Daemon
from tests.support.virtual_time import pass_time, run_virtually


class Stores:
    """The server that clients are given; another one can be put in its place, as after a wipe or from a backup."""

    def __init__(self) -> None:
        self.server = KvServer(None, monotonic_s=asyncio.get_running_loop().time)
        self.clients: list[Client] = []

    def connect(self, node: str) -> Client:
        self.clients.append(Client(self, f"{node}-{len(self.clients)}"))
        return self.clients[-1]

    def replace(self, copy_of: KvServer | None = None) -> None:
        old, self.server = self.server, KvServer(None, monotonic_s=asyncio.get_running_loop().time)
        if copy_of is not None:
            copy_of._file.backup(self.server._file)
            self.server._load()
            self.server._oldest = self.server.revision
        old.close()

    def copy(self) -> KvServer:
        other = KvServer(None, monotonic_s=asyncio.get_running_loop().time)
        self.server._file.backup(other._file)
        return other

    async def expire(self) -> None:
        while True:
            await pass_time(0.2)
            self.server.expire()


class Client(LocalKeyValue):
    """A client whose server can be exchanged under it, and that can be cut off."""

    def __init__(self, stores: Stores, name: str) -> None:
        super().__init__(stores.server, name)
        self._stores, self._is_cut, self.lose_answers = stores, False, 0

    def cut(self, is_cut: bool) -> None:
        self._is_cut = is_cut

    @property
    def _server(self) -> KvServer:  # type: ignore[override]
        if self._is_cut:
            raise UnavailableError("cut off", kind="cut")
        return self._stores.server

    @_server.setter
    def _server(self, server: KvServer) -> None:
        pass

    async def transact(self, checks: Any, writes: Any) -> bool:
        answer = await super().transact(checks, writes)
        if self.lose_answers:
            self.lose_answers -= 1
            raise UnavailableError("the answer was lost", kind="lost_answer")
        return answer


@asynccontextmanager
async def scene() -> AsyncIterator[tuple[Stores, Cluster]]:
    stores = Stores()
    cluster = Cluster(stores.connect)
    expiring = asyncio.ensure_future(stores.expire())
    try:
        yield stores, cluster
    finally:
        await cluster.stop()
        expiring.cancel()


def virtually(work: Coroutine[Any, Any, None]) -> None:
    run_virtually(work)


async def kill(daemon: Daemon) -> None:
    """As kill -9: nothing is said to the store."""
    client = daemon.state.store
    assert isinstance(client, Client)
    client.cut(True)
    await daemon.stop()
