"""The client's control thread: settles captures when their copy is done and keeps the connection alive.

One thread per Snapshotter. It sleeps in epoll; in a step it wakes once, for some tens of microseconds with the GIL.
It never raises into the training loop: what it cannot mend it reports through `on_lost`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable

from .errors import SnapdError, UnavailableError
from .locate import connect_or_start
from .session import Session

_log = logging.getLogger(__name__)
RECONNECT_FIRST_S = 0.02
RECONNECT_MAX_S = 1.0
START_AFTER_S = 2.0  # a daemon that stays away this long is started again, if it is ours to start


class ControlThread:
    """Waits for tickets and for the end of the connection."""

    def __init__(self, session: Session, on_lost: Callable[[SnapdError], None]) -> None:
        self._session = session
        self._on_lost = on_lost
        self._epoll = select.epoll()
        self._poke_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._poke_fd, select.EPOLLIN)
        self._tickets: dict[int, Callable[[], None]] = {}
        self._is_stopping = False
        self._connection_fd = -1
        self._lost_since = 0.0
        self._next_attempt = 0.0
        self._delay_s = RECONNECT_FIRST_S
        self._is_given_up = False
        self._may_populate = False
        self._populated = 0
        self._thread = threading.Thread(target=self._run, name="snapd-control", daemon=True)

    def start(self) -> None:
        self._watch_connection()
        self._thread.start()

    def watch(self, fileno: int, callback: Callable[[], None]) -> None:
        """Call `callback` once, on the control thread, when `fileno` becomes readable."""
        self._tickets[fileno] = callback
        self._epoll.register(fileno, select.EPOLLIN | select.EPOLLONESHOT)

    def unwatch(self, fileno: int) -> None:
        """Forget a descriptor, before it is closed. Idempotent."""
        if self._tickets.pop(fileno, None) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fileno)

    def populate(self) -> None:
        """Fill the page tables of the arena in the background, from now on. Not while a restore faults its pages in."""
        if not self._may_populate:
            self._may_populate = True
            self.poke()

    def poke(self) -> None:
        """Look after connection and segments now. Any thread; never blocks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._poke_fd, 1)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Join the thread. Idempotent."""
        if self._is_stopping:
            return
        self._is_stopping = True
        os.eventfd_write(self._poke_fd, 1)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._epoll.close()
            os.close(self._poke_fd)

    def abandon_in_child(self) -> None:
        """In a forked child the thread does not exist: close the descriptors."""
        self._epoll.close()
        with contextlib.suppress(OSError):
            os.close(self._poke_fd)

    def _run(self) -> None:
        while not self._is_stopping:
            timeout = -1.0
            if not self._session.is_connected and not self._is_given_up:
                timeout = max(0.0, self._next_attempt - time.monotonic())
            for fileno, _ in self._epoll.poll(timeout):
                self._serve(fileno)
            if not self._is_stopping:
                self._tend()

    def _serve(self, fileno: int) -> None:
        callback = self._tickets.pop(fileno, None)
        if callback is not None:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fileno)
            callback()
        elif fileno == self._poke_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._poke_fd)
        elif fileno == self._connection_fd:
            self._lose()

    def _tend(self) -> None:
        """Reconnect when it is time; map segments that were added."""
        session = self._session
        try:
            if session.is_connected:
                if session.has_new_segments():
                    session.refresh_segments()
                if self._may_populate and self._populated < len(session.segments):
                    self._populated = len(session.segments)
                    session.populate()
            elif not self._is_given_up and time.monotonic() >= self._next_attempt:
                self._attempt()
        except UnavailableError:
            self._lose()
        except SnapdError as error:
            self._is_given_up = True
            self._on_lost(error)

    def _attempt(self) -> None:
        if self._session.may_start_daemon and time.monotonic() - self._lost_since > START_AFTER_S:
            connect_or_start(self._session.sockets, timeout_s=10.0).close()
        self._session.reconnect()
        self._delay_s = RECONNECT_FIRST_S
        self._watch_connection()
        _log.info("snapd: connected to the daemon again")

    def _watch_connection(self) -> None:
        self._connection_fd = self._session.connection_fileno()
        if self._connection_fd >= 0:
            self._epoll.register(self._connection_fd, select.EPOLLRDHUP)

    def _lose(self) -> None:
        now = time.monotonic()
        if self._session.is_connected or self._connection_fd >= 0:
            _log.warning("snapd: the daemon went away; training goes on, the newest snapshots stay in memory")
            self._lost_since = now
            self._delay_s = RECONNECT_FIRST_S
            if self._connection_fd >= 0:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(self._connection_fd)
            self._connection_fd = -1
            self._session.mark_lost()
        self._next_attempt = now + self._delay_s
        self._delay_s = min(self._delay_s * 2, RECONNECT_MAX_S)
