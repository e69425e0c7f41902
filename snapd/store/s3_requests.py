"""Requests to S3: clients with fitting time-outs; tries with jitter until a deadline; counts; errors in our words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from snapd.errors import AuthError, ConfigError, IntegrityError, SnapdError, UnavailableError
from snapd.store.opening import StoreOptions
from snapd.store.s3_errors import RAISED, Failure, answer_of, date_of, failure_of, no_credentials
from snapd.store.surroundings import Meter, StoreClock, Surroundings

T = TypeVar("T")
Answer = TypeVar("Answer", covariant=True)
_PAUSE_FIRST_S = 0.1
_PAUSE_MAX_S = 5.0
_THROTTLED_FIRST_S = 0.25
_DAMAGED_TRIES = 3
_SHORTEST_S = 0.125
_CONNECTIONS_BESIDE = 8  # of callers in threads of their own


class Patience:
    """How long a call may take, with all that it repeats. `give_up`: nobody waits for it any more."""

    def __init__(self, monotonic_s: Callable[[], float], seconds: float, give_up: threading.Event) -> None:
        self._monotonic_s = monotonic_s
        self._end_s = monotonic_s() + seconds
        self._give_up = give_up
        self.seconds = seconds

    def left_s(self) -> float:
        return 0.0 if self._give_up.is_set() else self._end_s - self._monotonic_s()


class Answering(Protocol[Answer]):
    """Sends one request with a client and reads the answer whole."""

    def __call__(self, client: Any, /) -> Answer: ...


class S3Requests:
    """Everything that goes to one bucket. Safe for threads."""

    def __init__(
        self, bucket: str, description: str, options: StoreOptions, surroundings: Surroundings
    ) -> None:
        self.bucket = bucket
        self.description = description
        self.options = options
        self.surroundings = surroundings
        self.meter = Meter()
        self.clock = StoreClock(surroundings.monotonic_s)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._making = threading.Lock()  # held while the chain is asked, which may run a program that hangs
        self._session: Any = None
        self._clients: dict[float, Any] = {}

    def patience(self, deadline_s: float | None, give_up: threading.Event | None = None) -> Patience:
        seconds = self.options.deadline_s if deadline_s is None else deadline_s
        return Patience(self.surroundings.monotonic_s, seconds, give_up or self._closing)

    def submit(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """To the pool, as long as the store is open."""
        try:
            return pool.submit(call, *arguments)
        except RuntimeError:
            raise self._closed() from None

    def ask(
        self, kind: str, doing: str, patience: Patience, request: Answering[T], *, tries_max: int = 1 << 30
    ) -> T:
        """Repeat `request` until it is answered, refused for good, or the time is up. `doing`: for texts.

        Damage on the way is tried a few times only: if it stays, it is not on the way.

        Raises:
            SnapdError: as base.py says.
            Refused: the key is taken.
        """
        tries = 0
        while True:
            tries += 1
            failure = self._try(kind, doing, patience, request)
            if not isinstance(failure, Failure):
                return failure
            if not failure.is_passing:
                raise failure.error
            if isinstance(failure.error, IntegrityError):
                tries_max = min(tries_max, _DAMAGED_TRIES)
            if tries >= tries_max or not self._pause(failure, tries, patience):
                raise _tired(failure.error, tries, patience)
            self.meter.add(retries=1)

    def _try(self, kind: str, doing: str, patience: Patience, request: Answering[T]) -> T | Failure:
        self.meter.add(kind)
        what = f"{doing} in {self.description}"
        try:
            return request(self._client(patience.left_s()))
        except RAISED as error:
            self.heard(answer_of(error))
            failure = failure_of(error, what, self.surroundings.wall_s())
            if isinstance(failure.error, AuthError):
                self._ask_chain_again()
            return failure

    def _pause(self, failure: Failure, tries: int, patience: Patience) -> bool:
        """Wait before the next try, evenly between nothing and twice as long as before. False: no time is left."""
        is_throttled = isinstance(failure.error, SnapdError) and failure.error.kind == "store_throttled"
        first_s = _THROTTLED_FIRST_S if is_throttled else _PAUSE_FIRST_S
        pause_s = self.surroundings.chance() * min(_PAUSE_MAX_S, first_s * 2 ** min(tries, 16))
        if pause_s >= patience.left_s():
            return False
        return not self._closing.wait(pause_s)

    def heard(self, answer: Mapping[str, Any]) -> None:
        """Note the store's clock."""
        at_s = date_of(answer)
        if at_s is not None:
            self.clock.heard(at_s)

    def close(self) -> None:
        """Requests under way end by themselves; nothing is tried again."""
        self._closing.set()
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _closed(self) -> UnavailableError:
        return UnavailableError(f"{self.description} is being closed", kind="store_unreachable")

    # clients

    def _client(self, left_s: float) -> Any:
        """A client that gives up within what is left. Time-outs are a client's: there are some, a power of 2 apart."""
        stall_s = self.options.stall_s
        if left_s < stall_s:
            stall_s = _SHORTEST_S
            while stall_s * 2 <= left_s:
                stall_s *= 2
        with self._lock:
            if self._closing.is_set():
                raise self._closed()
            session, client = self._session, self._clients.get(stall_s)
        if session is not None and client is not None:
            self._have_credentials(session)
            return client
        with self._making:
            return self._made(stall_s)

    def _ask_chain_again(self) -> None:
        """The next request looks for credentials anew: a person may have put others in place."""
        with self._lock:
            self._session = None
            self._clients.clear()  # those in use end by themselves

    def _have_credentials(self, session: Any) -> None:
        """Have the chain fetch them, or fetch them anew before they expire. Its errors are not the store's.

        Raises:
            AuthError: kind `store_credentials`. BotoCoreError, ClientError: of what the chain asks.
        """
        try:
            credentials = session.get_credentials()
            if credentials is not None:
                credentials.get_frozen_credentials()
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            # a program that is not there, or says nothing that can be read; those that it gave are expired
            self._ask_chain_again()
            why = f"{type(error).__name__}: {error}"
            raise no_credentials(f"the chain of AWS gives none for {self.description}: {why}") from error

    def _made(self, stall_s: float) -> Any:
        """A client; the one that another thread has made meanwhile."""
        options = self.options
        with self._lock:
            session, there = self._session, self._clients.get(stall_s)
        if session is not None and there is not None:
            return there
        if options.ca and not os.access(options.ca, os.R_OK):
            raise ConfigError(f"tier.ca: the file {options.ca} cannot be read", kind="store")
        try:
            session = session or boto3.session.Session()
            self._have_credentials(session)
            config = Config(
                connect_timeout=min(options.connect_s, stall_s),
                read_timeout=stall_s,
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=2 * options.concurrency + _CONNECTIONS_BESIDE,
                s3={"addressing_style": _style(options)},
                request_checksum_calculation="when_required",  # each request names its own
                response_checksum_validation="when_required",
                tcp_keepalive=True,
                user_agent_extra="snapd",
            )
            client = session.client(
                "s3",
                endpoint_url=options.endpoint or None,
                region_name=options.region or session.region_name or "us-east-1",
                verify=options.ca or None,
                config=config,
            )
        except (BotoCoreError, ValueError, OSError) as error:
            failure = failure_of(error, f"no connection to {self.description}", self.surroundings.wall_s())
            if isinstance(error, ValueError | OSError):
                raise ConfigError(f"{self.description} cannot be used: {error}", kind="store") from error
            raise failure.error from error
        with self._lock:
            if self._closing.is_set():
                raise self._closed()
            self._session, self._clients[stall_s] = session, client
        return client


def _style(options: StoreOptions) -> str:
    if options.path_style is None:
        return "path" if options.endpoint else "auto"
    return "path" if options.path_style else "virtual"


def _tired(error: Exception, tries: int, patience: Patience) -> Exception:
    """The last error, with how often it was tried."""
    if isinstance(error, SnapdError):
        times = (
            f"tried {tries} times in {patience.seconds:g} s"
            if tries > 1
            else f"no answer in {patience.seconds:g} s"
        )
        return type(error)(f"{error.message}; {times}", kind=error.kind, hint=error.hint, **error.context)
    return error
