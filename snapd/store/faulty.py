"""A store that fails by script, for tests: before or after the effect, slow, short, flipped, throttled. Deterministic.

A script is a list of faults, each for one kind of call and for keys that begin in a certain way; each strikes a
number of times, after having let a number of calls pass. What struck is noted in `struck`, in order. Without faults
the wrapper is transparent.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapd.errors import CapacityError, IntegrityError, SnapdError, UnavailableError
from snapd.store.base import Buffer, Created, ObjectInfo, Probe, Requests, Store, Upload
from snapd.store.surroundings import view_of


class Effect(enum.Enum):
    REFUSE = "refuse"  # an error, and nothing was done
    LOSE_ANSWER = "lose answer"  # it was done; an error all the same
    THROTTLE = "throttle"  # an error, and nothing was done
    FILL = "fill"  # no room, and nothing was done
    STALL = "stall"  # `stall` is called first, then it is done
    SHORT = "short"  # the bytes that are read end early
    FLIP = "flip"  # one bit of what is read is another


@dataclass(frozen=True, slots=True)
class Fault:
    """`call`: name of a method: create, put, write, commit, read, read_into, head, list, delete, ...
    `times`: how often it strikes; -1: from then on always.
    """

    call: str
    effect: Effect
    prefix: str = ""
    skip: int = 0
    times: int = 1


class FaultyStore:
    """See base.Store."""

    def __init__(
        self, store: Store, faults: Sequence[Fault] = (), *, stall: Callable[[], None] = lambda: None
    ) -> None:
        self.store = store
        self.struck: list[tuple[str, str, Effect]] = []  # (call, key, effect)
        self._stall = stall
        self._lock = threading.Lock()
        self._faults: list[list[int]] = []  # left to skip, left to strike, as `_script` has them
        self._script: tuple[Fault, ...] = ()
        self.play(faults)

    def play(self, faults: Sequence[Fault]) -> None:
        """Replace the script."""
        with self._lock:
            self._script = tuple(faults)
            self._faults = [[fault.skip, fault.times] for fault in faults]

    def before(self, call: str, key: str) -> Effect | None:
        """Strike, if it is time; what is left to do afterwards."""
        effect = self._due(call, key)
        if effect is Effect.STALL:
            self._stall()
            return None
        error = _error(effect, call, key)
        if error is not None:
            raise error
        return effect

    def after(self, effect: Effect | None, call: str, key: str) -> None:
        if effect is Effect.LOSE_ANSWER:
            raise UnavailableError(f"the answer to {call} {key} was lost", kind="store_unreachable")

    def _due(self, call: str, key: str) -> Effect | None:
        with self._lock:
            for fault, left in zip(self._script, self._faults, strict=True):
                if fault.call != call or not key.startswith(fault.prefix) or left[1] == 0:
                    continue
                if left[0] > 0:
                    left[0] -= 1
                    continue
                left[1] -= left[1] > 0
                self.struck.append((call, key, fault.effect))
                return fault.effect
        return None

    def is_kept_from(self, call: str, key: str) -> bool:
        """For what never raises: it does not happen."""
        return self._due(call, key) is not None

    # the store

    @property
    def description(self) -> str:
        return self.store.description

    @property
    def requests(self) -> Requests:
        return self.store.requests

    def probe(self) -> Probe:
        self.before("probe", "")
        return self.store.probe()

    def now_s(self) -> float:
        self.before("now_s", "")
        return self.store.now_s()

    def create(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> Created:
        effect = self.before("create", key)
        created = self.store.create(key, data, deadline_s=deadline_s)
        self.after(effect, "create", key)
        return created

    def put(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> None:
        effect = self.before("put", key)
        self.store.put(key, data, deadline_s=deadline_s)
        self.after(effect, "put", key)

    def upload(self, key: str, *, nbytes: int | None = None) -> Upload:
        effect = self.before("upload", key)
        upload = self.store.upload(key, nbytes=nbytes)
        self.after(effect, "upload", key)
        return _FaultyUpload(self, key, upload)

    def read(self, key: str, *, max_nbytes: int, deadline_s: float | None = None) -> bytes:
        effect = self.before("read", key)
        data = bytearray(self.store.read(key, max_nbytes=max_nbytes, deadline_s=deadline_s))
        if effect is Effect.SHORT:
            del data[len(data) // 2 :]
        if effect is Effect.FLIP and data:
            data[len(data) // 2] ^= 1
        self.after(effect, "read", key)
        return bytes(data)

    def read_into(
        self, key: str, offset: int, buffer: memoryview, *, deadline_s: float | None = None
    ) -> None:
        effect = self.before("read_into", key)
        if effect is Effect.SHORT:
            raise IntegrityError(
                f"{key} in {self.description} ends before {offset + buffer.nbytes}", kind="store_bytes"
            )
        self.store.read_into(key, offset, buffer, deadline_s=deadline_s)
        view = view_of(buffer)
        if effect is Effect.FLIP and view.nbytes:
            view[view.nbytes // 2] ^= 1
        self.after(effect, "read_into", key)

    def head(self, key: str, *, deadline_s: float | None = None) -> ObjectInfo:
        self.before("head", key)
        return self.store.head(key, deadline_s=deadline_s)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.before("list", prefix)
        return self.store.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """A script sees one key after the other: what comes before a fault is deleted."""
        for key in keys:
            effect = self.before("delete", key)
            self.store.delete([key])
            self.after(effect, "delete", key)

    def unfinished(self) -> Iterator[tuple[str, str, float]]:
        self.before("unfinished", "")
        return self.store.unfinished()

    def abort_unfinished(self, key: str, token: str) -> None:
        self.before("abort_unfinished", key)
        self.store.abort_unfinished(key, token)

    def close(self) -> None:
        self.store.close()


class _FaultyUpload:
    """See base.Upload."""

    def __init__(self, script: FaultyStore, key: str, upload: Upload) -> None:
        self._script = script
        self._key = key
        self._upload = upload

    def write(self, buffers: Sequence[Buffer]) -> None:
        effect = self._script.before("write", self._key)
        self._upload.write(buffers)
        self._script.after(effect, "write", self._key)

    def commit(self) -> int:
        effect = self._script.before("commit", self._key)
        nbytes = self._upload.commit()
        self._script.after(effect, "commit", self._key)
        return nbytes

    def abort(self) -> None:
        """As base says, it never raises; a script can keep it from happening."""
        if self._script.is_kept_from("abort", self._key):
            return
        self._upload.abort()


def _error(effect: Effect | None, call: str, key: str) -> SnapdError | None:
    if effect is Effect.REFUSE:
        return UnavailableError(f"{call} {key} was refused", kind="store_failing")
    if effect is Effect.THROTTLE:
        return UnavailableError(f"{call} {key} came too soon", kind="store_throttled")
    if effect is Effect.FILL:
        return CapacityError(f"no room for {call} {key}", kind="store_full")
    return None
