"""A lane's table is believed in nothing: one wrong field at a time, each refused by its own message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapd.core.ids import Place, SnapshotId
from snapd.core.lanes import REUSED, HandOver, check_hand_over, grantable_lanes
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import RemoteProtocolError

SIZE = 1 << 16
GRANTED = [Place(0, n) for n in range(10, 18)]
BASE = ShardRecord(
    job="j",
    id=SnapshotId(1, 6),
    rank=0,
    world_size=1,
    chunk_bytes=SIZE,
    layout_nbytes=100,
    early_values_offset=SIZE,
    early_values_nbytes=10,
    chunks=tuple(Chunk(SIZE if n else 100, bytes(16), Place(0, n)) for n in range(4)),
    parent=None,
    captured_wall_time_s=0.0,
    digest=bytes(16),
)
GOOD = HandOver(
    sequence=7,
    generation=1,
    step=7,
    layout_nbytes=100,
    early_values_offset=SIZE,
    early_values_nbytes=10,
    handed_over_ns=1,
    copied_ns=2,
    segments=[0] * 4,
    frames=[10, 11, 12, 13],
    nbytes=[100, SIZE, SIZE, 5],
    flags=[0] * 4,
)


def check(lane: HandOver, *, base=BASE, granted=GRANTED, is_known=False):
    return check_hand_over(
        lane, chunk_bytes=SIZE, generation=1, granted=granted, base=base, is_known=is_known
    )


def test_a_good_lane():
    sources = check(GOOD)
    assert [source.place for source in sources] == GRANTED[:4]
    assert not any(source.is_reused for source in sources)
    assert check(GOOD, base=None) == sources


def test_a_reused_chunk_lies_where_the_base_has_it():
    lane = replace(GOOD, flags=[REUSED, 0, REUSED, 0], frames=[0, 11, 2, 13])
    sources = check(lane)
    assert [source.place.frame for source in sources] == [0, 11, 2, 13]
    assert [source.is_reused for source in sources] == [True, False, True, False]


WRONG = [
    ({"generation": 2}, "another generation"),
    ({"segments": [], "frames": [], "nbytes": [], "flags": []}, "no entries"),
    ({"layout_nbytes": 0}, "layout's size"),
    ({"layout_nbytes": 4 * SIZE + 1}, "layout's size"),
    ({"layout_nbytes": 1 << 62}, "layout's size"),
    ({"early_values_offset": 99}, "early values"),
    ({"early_values_offset": 1 << 63, "early_values_nbytes": 1}, "early values"),
    ({"early_values_nbytes": 3 * SIZE + 1}, "early values"),
    ({"nbytes": [100, SIZE + 1, SIZE, 5]}, "entry's size"),
    ({"nbytes": [100, 0, SIZE, 5]}, "entry's size"),
    ({"flags": [0, 2, 0, 0]}, "unknown flags"),
    ({"frames": [10, 11, 12, 99]}, "not granted"),
    ({"segments": [0, 0, 0, 1]}, "not granted"),
    ({"frames": [10, 10, 12, 13]}, "two entries"),
    ({"flags": [0, 0, 0, REUSED]}, "another layout"),
    ({"flags": [0, 0, REUSED, 0], "layout_nbytes": 101, "frames": [10, 11, 2, 13]}, "another layout"),
    ({"flags": [0, 0, REUSED, 0], "frames": [10, 11, 3, 13]}, "not in the newest"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_one_wrong_field_is_refused(change, message):
    with pytest.raises(RemoteProtocolError, match=message) as error:
        check(replace(GOOD, **change))
    assert error.value.kind == "lane"
    assert error.value.context["step"] == 7


def test_a_step_is_captured_once_and_nothing_is_reused_without_a_base():
    with pytest.raises(RemoteProtocolError, match="captured before"):
        check(GOOD, is_known=True)
    with pytest.raises(RemoteProtocolError, match="no shard of this session"):
        check(replace(GOOD, flags=[REUSED] * 4), base=None)


def test_a_reused_chunk_beyond_the_base():
    lane = replace(
        GOOD,
        segments=[0] * 5,
        frames=[10, 11, 12, 13, 14],
        nbytes=[100, SIZE, SIZE, 5, 5],
        flags=[0] * 4 + [REUSED],
    )
    with pytest.raises(RemoteProtocolError, match="another layout"):
        check(lane)


@pytest.mark.parametrize("slots", range(1, 9))
@pytest.mark.parametrize("is_restoring", [False, True])
def test_lanes_leave_room_for_what_a_restore_brings(slots: int, is_restoring: bool) -> None:
    for held in range(slots + 2):
        for taken in range(slots + 2):
            more = grantable_lanes(slots, taken=taken, held=held, is_restoring=is_restoring)
            case = f"{slots=} {held=} {taken=} {more=}"
            if held + taken >= slots:
                assert more == 0, case
                continue
            assert 0 <= more <= slots - held - taken, case
            assert more + taken >= 1, case  # nobody who trains is left without a lane
            if not is_restoring and held:
                assert more == slots - held - taken, case  # all of them
            if held == 0 and taken == 0 and slots > 1:
                assert more < slots, case
                assert slots - more >= (2 if is_restoring and slots > 2 else 1), case
            if held == 1 and taken == 0 and slots > 2 and is_restoring:
                assert slots - more - held >= 1, case
