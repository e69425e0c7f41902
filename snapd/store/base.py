"""What a durable tier needs of a store: immutable objects by key, conditional creation, ranged reads, its clock.

Keys are relative to the store's root, in ASCII, with '/' between parts; whoever makes them sees to it that they cannot
leave the root (core/tier_keys.py), and every implementation refuses those that could.

Every method may be called from any thread and blocks. Each takes part in the store's own retries, with jitter, up to
`deadline_s` (seconds from the call; None: the store's default), and then raises. What a caller may catch:

    NotFoundError     kind `object`, or `bucket`: no such object; the bucket or the root directory is missing
    UnavailableError  kinds `store_unreachable`, `store_slow`, `store_throttled`, `store_failing`: try again later;
                      `store_tls`: a person must act
    AuthError         kinds `store_credentials`, `store_denied`: a person must act
    CapacityError     kind `store_full`: disk, quota
    ConfigError       kinds `store`, `store_clock`, ...: a person must act
    IntegrityError    kind `store_bytes`: what arrived is not what was sent, by the store's own checksum

The text of each names the store and the key. Nothing is logged here, and no secret is ever in a text.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """`modified_s`: by the store's clock."""

    key: str
    nbytes: int
    modified_s: float


class Created(enum.Enum):
    """What became of a conditional creation. Lost answers are settled by reading back."""

    OURS = "ours"  # it is there, and it is what we wrote
    ANOTHERS = "anothers"  # something else was there first; nothing was changed


@dataclass(frozen=True, slots=True)
class Probe:
    """What a start-up probe found. `refuses_existing`: a second conditional creation is refused. `keeps_checksums`: a
    put with a wrong checksum is refused. `skew_s`: the store's clock minus ours. `problems`: in words, for people.
    """

    refuses_existing: bool
    keeps_checksums: bool
    skew_s: float
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class Requests:
    """How much was asked of a store since it was opened. Written under the store's lock."""

    count: dict[str, int] = field(
        default_factory=dict
    )  # by kind: put, get, head, list, delete, part, complete, abort
    sent_nbytes: int = 0
    received_nbytes: int = 0
    retries: int = 0


class Upload(Protocol):
    """A large object on its way. It appears whole at `commit`, or never. Used by one thread at a time."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append. The buffers may be reused when it returns."""

    def commit(self) -> int:
        """Make the object appear, durably. Returns its size. An object of that key that is there already is replaced by
        none or by equal bytes only: keys of large objects carry a write id that nobody else has.
        """

    def abort(self) -> None:
        """Leave nothing behind. Idempotent; after a commit nothing happens. Never raises for a store that is away."""


class Store(Protocol):
    @property
    def description(self) -> str:
        """For people: `s3://bucket/prefix at https://host`, `/path`. No secrets."""

    @property
    def requests(self) -> Requests: ...

    def probe(self) -> Probe:
        """Try what a commit rests upon, under keys below `probe/` that are removed again."""

    def now_s(self) -> float:
        """The store's clock: of its last answer, moved on by our monotonic clock; asks if there was none lately."""

    def create(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> Created:
        """Create a small object (at most 64 MiB) if its key is free: atomic, durable when it returns.

        On a refusal, and after an answer that was lost, the object is read back: equal bytes are OURS (callers put a
        write id into them), others ANOTHERS. What cannot be read back is raised, never guessed.
        """

    def put(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> None:
        """Create or replace a small object, atomically (signs of life, pins)."""

    def upload(self, key: str, *, nbytes: int | None = None) -> Upload:
        """Begin a large object. `nbytes`: its size, if it is known."""

    def read(self, key: str, *, max_nbytes: int, deadline_s: float | None = None) -> bytes:
        """The whole object.

        Raises:
            IntegrityError: kind `store_bytes`: it is larger than `max_nbytes`.
        """

    def read_into(
        self, key: str, offset: int, buffer: memoryview, *, deadline_s: float | None = None
    ) -> None:
        """Fill `buffer` with the object's bytes from `offset` on.

        Raises:
            IntegrityError: kind `store_bytes`: the object ends before.
        """

    def head(self, key: str, *, deadline_s: float | None = None) -> ObjectInfo: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, in no promised order; what is not one of ours (temporary files)
        is left out. A prefix without objects gives nothing; a missing bucket or root raises NotFoundError.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Delete what is there. Idempotent."""

    def unfinished(self) -> Iterator[tuple[str, str, float]]:
        """Uploads that were begun and neither committed nor aborted, by whomever: (key, token, begun_s)."""

    def abort_unfinished(self, key: str, token: str) -> None: ...

    def close(self) -> None:
        """Let go of connections and threads."""
