"""The frames of one (job, rank): who holds each, and how often.

A frame is, at any moment, exactly one of: free (backed, nobody may write to it), granted (a lane's writer may
write to it), held (part of at least one captured shard, immutable; the count says how many), set aside (its
writer is fenced or lost but not known to be dead). Invariants, tested against a dict model: no frame is in
two states, none is granted twice, a count is never below one while it exists, and only `known_dead` or the
writer's own word takes a frame out of a writer's hands.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import LaneKey, Place
from snapd.errors import InvariantViolated


@dataclass(slots=True)
class FramePool:
    """Mutable, single-threaded; pure in that it knows numbers only."""

    segments: dict[int, int] = field(default_factory=dict)
    _free: set[Place] = field(default_factory=set)
    _order: list[Place] = field(default_factory=list)  # heap: all free ones, and some that no longer are
    _granted: dict[LaneKey, list[Place]] = field(default_factory=dict)
    _held: dict[Place, int] = field(default_factory=dict)
    _set_aside: dict[int, set[Place]] = field(default_factory=dict)

    def add_segment(self, segment: int, frame_count: int) -> None:
        """Take up a backed segment; all of its frames are free."""
        if segment in self.segments or frame_count < 1:
            raise InvariantViolated("segment added twice or empty", segment=segment, frames=frame_count)
        self.segments[segment] = frame_count
        self._set_free(Place(segment, frame) for frame in range(frame_count))

    # what there is

    @property
    def total_count(self) -> int:
        return sum(self.segments.values())

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def held_count(self) -> int:
        return len(self._held)

    @property
    def granted_count(self) -> int:
        return sum(len(places) for places in self._granted.values())

    @property
    def set_aside_count(self) -> int:
        return sum(len(places) for places in self._set_aside.values())

    def set_aside_of(self, session_id: int) -> int:
        return len(self._set_aside.get(session_id, ()))

    def granted_of(self, session_id: int) -> int:
        return sum(len(places) for key, places in self._granted.items() if key.session_id == session_id)

    def grant_of(self, owner: LaneKey) -> Sequence[Place]:
        return self._granted.get(owner, ())

    def exists(self, place: Place) -> bool:
        return 0 <= place.frame < self.segments.get(place.segment, 0)

    def reference_count(self, place: Place) -> int:
        return self._held.get(place, 0)

    # grants

    def grant(self, owner: LaneKey, count: int) -> list[Place] | None:
        """Give `count` frames in all to `owner`, those that it has first; None, and nothing changed, if too
        few are free.
        """
        have = self._granted.get(owner, [])
        missing = count - len(have)
        if missing <= 0:
            return list(have)
        if missing > len(self._free):
            return None
        chosen = [self._take_lowest() for _ in range(missing)]
        self._granted[owner] = [*have, *chosen]
        return list(self._granted[owner])

    def grant_free(self, owner: LaneKey, wanted: Iterable[Place]) -> list[Place]:
        """Give those of `wanted` that are free to `owner`, behind what it has. Returns them."""
        found = [place for place in dict.fromkeys(wanted) if place in self._free]
        self._free.difference_update(found)
        if found:
            self._granted[owner] = [*self._granted.get(owner, []), *found]
        return found

    def _take_lowest(self) -> Place:
        while True:
            place = heapq.heappop(self._order)
            if place in self._free:
                self._free.remove(place)
                return place

    def _set_free(self, places: Iterable[Place]) -> None:
        """In time logarithmic in the number of frames: parity takes and frees one at a time."""
        for place in places:
            self._free.add(place)
            heapq.heappush(self._order, place)
        if len(self._order) > 2 * len(self._free) + 64:  # many were claimed or held since
            self._order = sorted(self._free)

    def claim(self, owner: LaneKey, places: Iterable[Place]) -> None:
        """At a restart: these frames are granted to `owner` by its page.

        Raises:
            InvariantViolated: one of them is not free; nothing is changed.
        """
        wanted = list(places)
        if owner in self._granted or len(set(wanted)) != len(wanted) or not self._free.issuperset(wanted):
            raise InvariantViolated(
                "a page claims frames that it cannot have", session=owner.session_id, lane=owner.lane
            )
        self._free.difference_update(wanted)
        self._granted[owner] = wanted

    def settle(self, owner: LaneKey, kept: Iterable[Place]) -> None:
        """The lane's shard was recorded: `kept` of its frames are held once each, the others are free."""
        granted = self._granted.pop(owner, [])
        kept_set = set(kept)
        if not kept_set.issubset(granted):
            self._granted[owner] = granted
            raise InvariantViolated(
                "a record keeps frames that were not granted", session=owner.session_id, lane=owner.lane
            )
        for place in granted:
            if place in kept_set:
                self._held[place] = 1
            else:
                self._set_free([place])

    def return_grant(self, owner: LaneKey) -> int:
        """The writer said that it stopped, or is known dead: its frames are free. Returns how many."""
        places = self._granted.pop(owner, [])
        self._set_free(places)
        return len(places)

    def lanes_of(self, session_id: int) -> list[int]:
        return sorted(key.lane for key in self._granted if key.session_id == session_id)

    # writers that may still write

    def set_aside(self, owner: LaneKey) -> int:
        """Never grant the lane's frames again until `known_dead`. Returns how many."""
        places = self._granted.pop(owner, [])
        if places:
            self._set_aside.setdefault(owner.session_id, set()).update(places)
        return len(places)

    def known_dead(self, session_id: int, *, keep_lanes: Collection[int] = ()) -> int:
        """The writer is dead: what it held or what was set aside is free. Returns how many frames that were.

        `keep_lanes`: complete lanes whose shards are still to be recorded; they keep their frames until then.
        """
        count = 0
        for lane in self.lanes_of(session_id):
            if lane not in keep_lanes:
                count += self.return_grant(LaneKey(session_id, lane))
        places = self._set_aside.pop(session_id, set())
        self._set_free(places)
        return count + len(places)

    # captured shards

    def hold(self, places: Iterable[Place]) -> None:
        """A record refers to each of these frames once more. A frame must be free (at a restart) or held
        already.
        """
        for place in places:
            count = self._held.get(place, 0)
            if count == 0:
                if place not in self._free:
                    raise InvariantViolated(
                        "a record refers to a frame that a writer has", segment=place.segment
                    )
                self._free.discard(place)
            self._held[place] = count + 1

    def release(self, places: Iterable[Place]) -> int:
        """A record is gone: each frame is referred to once less; those left without a reference are free."""
        freed = 0
        for place in places:
            count = self._held.get(place, 0)
            if count < 1:
                raise InvariantViolated(
                    "a frame was released too often", segment=place.segment, frame=place.frame
                )
            if count == 1:
                del self._held[place]
                self._set_free([place])
                freed += 1
            else:
                self._held[place] = count - 1
        return freed

    def check(self) -> None:
        """Raise InvariantViolated unless every frame is in exactly one state. For tests and `doctor`."""
        if not self._free.issubset(self._order):
            raise InvariantViolated("a free frame that cannot be granted")
        seen: list[Place] = [*self._free, *self._held]
        for places in self._granted.values():
            seen.extend(places)
        for aside in self._set_aside.values():
            seen.extend(aside)
        if (
            len(seen) != self.total_count
            or len(set(seen)) != len(seen)
            or min(self._held.values(), default=1) < 1
        ):
            raise InvariantViolated("the frames do not add up", seen=len(seen), total=self.total_count)
