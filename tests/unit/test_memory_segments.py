"""Segments are backed to the last page, by one thread or by several; what is no segment is refused."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from snapd.errors import CapacityError
from snapd.memory import segments
from snapd.memory.segments import back_segment


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_every_page_is_backed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(segments, "BACKING_PIECE_BYTES", 1 << 20)
    nbytes = (5 << 20) + 3 * 4096
    segment = back_segment(tmp_path / "segment", 0, nbytes)
    assert (tmp_path / "segment").stat().st_blocks * 512 >= nbytes
    with segment.mapping.view(0, nbytes) as view:
        assert bytes(view) == bytes(nbytes)
    segment.mapping.close()


def test_where_no_thread_can_be_had_every_page_is_backed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(segments, "BACKING_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    nbytes = 5 << 20
    segment = back_segment(tmp_path / "segment", 0, nbytes)
    assert refused
    with segment.mapping.view(0, nbytes) as view:
        assert bytes(view) == bytes(nbytes)
    segment.mapping.close()


@pytest.mark.parametrize("cores", [1, 64])
def test_what_cannot_be_backed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with pytest.raises(CapacityError, match="could not be backed"):
        back_segment(tmp_path / "segment", 0, 1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_begins_in_mid_page_is_refused(tmp_path: Path) -> None:
    segment = back_segment(tmp_path / "segment", 0, 1 << 20)
    with pytest.raises(ValueError, match="no whole pages"):
        segment.mapping.populate(1, 4096)
    with pytest.raises(ValueError, match="nbytes"):
        segment.mapping.populate(4096, 1 << 20)
    segment.mapping.close()
