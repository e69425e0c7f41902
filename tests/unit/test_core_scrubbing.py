"""What of a node's disk is read again next, and how fast: pure decisions."""

from __future__ import annotations

from snapd.core.scrubbing import BATCH_BYTES, RATE_MIN, ScrubRules, batches, choose_scrub, scrub_rate
from snapd.core.stored import Encoding, StoredChunk
from snapd.units import GIB, MIB

DAY = ScrubRules(period_s=86400.0, rate_max=64.0 * MIB)


def chunk(offset: int, nbytes: int = MIB, pack: str = "p") -> StoredChunk:
    return StoredChunk(nbytes, b"d" * 16, pack, offset, nbytes, Encoding.RAW)


def test_all_is_read_within_half_of_the_period_and_never_faster_than_allowed() -> None:
    assert scrub_rate(0, DAY) == RATE_MIN
    assert scrub_rate(30 * GIB, DAY) == RATE_MIN  # is through in 8.5 hours
    assert scrub_rate(1024 * GIB, DAY) * DAY.period_s / 2 == 1024 * GIB
    assert scrub_rate(1 << 50, DAY) == DAY.rate_max
    assert scrub_rate(1, ScrubRules(86400.0, 1000.0)) == 1000.0


def test_what_was_not_read_for_the_longest_time_comes_first_when_it_is_due() -> None:
    read_s = {"a": 100.0, "b": 50.0, "c": 70.0}
    choice = choose_scrub(read_s, 51.0, DAY, "salt")
    assert (choice.key, choice.wait_s) == (None, 43199.0)
    assert choose_scrub(read_s, 43250.0, DAY, "salt").key == "b"


def test_what_this_daemon_has_not_read_yet_comes_before_in_an_order_of_its_own() -> None:
    unread = dict.fromkeys(map(str, range(9)))
    firsts = {choose_scrub({**unread, "old": 0.0}, 1e9, DAY, f"salt {life}").key for life in range(40)}
    assert len(firsts) > 5
    assert "old" not in firsts
    assert choose_scrub(unread, 0.0, DAY, "x") == choose_scrub(unread, 9.0, DAY, "x")


def test_nothing_is_read_where_there_is_nothing_or_nothing_is_asked_for() -> None:
    assert choose_scrub({}, 0.0, DAY, "").key is None
    assert choose_scrub({"a": None}, 0.0, ScrubRules(0.0, 1.0), "").key is None


def test_neighbours_are_read_together_and_each_place_once() -> None:
    chunks = [chunk(offset * MIB) for offset in (3, 1, 2, 0, 2)] + [
        chunk(9 * MIB, 2 * BATCH_BYTES),
        chunk(90 * MIB),
    ]
    found = batches(chunks)
    assert [[c.offset // MIB for c in batch] for batch in found] == [[0, 1, 2, 3], [9], [90]]
    assert batches([]) == []
