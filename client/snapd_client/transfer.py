"""What moves the lazy bytes of one capture: the copy engine, a device's side stream, or both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from snapd_native import Ticket

from .stage import DeviceTransfer


class Transfer(Protocol):
    """Bytes on their way. Groups are those of the fences; -1 means all."""

    @property
    def is_cancelled(self) -> bool: ...
    @property
    def helped_bytes(self) -> int: ...
    @property
    def finished_ns(self) -> int: ...
    def fence(self, group: int) -> None:
        """When this returns, the group's sources may be changed by whatever the training thread does next."""

    def help_rest(self) -> None:
        """Copy on the calling thread what the host has still to copy, of all groups."""

    def wait(self) -> None:
        """Until everything is copied, on the host."""

    def is_done(self) -> bool: ...
    def copied_bytes(self) -> int: ...
    def left_bytes(self) -> int:
        """What the host has still to copy."""

    def cancel(self) -> None: ...
    def filenos(self) -> Sequence[int]: ...
    def close(self) -> None: ...


class HostTransfer:
    """By the copy engine: at the fence the training thread copies what is left."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    @property
    def is_cancelled(self) -> bool:
        return self._ticket.is_cancelled

    @property
    def helped_bytes(self) -> int:
        return self._ticket.helped_bytes

    @property
    def finished_ns(self) -> int:
        return self._ticket.finished_ns

    def fence(self, group: int) -> None:
        self._ticket.fence(group)

    def help_rest(self) -> None:
        self._ticket.fence(-1)

    def wait(self) -> None:
        self._ticket.wait(-1, True)

    def is_done(self) -> bool:
        return self._ticket.is_done()

    def copied_bytes(self) -> int:
        return self._ticket.progress()[0]

    def left_bytes(self) -> int:
        copied, total = self._ticket.progress()
        return total - copied

    def cancel(self) -> None:
        self._ticket.cancel()

    def filenos(self) -> Sequence[int]:
        return [self._ticket.fileno()]

    def close(self) -> None:
        """The descriptor goes with the ticket."""


class JointTransfer:
    """Host and device together; the fence waits on the host for the one and on the stream for the other."""

    def __init__(self, host: Transfer, device: DeviceTransfer, on_capture: Callable[[], None]) -> None:
        """`on_capture`: called when a fence was asked for inside the capture of a CUDA graph."""
        self._host, self._device, self._on_capture = host, device, on_capture

    @property
    def is_cancelled(self) -> bool:
        return self._host.is_cancelled or self._device.is_cancelled

    @property
    def helped_bytes(self) -> int:
        return self._host.helped_bytes

    @property
    def finished_ns(self) -> int:
        return max(self._host.finished_ns, self._device.finished_ns)

    def fence(self, group: int) -> None:
        self._host.fence(group)
        if not self._device.fence(group):
            self._on_capture()

    def help_rest(self) -> None:
        self._host.help_rest()

    def wait(self) -> None:
        self._host.wait()
        self._device.wait()

    def is_done(self) -> bool:
        return self._host.is_done() and self._device.is_done()

    def copied_bytes(self) -> int:
        return self._host.copied_bytes() + self._device.progress()[0]

    def left_bytes(self) -> int:
        return self._host.left_bytes()

    def cancel(self) -> None:
        self._host.cancel()
        self._device.cancel()

    def filenos(self) -> Sequence[int]:
        return [*self._host.filenos(), self._device.fileno()]

    def close(self) -> None:
        self._device.close()


class DoneTransfer:
    """Everything was copied before the hand-over returned (`audit="full"`)."""

    is_cancelled = False
    helped_bytes = 0

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.finished_ns = time.monotonic_ns()

    def fence(self, group: int) -> None:
        """Nothing is left."""

    def help_rest(self) -> None:
        """Nothing is left."""

    def wait(self) -> None:
        """Nothing is left."""

    def is_done(self) -> bool:
        return True

    def copied_bytes(self) -> int:
        return self._nbytes

    def left_bytes(self) -> int:
        return 0

    def cancel(self) -> None:
        """Nothing is left."""

    def filenos(self) -> Sequence[int]:
        return []

    def close(self) -> None:
        """Nothing is open."""
