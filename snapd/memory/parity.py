"""The parity that this node holds for one job: fragments in frames of their own segments, and why each is kept.

A fragment is kept while a row map of this node plans its row; it is in the index only after its bytes were checked, and
its frame is free only after its deletion was committed. Frames that no row of the index names are free at a restart.

Index rows are written on the event loop's thread only (methods that say so); the rest is safe from any thread: a lock
guards the frames and the table of fragments, and a frame that is read is held, so that it is not written to meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import xxhash

from snapd.core.frames import FramePool
from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.core.protection import PlacedRecord, RowMap, RowPlan, make_plan
from snapd.core.recovery import HeldRows
from snapd.errors import (
    CapacityError,
    IntegrityError,
    InvariantViolated,
    NotFoundError,
    UnavailableError,
)
from snapd.memory.folders import JobFolder
from snapd.memory.index import Index
from snapd.memory.protection_rows import FragmentRow
from snapd.memory.segments import Segment, SegmentSet

PARITY_SEGMENTS_MAX = 4096
_WRITER = 0  # session id of the frames' writers: the daemon itself
MapKey = tuple[SnapshotId, int]
FragmentKey = tuple[bytes, int]


@dataclass(slots=True)
class Fragment:
    """One held fragment. `is_checked`: hashed since this process began."""

    row: FragmentRow
    is_checked: bool


@dataclass(slots=True)
class Reservation:
    """A frame that is being filled; `view` has the fragment's size. `is_open` until it is committed or cancelled."""

    row_id: bytes
    number: int
    place: Place
    view: memoryview
    owner: LaneKey
    is_open: bool = True


Filled = tuple[Reservation, bytes]
"""With the digest of what was written into it."""


@dataclass(slots=True)
class _SizeClass:
    """Frames of one size: nodes of one job may have chunks of different sizes."""

    memory: SegmentSet
    pool: FramePool = field(default_factory=FramePool)


