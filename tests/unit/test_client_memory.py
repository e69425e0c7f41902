"""What a restore has mapped: its own is closed, what the session lends is not."""

from __future__ import annotations

from typing import Any

from snapd_client.session import ShardMemory


class Mapped:
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_what_the_session_maps_meanwhile_stays_open() -> None:
    own, later, other = Mapped(), Mapped(), Mapped()
    segments: dict[int, Any] = {1: own}
    memory = ShardMemory({}, set())
    memory.borrow(0, segments)
    memory.mappings[1, 1] = other  # type: ignore[assignment]
    segments[2] = later  # the arena grew while chunks were brought
    memory.borrow(0, segments)
    memory.close()
    assert not own.is_closed and not later.is_closed and other.is_closed


def test_what_was_mapped_for_reading_before_is_closed_all_the_same() -> None:
    mine, lent = Mapped(), Mapped()
    memory = ShardMemory({(0, 2): mine}, set())  # type: ignore[dict-item]
    memory.borrow(0, {2: lent})  # type: ignore[dict-item]
    memory.close()
    assert mine.is_closed and not lent.is_closed
