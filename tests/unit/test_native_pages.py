"""Mappings and control pages as Python sees them; the layout of the page is checked against a reader in Python."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from snapd_native import (
    ENTRY_REUSED,
    LANE_COMPLETE,
    LANE_FREE,
    LANE_GRANTED,
    LANE_OPEN,
    ControlPage,
    Mapping,
)

HEADER_BYTES = 192
LANE_HEADER_BYTES = 128
ENTRY = struct.Struct("<IIII")
FRAME = struct.Struct("<II")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("snapd-test")
    yield fd
    os.close(fd)


def make_page(
    fd: int, *, lane_count: int = 2, entry_capacity: int = 3, chunk_bytes: int = 4096
) -> ControlPage:
    return ControlPage.create(
        fd,
        lane_count=lane_count,
        entry_capacity=entry_capacity,
        rank=5,
        session_id=2**64 - 1,
        chunk_bytes=chunk_bytes,
        generation=11,
    )


def lane_bytes(entry_capacity: int) -> int:
    tables = entry_capacity * (ENTRY.size + FRAME.size)
    return LANE_HEADER_BYTES + -(-tables // 64) * 64


def test_the_layout_is_what_the_header_says(fd: int) -> None:
    page = make_page(fd)
    page.store("interval_steps", 17)
    page.store("step_seen_plus_one", 18)
    page.write_grant(1, [0, 6], [7, 8])
    page.write_entries(1, [1, 2, 3], [4, 5, 6], [4096, 4096, 99], [0, ENTRY_REUSED, 0])
    page.lane_store(1, "step", 1234)
    page.lane_store(1, "copied_bytes", 2**63)
    raw = os.pread(fd, 1 << 16, 0)
    assert len(raw) == ControlPage.nbytes_for(2, 3) == HEADER_BYTES + 2 * lane_bytes(3)
    assert struct.unpack_from("<8sIIIIQQQ", raw) == (b"SNAPDCTL", 1, 2, 3, 5, 2**64 - 1, 4096, len(raw))
    assert struct.unpack_from("<8Q", raw, 64) == (11, 0, 0, 0, 0, 17, 0, 0)
    assert struct.unpack_from("<4Q", raw, 128) == (0, 0, 0, 18)
    at = HEADER_BYTES + lane_bytes(3)
    assert struct.unpack_from("<4I9Q", raw, at) == (LANE_FREE, 2, 3, 0, 0, 0, 1234, 0, 0, 0, 0, 0, 2**63)
    entries = at + LANE_HEADER_BYTES
    assert [ENTRY.unpack_from(raw, entries + ENTRY.size * i) for i in range(3)] == [
        (1, 4, 4096, 0),
        (2, 5, 4096, ENTRY_REUSED),
        (3, 6, 99, 0),
    ]
    frames = entries + ENTRY.size * 3
    assert [FRAME.unpack_from(raw, frames + FRAME.size * i) for i in range(2)] == [(0, 7), (6, 8)]


def test_a_lane_goes_round_between_two_mappings(fd: int) -> None:
    daemon = make_page(fd)
    trainer = ControlPage.attach(fd)
    assert (trainer.lane_count, trainer.entry_capacity, trainer.rank) == (2, 3, 5)
    assert (trainer.session_id, trainer.chunk_bytes, trainer.load("generation")) == (2**64 - 1, 4096, 11)
    daemon.write_grant(0, [0], [42])
    assert daemon.set_lane_state(0, LANE_FREE, LANE_GRANTED)
    assert trainer.lane_state(0) == LANE_GRANTED
    assert trainer.read_grant(0) == ([0], [42])
    trainer.write_entries(0, [0], [42], [100], [0])
    assert trainer.set_lane_state(0, LANE_GRANTED, LANE_OPEN)
    assert not trainer.set_lane_state(0, LANE_GRANTED, LANE_OPEN)
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    assert trainer.commit(0, wake)
    assert not trainer.commit(0, wake)
    assert os.eventfd_read(wake) == 1
    os.close(wake)
    assert daemon.lane_state(0) == LANE_COMPLETE
    assert daemon.read_entries(0) == ([0], [42], [100], [0])
    assert trainer.add("skipped_count", 2) == 2
    assert daemon.add("skipped_count", 3) == 5


def test_committing_without_a_wake_up(fd: int) -> None:
    page = make_page(fd)
    assert page.set_lane_state(0, LANE_FREE, LANE_OPEN)
    assert page.commit(0, -1)
    assert page.set_lane_state(1, LANE_FREE, LANE_OPEN)
    assert page.commit(1, 9999)  # a descriptor that does not exist: the snapshot does
    assert page.lane_state(1) == LANE_COMPLETE


def test_what_is_out_of_bounds_is_refused_by_name(fd: int) -> None:
    page = make_page(fd)
    for call, text in (
        (lambda: page.lane_state(2), "lane is 2"),
        (lambda: page.lane_state(-1), "lane is -1"),
        (lambda: page.load("magic"), "no header word is called 'magic'"),
        (lambda: page.store("generation", -1), "value is -1"),
        (lambda: page.store("generation", 2**64), "value is"),
        (lambda: page.lane_load(0, "nonsense"), "no lane field"),
        (lambda: page.lane_store(0, "state", 1), "no lane field"),
        (lambda: page.lane_store(0, "discard_reason", 2**32), "discard_reason is"),
        (lambda: page.set_lane_state(0, 0, 5), "new is 5"),
        (lambda: page.write_grant(0, [0] * 4, [0] * 4), "capacity is 3"),
        (lambda: page.write_grant(0, [0], []), "frames has 0"),
        (lambda: page.write_entries(0, [0] * 4, [0] * 4, [0] * 4, [0] * 4), "capacity is 3"),
        (lambda: page.write_entries(0, [0], [2**32], [0], [0]), r"frames\[0\]"),
        (lambda: ControlPage.nbytes_for(9, 1), "lane_count"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_counts_that_the_other_side_wrote_are_not_believed(fd: int) -> None:
    page = make_page(fd)
    page.lane_store(0, "entry_count", 4)
    page.lane_store(0, "grant_count", 2**32 - 1)
    with pytest.raises(ValueError, match="entry_count holds 4"):
        page.read_entries(0)
    with pytest.raises(ValueError, match="grant_count holds"):
        page.read_grant(0)


@pytest.mark.parametrize(
    ("offset", "content", "text"),
    [
        (0, b"X", "magic"),
        (8, struct.pack("<I", 2), "version is 2"),
        (12, struct.pack("<I", 9), "counts"),
        (16, struct.pack("<I", 0), "counts"),
        (16, struct.pack("<I", 2**32 - 1), "counts"),
        (16, struct.pack("<I", 100), "size"),
        (32, struct.pack("<Q", 0), "chunk_bytes"),
        (40, struct.pack("<Q", 1), "size"),
    ],
)
def test_broken_pages_are_refused(fd: int, offset: int, content: bytes, text: str) -> None:
    make_page(fd).close()
    os.pwrite(fd, content, offset)
    with pytest.raises(ValueError, match=text):
        ControlPage.attach(fd)


def test_a_page_of_the_wrong_size_is_refused(fd: int) -> None:
    for nbytes in (0, 100, ControlPage.nbytes_for(2, 3) - 1, ControlPage.nbytes_for(2, 3) + 64):
        make_page(fd).close()
        os.ftruncate(fd, nbytes)
        with pytest.raises(ValueError, match="size"):
            ControlPage.attach(fd)


def test_a_closed_page_refuses(fd: int) -> None:
    page = make_page(fd)
    page.close()
    page.close()
    with pytest.raises(ValueError, match="closed"):
        page.load("generation")


def test_bad_descriptors_are_os_errors() -> None:
    for call in (lambda: ControlPage.attach(9999), lambda: Mapping(9999, 1, False)):
        with pytest.raises(OSError, match="fstat"):
            call()
    with pytest.raises(ValueError, match="fd is -1"):
        ControlPage.attach(-1)


def test_a_mapping_is_a_buffer(fd: int) -> None:
    os.ftruncate(fd, 8192)
    mapping = Mapping(fd, 8192, True)
    mapping.populate()
    with mapping.view(4090, 10) as view:
        assert (view.nbytes, view.readonly) == (10, False)
        view[:] = b"0123456789"
        with pytest.raises(ValueError, match="1 views"):
            mapping.close()
    assert os.pread(fd, 10, 4090) == b"0123456789"
    assert bytes(memoryview(mapping)[4090:4100]) == b"0123456789"
    with pytest.raises(ValueError, match="offset"):
        mapping.view(8193, 0)
    with pytest.raises(ValueError, match="nbytes"):
        mapping.view(8000, 193)
    assert mapping.address > 0
    mapping.close()
    mapping.close()
    for call in (lambda: mapping.address, lambda: mapping.view(0, 1), mapping.populate):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(BufferError):
        memoryview(mapping)


def test_a_view_keeps_its_mapping_alive(fd: int) -> None:
    os.ftruncate(fd, 4096)
    os.pwrite(fd, b"kept", 0)
    view = Mapping(fd, 4096, False).view(0, 4)
    assert view.readonly
    assert bytes(view) == b"kept"


def test_a_mapping_never_reaches_beyond_the_file(fd: int) -> None:
    os.ftruncate(fd, 100)
    with pytest.raises(ValueError, match="nbytes is 101, but the file has 100"):
        Mapping(fd, 101, True)
    with pytest.raises(ValueError, match="nbytes is 0"):
        Mapping(fd, 0, True)


def test_a_forked_child_has_neither_mapping_nor_page(fd: int) -> None:
    page = make_page(fd)
    mapping = Mapping(fd, 100, True)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (lambda: page.load("generation"), lambda: mapping.address, lambda: mapping.view(0, 1)):
            try:
                call()
            except ValueError:
                refused += 1
        page.close()
        mapping.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert page.load("generation") == 11
