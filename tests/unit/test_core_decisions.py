"""Ids, geometry, capacity, generations, interval: small tables of what is decided, and why."""

from __future__ import annotations

import pytest

from snapd.core.capacity import Limit, check_fits
from snapd.core.generations import Generation, assign
from snapd.core.geometry import (
    CHUNK_BYTES_MIN,
    choose_chunk_bytes,
    entry_capacity_for,
    frames_for,
    missing_frames,
)
from snapd.core.ids import SnapshotId, check_world, checked_incarnation, checked_job_name
from snapd.core.interval import LEAD_STEPS, NARROW_AFTER_COMPLETE, Interval, after_abort, after_complete
from snapd.errors import CapacityError, ConfigError, ConflictError, FencedError, SnapdError
from snapd.units import GIB, KIB, MIB, format_size, parse_duration_s, parse_size


@pytest.mark.parametrize("name", ["a", "gpt-small", "A.b_c-9", "0", "x" * 128])
def test_good_job_names(name):
    assert checked_job_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\x00b", "a\n", "-a", "_a", "ä", "x" * 129])
def test_bad_job_names(name):
    with pytest.raises(ConfigError) as error:
        checked_job_name(name)
    assert error.value.kind == "job_name"
    assert "/" not in str(error.value) or name.count("/")


def test_incarnations():
    assert checked_incarnation("f00:1-2.3_x") == "f00:1-2.3_x"
    with pytest.raises(ConfigError):
        checked_incarnation("a/b")


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        ((0, 1, 0, 1), None),
        ((3, 4, 3, 4), None),
        ((0, 0, 0, 1), "world"),
        ((1, 1, 0, 1), "world"),
        ((-1, 1, 0, 1), "world"),
        ((0, 2, 2, 2), "world"),
        ((0, 2, 0, 3), "world"),
        ((0, 1 << 17, 0, 1), "world"),
        ((0, 4, 0, 2), "no_coordination"),
    ],
)
def test_worlds(world, kind):
    if kind is None:
        check_world(*world, is_clustered=False)
        return
    with pytest.raises(ConfigError) as error:
        check_world(*world, is_clustered=False)
    assert error.value.kind == kind


def test_a_world_on_several_machines_needs_coordination_only():
    check_world(0, 4, 0, 2, is_clustered=True)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (0, MIB),
        (1, CHUNK_BYTES_MIN),
        (16 * MIB, CHUNK_BYTES_MIN),
        (GIB, 4 * MIB),
        (360 * MIB, MIB),
        (1500 * MIB, 4 * MIB),
        (1 << 40, 4 * MIB),
    ],
)
def test_chunks_are_small_enough_for_the_state(state, expected):
    size, reason = choose_chunk_bytes(state, requested=0, kept=0, default=4 * MIB)
    assert size == expected and reason


def test_a_job_keeps_its_chunk_size_whatever_is_asked_for():
    assert choose_chunk_bytes(GIB, requested=MIB, kept=128 * KIB, default=4 * MIB)[0] == 128 * KIB
    assert choose_chunk_bytes(GIB, requested=MIB, kept=0, default=4 * MIB)[0] == MIB
    for wrong in (1, 3 * MIB, 32 * KIB, 128 * MIB):
        with pytest.raises(ConfigError):
            choose_chunk_bytes(GIB, requested=wrong, kept=0, default=4 * MIB)


def test_arithmetic_of_frames():
    assert [frames_for(n, 100) for n in (0, 1, 100, 101)] == [0, 1, 1, 2]
    assert missing_frames(wanted_per_slot=10, slots=2, usable=15) == 5
    assert missing_frames(wanted_per_slot=10, slots=2, usable=25) == 0
    assert entry_capacity_for(0, MIB) == 16384
    assert entry_capacity_for(MIB, MIB) == 4096
    assert entry_capacity_for(100 * GIB, MIB) == 4 * 100 * 1024 + 1024


def test_a_refusal_names_the_tightest_limit_the_holders_and_the_remedy():
    limits = [Limit("roomy", 10 * GIB, "no"), Limit("tight", 5, "do this")]
    check_fits(5, limits, {}, job="j", rank=0)
    check_fits(1 << 50, [], {}, job="j", rank=0)
    with pytest.raises(CapacityError) as error:
        check_fits(6, limits, {"small": 1, "big": GIB, "none": 0}, job="j", rank=3)
    assert error.value.message == (
        "the arena needs 6 bytes more (6 B), 5 are available (tight); held by: big 1 GiB, small 1 B"
    )
    assert error.value.hint.startswith("do this; ")
    assert error.value.context == {"job": "j", "rank": 3, "needed_bytes": 6, "available_bytes": 5}


