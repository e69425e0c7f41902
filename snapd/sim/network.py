"""The network: calls between daemons, and to the store, over links that delay, lose, repeat, reorder and are cut.

A call is two messages. What a cut link swallows is noticed when the call's time is over; a daemon that is down, on a
machine that is up, refuses at once. A repeated message is handled twice.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snapd.errors import SnapdError, UnavailableError
from snapd.sim.life import Life

STORE = "store"
Handler = Callable[..., Any]


@dataclass(slots=True)
class Weather:
    """How messages fare now. Delays in seconds; probabilities per message."""

    delay_s: float = 0.002
    jitter_s: float = 0.006
    loss: float = 0.0
    repeat: float = 0.0
    slow: float = 0.0  # probability of a delay `slow_s` long
    slow_s: float = 0.2


@dataclass(slots=True)
class _Server:
    life: Life
    handlers: Mapping[str, Handler]


class Network:
    """`cut`: ordered pairs (from, to) between which nothing arrives. `bytes_bad` gives the chance that a pulled chunk
    arrives as other bytes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.weather = Weather()
        self.cut: set[tuple[str, str]] = set()
        self.down: set[str] = set()
        self.bytes_bad = 0.0
        self.messages = 0
        self._loop = loop
        self.rng = rng
        self._servers: dict[str, _Server] = {}

    def serve(self, node: str, life: Life, handlers: Mapping[str, Handler]) -> None:
        """From now on calls to `node` go to these handlers (functions or coroutine functions)."""
        self._servers[node] = _Server(life, handlers)

    def is_open(self, source: str, target: str) -> bool:
        return (source, target) not in self.cut and source not in self.down and target not in self.down

    def transit_s(self, source: str, target: str) -> float | None:
        """How long a message that leaves now is under way; None: it is lost."""
        self.messages += 1
        if not self.is_open(source, target):
            return None
        weather, chance = self.weather, self.rng.random
        if weather.loss and chance() < weather.loss:
            return None
        delay = weather.delay_s + weather.jitter_s * chance()
        return delay + weather.slow_s * chance() if weather.slow and chance() < weather.slow else delay

    def call(
        self, life: Life, source: str, target: str, method: str, *args: Any, timeout_s: float
    ) -> asyncio.Future[Any]:
        """The answer; or the error that the handler raised; or UnavailableError. Cancel it to hang up."""
        life.effect(f"send {method} to {target}")
        future: asyncio.Future[Any] = self._loop.create_future()
        if source == target:
            self._loop.call_soon(self._arrive, _Call(self, future, life, source, target, method, args))
            return future
        call = _Call(self, future, life, source, target, method, args)
        timer = self._loop.call_later(timeout_s, call.fail, f"{target} did not answer {method}")
        future.add_done_callback(lambda _: timer.cancel())
        times = 2 if self.weather.repeat and self.rng.random() < self.weather.repeat else 1
        for _ in range(times):
            delay = self.transit_s(source, target)
            if delay is not None:
                self._loop.call_later(delay, self._arrive, call)
        return future

    def _arrive(self, call: _Call) -> None:
        server = self._servers.get(call.target)
        if server is None or not server.life.is_alive:
            if call.target not in self.down:
                call.answer(None, UnavailableError(f"{call.target} refused the connection", kind="refused"))
            return
        try:
            result = server.handlers[call.method](*call.args)
        except SnapdError as error:
            call.answer(server.life, error)
            return
        if isinstance(result, Awaitable):
            task = server.life.spawn(call.handle(server.life, result), f"serve {call.method}")
            call.when_given_up(task)
        else:
            call.answer(server.life, result)


class _Call:
    __slots__ = ("_future", "_life", "_network", "_source", "args", "method", "target")

    def __init__(
        self,
        network: Network,
        future: asyncio.Future[Any],
        life: Life,
        source: str,
        target: str,
        method: str,
        args: tuple[Any, ...],
    ) -> None:
        self._network, self._future, self._life, self._source = network, future, life, source
        self.target, self.method, self.args = target, method, args

    async def handle(self, server: Life, result: Awaitable[Any]) -> None:
        try:
            answer = await result
        except SnapdError as error:
            self.answer(server, error)
            return
        self.answer(server, answer)

    def when_given_up(self, task: asyncio.Task[None]) -> None:
        """Nobody works for a caller that has hung up, or whose time is over."""
        self._future.add_done_callback(lambda _: task.cancel())

    def answer(self, server: Life | None, result: object) -> None:
        """`server` None: its machine answers in its stead."""
        if self._future.done():
            return
        if server is not None:
            server.effect(f"answer {self.method}")
        loop = self._future.get_loop()
        if self.target == self._source:
            self._take(result)
            return
        delay = self._network.transit_s(self.target, self._source)
        if delay is not None:
            loop.call_later(delay, self._take, result)

    def _take(self, result: object) -> None:
        if self._future.done():
            return
        if not self._life.is_alive:
            self._future.cancel()
        elif isinstance(result, SnapdError):
            self._future.set_exception(result)
            self._future.exception()  # a caller that has hung up retrieves it no more
        else:
            self._future.set_result(result)

    def fail(self, reason: str) -> None:
        if not self._future.done():
            self._future.set_exception(UnavailableError(reason, kind="no_answer"))
            self._future.exception()
