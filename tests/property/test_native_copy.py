"""The copy engine against a twin in a few lines of Python: whoever copies, in whatever order, the bytes are equal."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapd_native import ZERO_FILL, CopyEngine, CopyPlan, copy_bytes

FILLER = 0xEE


@dataclass(kw_only=True)
class Buffer:
    """Bytes with an address that stays."""

    raw: ctypes.Array[ctypes.c_char]

    @staticmethod
    def of(content: bytes) -> Buffer:
        return Buffer(raw=ctypes.create_string_buffer(content, len(content) + 1))

    @property
    def address(self) -> int:
        return ctypes.addressof(self.raw)

    @property
    def content(self) -> bytes:
        return self.raw.raw[:-1]


@dataclass(kw_only=True)
class Scene:
    """Columns of a plan over sources and destinations that exist, and what must come out."""

    sources: list[Buffer]
    destinations: list[Buffer]
    columns: list[list[int]]
    expected: list[bytes]

    @property
    def plan(self) -> CopyPlan:
        return CopyPlan(*self.columns)

    @property
    def src(self) -> list[int]:
        return [buffer.address for buffer in self.sources]

    @property
    def dst(self) -> list[int]:
        return [buffer.address for buffer in self.destinations]

    @property
    def got(self) -> list[bytes]:
        return [buffer.content for buffer in self.destinations]


@st.composite
def scenes(draw: st.DrawFn, nbytes_max: int = 700_000) -> Scene:
    """Pieces of a few sources, laid one after the other (with gaps) into one or two destinations."""
    random = Random(draw(st.integers(0, 2**32)))  # the content is noise: nothing in it is worth shrinking
    sources = [random.randbytes(draw(st.integers(0, nbytes_max))) for _ in range(draw(st.integers(1, 4)))]
    images: list[bytearray] = [bytearray() for _ in range(draw(st.integers(1, 2)))]
    columns: list[list[int]] = [[] for _ in range(6)]
    for _ in range(draw(st.integers(0, 12))):
        source = draw(st.one_of(st.just(ZERO_FILL), st.integers(0, len(sources) - 1)))
        limit = nbytes_max if source == ZERO_FILL else len(sources[source])
        nbytes = draw(st.integers(0, limit))
        offset = draw(st.integers(0, limit - nbytes))
        image_index = draw(st.integers(0, len(images) - 1))
        image = images[image_index]
        image += bytes([FILLER]) * draw(st.integers(0, 70))
        piece = bytes(nbytes) if source == ZERO_FILL else sources[source][offset : offset + nbytes]
        row = [source, offset, image_index, len(image), nbytes, draw(st.sampled_from([0, 1, 2, 255]))]
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        image += piece
    for image in images:
        image += bytes([FILLER]) * draw(st.integers(0, 70))
    return Scene(
        sources=[Buffer.of(source) for source in sources],
        destinations=[Buffer.of(bytes([FILLER]) * len(image)) for image in images],
        columns=columns,
        expected=[bytes(image) for image in images],
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[CopyEngine]:
    engine = CopyEngine(2)
    yield engine
    engine.close()


@given(scene=scenes())
def test_run_copies_what_the_plan_says_and_nothing_else(scene: Scene) -> None:
    plan = scene.plan
    assert plan.piece_count == len(scene.columns[4])
    assert plan.nbytes == sum(scene.columns[4])
    plan.run(scene.src, scene.dst)
    assert scene.got == scene.expected


@given(scene=scenes(), cut=st.integers(0, 12))
def test_run_of_two_halves_is_run_of_the_whole(scene: Scene, cut: int) -> None:
    plan = scene.plan
    cut = min(cut, plan.piece_count)
    plan.run(scene.src, scene.dst, cut)
    plan.run(scene.src, scene.dst, 0, cut)
    assert scene.got == scene.expected


@given(scene=scenes(), helps=st.booleans(), order=st.permutations([0, 1, 2, 255]))
def test_submitted_copies_arrive_whole(
    engine: CopyEngine, scene: Scene, helps: bool, order: list[int]
) -> None:
    ticket = engine.submit(scene.plan, array("Q", scene.src), array("Q", scene.dst))
    for group in order:
        assert ticket.fence(group) if helps else ticket.wait(group, help=False)
        assert ticket.is_done(group)
    assert ticket.wait()
    assert ticket.is_done()
    assert scene.got == scene.expected
    assert ticket.progress() == (sum(scene.columns[4]), sum(scene.columns[4]))
    assert 0 <= ticket.seized_bytes <= ticket.helped_bytes <= sum(scene.columns[4])


@given(scene=scenes(nbytes_max=50_000), data=st.data())
def test_differing_is_what_python_finds(scene: Scene, data: st.DataObject) -> None:
    plan = scene.plan
    plan.run(scene.src, scene.dst)
    assert plan.differing(scene.src, scene.dst) == []
    whole = [index for index, source in enumerate(scene.sources) if len(source.content) > 0]
    if not whole:
        return
    victim = data.draw(st.sampled_from(whole))
    at = data.draw(st.integers(0, len(scene.sources[victim].content) - 1))
    scene.sources[victim].raw[at] = bytes([scene.sources[victim].content[at] ^ 1])
    rows = zip(*scene.columns, strict=True)
    expected = {
        src for src, offset, _, _, nbytes, _ in rows if src == victim and offset <= at < offset + nbytes
    }
    assert plan.differing(scene.src, scene.dst) == sorted(expected)


@given(
    scene=scenes(nbytes_max=200_000),
    turn=st.integers(0, 2**64 - 1),
    sample_bytes=st.integers(0, 9_000),
    share_max=st.floats(0, 1),
)
def test_samples_keep_to_their_limits(scene: Scene, turn: int, sample_bytes: int, share_max: float) -> None:
    plan = scene.plan
    plan.run(scene.src, scene.dst)
    sample = plan.sample(scene.src, turn, sample_bytes, share_max)
    sources = {source for source in scene.columns[0] if source != ZERO_FILL}
    assert sample.nbytes <= int(plan.nbytes * share_max)
    assert sample.nbytes <= sample_bytes * len(sources)
    assert sample.differing(scene.dst) == []


@given(scene=scenes(nbytes_max=20_000), turn=st.integers(0, 1_000), data=st.data())
def test_a_full_sample_finds_any_write(scene: Scene, turn: int, data: st.DataObject) -> None:
    rows = [row for row in zip(*scene.columns, strict=True) if row[0] != ZERO_FILL and row[4] > 0]
    if not rows:
        return
    plan = scene.plan
    per_source: dict[int, int] = {}
    for row in rows:
        per_source[row[0]] = per_source.get(row[0], 0) + row[4]
    sample = plan.sample(scene.src, turn, max(per_source.values()), 1.0)
    assert sample.nbytes == sum(per_source.values())
    plan.run(scene.src, scene.dst)
    source, _, image, at, nbytes, _ = data.draw(st.sampled_from(rows))
    position = at + data.draw(st.integers(0, nbytes - 1))
    raw = scene.destinations[image].raw
    raw[position] = bytes([scene.destinations[image].content[position] ^ 0x80])
    assert sample.differing(scene.dst) == [source]


@given(
    content=st.binary(max_size=3_000),
    lead=st.integers(0, 130),
    trail=st.integers(0, 130),
)
def test_copy_bytes_touches_only_its_range(content: bytes, lead: int, trail: int) -> None:
    source = Buffer.of(content)
    target = Buffer.of(bytes([FILLER]) * (lead + len(content) + trail))
    copy_bytes(target.address + lead, source.address, len(content))
    assert target.content == bytes([FILLER]) * lead + content + bytes([FILLER]) * trail