class ParityStore:
    """See the head of this file. Begins empty; `load` takes up what the index names."""

    def __init__(self, job: str, folder: JobFolder, index: Index) -> None:
        self._job = job
        self._folder = folder
        self._index = index.protection
        self._lock = threading.Lock()
        self._classes: dict[int, _SizeClass] = {}
        self._class_of: dict[int, _SizeClass] = {}  # by number of segment
        self._fragments: dict[FragmentKey, Fragment] = {}
        self._plans: dict[MapKey, RowPlan] = {}
        self._references: Counter[bytes] = Counter()
        self._row_bytes: dict[bytes, int] = {}
        self._writers = 0
        self.version = 0  # grows whenever a fragment or a plan comes or goes
        self.losses = 0  # the same, but for fragments that come

    # what there is

    @property
    def nbytes(self) -> int:
        """Backed bytes of all parity segments."""
        return sum(one.memory.nbytes for one in self._classes.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the frames in which fragments lie."""
        with self._lock:
            return sum(one.pool.held_count * one.memory.chunk_bytes for one in self._classes.values())

    @property
    def is_empty(self) -> bool:
        return not self._plans and not self._classes

    @property
    def segments(self) -> list[Segment]:
        return [segment for one in self._classes.values() for segment in one.memory.segments.values()]

    @property
    def next_segment(self) -> int:
        return max(self._class_of, default=-1) + 1

    def plan(self, snapshot: SnapshotId, epoch: int) -> RowPlan | None:
        return self._plans.get((snapshot, epoch))

    def plans(self) -> list[RowPlan]:
        """All, the oldest snapshot first."""
        return [self._plans[key] for key in sorted(self._plans)]

    def records(self, row_map: RowMap) -> list[PlacedRecord]:
        """On the loop. The records that a row map follows from; IntegrityError when one is damaged."""
        return self._index.records(row_map)

    def has(self, row_id: bytes, number: int) -> bool:
        with self._lock:
            return (row_id, number) in self._fragments

    def held_among(self, keys: Iterable[FragmentKey]) -> set[FragmentKey]:
        with self._lock:
            return {key for key in keys if key in self._fragments}

    def doubt(self, keys: Iterable[FragmentKey]) -> list[FragmentKey]:
        """Those of these that are here: they are hashed anew before they are read again."""
        with self._lock:
            found = [(key, self._fragments[key]) for key in keys if key in self._fragments]
            for _, fragment in found:
                fragment.is_checked = False
        return [key for key, _ in found]

    def unchecked(self, keys: Iterable[FragmentKey]) -> list[FragmentKey]:
        """Which of these are here and were not hashed since this process began."""
        with self._lock:
            found = ((key, self._fragments.get(key)) for key in keys)
            return [key for key, fragment in found if fragment is not None and not fragment.is_checked]

    def held_rows(self) -> list[HeldRows]:
        """For the inventory: per row map, the rows of which some fragment is here, and whose records are."""
        with self._lock:
            held = set(self._fragments)
        return [
            HeldRows(
                plan.map.id,
                plan.map.group,
                plan.map.epoch,
                plan.map.nodes,
                plan.map.code,
                frozenset(
                    (row.id, number)
                    for row in plan.rows
                    for number in range(len(row.parity_nodes))
                    if (row.id, number) in held
                ),
                frozenset(chunk.rank for row in plan.rows for chunk in row.chunks),
            )
            for plan in self.plans()
        ]

    def check(self) -> None:
        """Raise InvariantViolated unless the frames add up, and each fragment lies in a held one. For tests."""
        with self._lock:
            for one in self._classes.values():
                one.pool.check()
            for fragment in self._fragments.values():
                place = fragment.row.place
                if self._class_of[place.segment].pool.reference_count(place) < 1:
                    raise InvariantViolated("a fragment in a free frame", segment=place.segment)

    # start

    def load(self) -> list[str]:
        """On the loop, once: take up what the index names. Returns what had to be given up, in words.

        Raises:
            IntegrityError: a segment or a fragment's place is not what the index says.
        """
        for number, nbytes, frame_bytes in self._index.segments():
            path = self._folder.parity_segment(number)
            self._add(Segment.open(path, number, nbytes, is_writable=True), frame_bytes)
        problems: list[str] = []
        for row_map in self._index.maps():
            try:
                plan = make_plan(row_map, self._index.records(row_map))
            except (IntegrityError, InvariantViolated, KeyError) as error:
                problems.append(f"row map of {row_map.id}: {error}")
                self._index.remove([row_map], ())
                continue
            self._refer(plan)
        useless: list[FragmentKey] = []
        for row in self._index.fragments():
            if row.row_id not in self._references:
                useless.append((row.row_id, row.number))
                continue
            one = self._class_of.get(row.place.segment)
            if one is None or not one.memory.has(row.place, row.nbytes):
                raise IntegrityError("a parity fragment outside its segment", kind="index")
            one.pool.hold([row.place])
            self._fragments[row.row_id, row.number] = Fragment(row, is_checked=False)
        if useless:
            self._index.remove((), useless)
        return problems

    # growth

    def frames_missing(self, plan: RowPlan, node: str) -> int:
        """Frames of `plan.frame_bytes` to back for the fragments that the plan gives to `node`."""
        with self._lock:
            missing = {
                (row.id, number)
                for row, number in plan.given_to(node)
                if (row.id, number) not in self._fragments
            }
            one = self._classes.get(plan.frame_bytes)
            return max(0, len(missing) - (one.pool.free_count if one else 0))

    def add_segment(self, segment: Segment, frame_bytes: int) -> None:
        """On the loop: record and take up a segment that is backed and mapped for writing."""
        self._index.add_segment(segment.number, segment.nbytes, frame_bytes)
        self._add(segment, frame_bytes)

    def _add(self, segment: Segment, frame_bytes: int) -> None:
        with self._lock:
            one = self._classes.setdefault(frame_bytes, _SizeClass(SegmentSet(-1, frame_bytes)))
            one.memory.add(segment)
            one.pool.add_segment(segment.number, segment.nbytes // frame_bytes)
            self._class_of[segment.number] = one

    # row maps

    def adopt(self, plan: RowPlan, records: Sequence[PlacedRecord]) -> None:
        """On the loop: store the row map and the records that it follows from. Fragments of its rows are taken from
        now on. A different plan of the same snapshot and epoch is replaced; its fragments stay until `drop`.
        """
        self._index.put_map(plan.map, records)
        with self._lock:
            former = self._plans.pop(plan.map.key, None)
            if former is not None:
                self._unrefer(former)
            self._refer(plan)
            self.version += 1
            self.losses += 1

    def drop(self, snapshot: SnapshotId, *, below_epoch: int | None = None) -> int:
        """On the loop: forget the row maps of a snapshot (those made before `below_epoch`, if it is given), and free
        what no other map needs. Returns how many frames that were. Idempotent.
        """
        doomed = [
            plan
            for (known, epoch), plan in self._plans.items()
            if known == snapshot and (below_epoch is None or epoch < below_epoch)
        ]
        with self._lock:
            left = Counter(self._references)
            for plan in doomed:
                left.subtract(Counter(row.id for row in plan.rows))
            useless = [key for key in self._fragments if left[key[0]] < 1]
        if not doomed and not useless:
            return 0
        self._index.remove([plan.map for plan in doomed], useless)
        with self._lock:
            self.version += 1
            self.losses += 1
            for plan in doomed:
                self._unrefer(plan)
                del self._plans[plan.map.key]
            return sum(self._forget(key) for key in useless)

    def _refer(self, plan: RowPlan) -> None:
        self._plans[plan.map.key] = plan
        for row in plan.rows:
            self._references[row.id] += 1
            self._row_bytes[row.id] = row.nbytes

    def _unrefer(self, plan: RowPlan) -> None:
        for row in plan.rows:
            self._references[row.id] -= 1
            if self._references[row.id] < 1:
                del self._references[row.id]
                del self._row_bytes[row.id]

    # fragments

    def reserve(self, row_id: bytes, number: int, nbytes: int) -> Reservation:
        """A frame to fill; `commit` or `cancel` it.

        Raises:
            UnavailableError: kind `not_planned`. CapacityError: kind `parity_full`. IntegrityError: kind `fragment`:
            the row's fragments have another size.
        """
        with self._lock:
            self.check_planned(row_id)
            if nbytes != self._row_bytes[row_id]:
                raise IntegrityError("a parity fragment of another size", kind="fragment", nbytes=nbytes)
            owner = LaneKey(_WRITER, self._writers)
            for frame_bytes in sorted(self._classes):
                one = self._classes[frame_bytes]
                places = one.pool.grant(owner, 1) if frame_bytes >= nbytes else None
                if places:
                    self._writers += 1
                    return Reservation(row_id, number, places[0], one.memory.view(places[0], nbytes), owner)
        raise CapacityError(
            "no free frame for parity",
            kind="parity_full",
            hint="it grows when the plan is known",
            job=self._job,
        )

    def check_planned(self, row_id: bytes) -> None:
        """Raise UnavailableError (kind `not_planned`) unless a row map here names that row."""
        if row_id not in self._references:
            raise UnavailableError("no row map here names that row", kind="not_planned", job=self._job)

    def cancel(self, reservation: Reservation) -> None:
        """The frame is free again; nobody writes to it any more. Idempotent, and nothing after `commit`."""
        if not reservation.is_open:
            return
        reservation.is_open = False
        reservation.view.release()
        with self._lock:
            self._class_of[reservation.place.segment].pool.return_grant(reservation.owner)

    def commit(self, filled: Sequence[Filled]) -> list[UnavailableError | None]:
        """On the loop, in one transaction: the bytes were checked; from now on the fragments are held. One that is here
        already stays, and the frame is free again. Returns, for each, None or an error (kind `not_planned`): its plan
        is gone. The caller cancels what failed; everything, when this raises.
        """
        problems: list[UnavailableError | None] = []
        known: list[Reservation] = []
        new: dict[FragmentKey, tuple[Reservation, FragmentRow]] = {}
        with self._lock:
            for reservation, digest in filled:
                key = (reservation.row_id, reservation.number)
                try:
                    self.check_planned(key[0])
                except UnavailableError as error:
                    problems.append(error)
                    continue
                problems.append(None)
                if key in self._fragments or key in new:
                    known.append(reservation)
                else:
                    row = FragmentRow(*key, reservation.place, reservation.view.nbytes, digest)
                    new[key] = (reservation, row)
        if new:
            self._index.add_fragments(row for _, row in new.values())
            self._hold(new)
        for reservation in known:
            self.cancel(reservation)
        return problems

    def _hold(self, new: Mapping[FragmentKey, tuple[Reservation, FragmentRow]]) -> None:
        """Their rows were committed."""
        with self._lock:
            for key, (reservation, row) in new.items():
                reservation.is_open = False
                reservation.view.release()
                self._class_of[row.place.segment].pool.settle(reservation.owner, [row.place])
                self._fragments[key] = Fragment(row, is_checked=True)
            self.version += 1

    @contextmanager
    def read(self, row_id: bytes, number: int) -> Iterator[tuple[memoryview, bytes]]:
        """The bytes and their digest; they stay where they are until the context ends. Hashed first, if that was not
        done since this process began.

        Raises:
            NotFoundError: kind `fragment`. IntegrityError: kind `digest`: the bytes are not what was recorded: the
            caller calls `discard` on the loop.
        """
        with self._pinned(row_id, number) as (fragment, view):
            if not fragment.is_checked:
                if xxhash.xxh3_128_digest(view) != fragment.row.digest:
                    raise IntegrityError("a parity fragment has changed", kind="digest", job=self._job)
                fragment.is_checked = True
            yield view, fragment.row.digest

    @contextmanager
    def _pinned(self, row_id: bytes, number: int) -> Iterator[tuple[Fragment, memoryview]]:
        with self._lock:
            fragment = self._fragments.get((row_id, number))
            if fragment is None:
                raise NotFoundError("no such parity fragment here", kind="fragment", job=self._job)
            place = fragment.row.place
            one = self._class_of[place.segment]
            one.pool.hold([place])
            view = one.memory.view(place, fragment.row.nbytes)
        try:
            yield fragment, view
        finally:
            view.release()
            with self._lock:
                one.pool.release([place])

    def discard(self, row_id: bytes, number: int) -> None:
        """On the loop: a fragment is bad; forget it. Idempotent."""
        if self.has(row_id, number):
            self._index.remove((), [(row_id, number)])
            with self._lock:
                self._forget((row_id, number))

    def _forget(self, key: FragmentKey) -> int:
        place = self._fragments.pop(key).row.place
        self.version += 1
        self.losses += 1
        return self._class_of[place.segment].pool.release([place])