def table(*rows):
    return {(row.incarnation, row.rollback_count): row for row in rows}


def test_generations_are_given_out_once():
    first = assign({}, incarnation="a", rollback_count=0, world_size=2)
    assert (first.generation.number, first.is_new) == (1, True)
    rows = table(first.generation)
    again = assign(rows, incarnation="a", rollback_count=0, world_size=2)
    assert (again.generation.number, again.is_new) == (1, False)
    other = assign(rows, incarnation="b", rollback_count=0, world_size=4)
    assert (other.generation.number, other.is_new) == (2, True)
    rolled = assign(rows, incarnation="a", rollback_count=1, world_size=2)
    assert (rolled.generation.number, rolled.is_new) == (2, True)


@pytest.mark.parametrize(
    ("request_", "error", "kind"),
    [
        (("a", 0, 2), FencedError, "stale_generation"),
        (("a", 2, 2), FencedError, "stale_generation"),
        (("b", 0, 2), FencedError, "stale_generation"),
        (("c", 0, 3), ConflictError, "world_size"),
        (("c", 2, 2), ConflictError, "rollback_count"),
        (("new", 1, 2), ConflictError, "rollback_count"),
    ],
)
def test_generations_that_are_refused(request_, error, kind):
    rows = table(
        Generation(1, "a", 0, 2), Generation(2, "a", 1, 2), Generation(3, "b", 0, 2), Generation(4, "c", 0, 2)
    )
    incarnation, rollback_count, world_size = request_
    with pytest.raises(error) as found:
        assign(rows, incarnation=incarnation, rollback_count=rollback_count, world_size=world_size)
    assert found.value.kind == kind


def test_the_interval_widens_from_a_step_that_no_rank_can_have_reached():
    interval, reason = after_abort(Interval(configured=3), newest_step_seen=100, factor_max=4)
    assert (interval.steps, reason) == (6, "a rank found no free slot")
    assert interval.from_step >= 100 + LEAD_STEPS and interval.from_step % 6 == 0
    same, reason = after_abort(interval, newest_step_seen=101, factor_max=4)
    assert (same.steps, same.from_step, reason) == (6, interval.from_step, "a change is under way already")
    wider, _ = after_abort(interval, newest_step_seen=interval.from_step, factor_max=4)
    assert wider.steps == 12
    bound, reason = after_abort(wider, newest_step_seen=wider.from_step, factor_max=4)
    assert (bound.steps, reason) == (12, "at its bound")


def test_the_interval_narrows_after_a_long_time_without_a_skip():
    interval = Interval(configured=1, factor=2, from_step=10)
    for count in range(1, NARROW_AFTER_COMPLETE):
        interval, reason = after_complete(interval, newest_step_seen=100)
        assert (interval.complete_since, reason) == (count, "not yet")
    interval, _ = after_complete(interval, newest_step_seen=100)
    assert (interval.factor, interval.complete_since) == (1, 0)
    assert interval.from_step >= 100 + LEAD_STEPS
    assert after_complete(interval, newest_step_seen=1000)[0] == interval
    assert after_abort(Interval(complete_since=9), newest_step_seen=5, factor_max=1)[0].complete_since == 0


def test_snapshots_are_ordered_by_age():
    assert sorted([SnapshotId(2, 1), SnapshotId(1, 9), SnapshotId(1, 10)])[-1] == SnapshotId(2, 1)
    assert str(SnapshotId(3, 1200)) == "3/1200"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("64MiB", 64 * MIB),
        ("4G", 4 * GIB),
        ("1.5 GB", 1_500_000_000),
        ("2k", 2048),
        ("7b", 7),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_what_is_no_size_or_duration():
    for text in ("", "x", "-1", "1 XB", "1 2"):
        with pytest.raises(ValueError, match="not a size"):
            parse_size(text)
    for text in ("", "x", "-1s", "1y"):
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration_s(text)
    assert [parse_duration_s(t) for t in ("250ms", "1.5s", "2m", "1h", "3")] == [0.25, 1.5, 120, 3600, 3]
    assert [format_size(n) for n in (0, 1023, 64 * MIB, 1568669696, 5 << 40)] == [
        "0 B",
        "1023 B",
        "64 MiB",
        "1.46 GiB",
        "5 TiB",
    ]


def test_an_error_is_one_line():
    error = SnapdError("write refused: epoch superseded", kind="fenced", step=1200, epoch=7)
    assert str(error) == "write refused: epoch superseded [fenced] step=1200 epoch=7"
