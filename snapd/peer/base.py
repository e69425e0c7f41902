"""What moves bulk bytes between daemons, and what it serves.

Everything here blocks and runs on threads of its own, never on the event loop; sockets receive straight into the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from snapd.errors import SnapdError

HOLDS_MAX = 1024  # names of one question


@dataclass(frozen=True, slots=True)
class ChunkName:
    """A chunk of a captured shard, as its record numbers it."""

    job: str
    generation: int
    step: int
    rank: int
    index: int


@dataclass(frozen=True, slots=True)
class FragmentName:
    """A parity fragment: number 0..m-1 of the row with that id."""

    job: str
    row_id: bytes
    number: int


Name = ChunkName | FragmentName


@dataclass(slots=True, eq=False)
class Arrival:
    """Room for a fragment that a peer pushes."""

    view: memoryview
    wait: Callable[[], None] = lambda: None
    """Once its context was left without an error: returns when it is recorded, or raises why not. To be called once."""


class BulkStore(Protocol):
    """What a node offers to its peers. Called on the transport's threads."""

    def read(self, name: Name) -> AbstractContextManager[tuple[memoryview, bytes]]:
        """The bytes and their XXH3-128; they stay where they are until the context ends.

        Raises:
            NotFoundError: kind `chunk` or `fragment`.
        """

    def write(self, name: FragmentName, nbytes: int, digest: bytes) -> AbstractContextManager[Arrival]:
        """Room for a parity fragment. Left without an error, the bytes are checked against `digest` and will be
        recorded, together with what arrives meanwhile: `Arrival.wait`. Left with one, the room is free again.

        Raises:
            CapacityError: no room for parity. IntegrityError: kind `digest`: other bytes arrived.
            UnavailableError: kind `not_planned`: no row map of this node names that row (yet): push again later.
        """

    def holds(self, names: Sequence[FragmentName]) -> list[bool]:
        """For each fragment, whether it is here, checked since this process began. At most `HOLDS_MAX` names.

        Raises:
            UnavailableError: kind `not_planned`: no row map of this node names one of those rows (yet).
        """


@dataclass(frozen=True, slots=True, eq=False)
class Pushed:
    """A parity fragment to be stored at a peer."""

    name: FragmentName
    data: memoryview
    digest: bytes


class PeerLink(Protocol):
    """One peer, as a client. Thread-safe; reconnects by itself; every call has a deadline."""

    def fetch(self, wanted: Sequence[tuple[Name, memoryview]], *, timeout_s: float) -> list[bytes]:
        """Receive each into its view (exactly its size), pipelined. Returns the digests that the peer recorded; the
        caller hashes what arrived.

        Raises:
            NotFoundError: the peer has not got one of them. UnavailableError (also DeadlineExceeded): it does not
            answer, or too late. RemoteProtocolError: it sends what it must not (another size, ...).
        """

    def push(self, pushed: Sequence[Pushed], *, timeout_s: float) -> list[SnapdError | None]:
        """Store parity fragments at the peer, pipelined; returns when it has them, checked and recorded. For each that
        it refuses the reason: CapacityError (it has no room), UnavailableError (kind `not_planned`: it has not got the
        row's map yet), IntegrityError.

        Raises:
            UnavailableError (also DeadlineExceeded): it does not answer, or too late. RemoteProtocolError, AuthError,
            FencedError.
        """

    def holds(self, names: Sequence[FragmentName], *, timeout_s: float) -> list[bool]:
        """Which of these fragments the peer has already: equal rows are not coded again. At most `HOLDS_MAX` names.

        Raises:
            UnavailableError (kind `not_planned`: it has not got the rows' map yet), RemoteProtocolError (another count
            of answers).
        """

    def close(self) -> None: ...


class Links(Protocol):
    """Links by node name; follows the membership's addresses."""

    def to(self, node: str) -> PeerLink:
        """Raise UnavailableError (kind `peer_unknown`) for a node that is no member."""
