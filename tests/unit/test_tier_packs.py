"""Packs can be read back by their own index; what is damaged is named; chunks come back from every encoding."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
import xxhash
import zstandard

from snapd.codec.compress import ChunkDecoder, ChunkEncoder, Mode, check_digest, decode_chunk
from snapd.codec.paying import Paying
from snapd.core.stored import Encoding, StoredChunk
from snapd.errors import IntegrityError
from snapd.tier.packs import (
    PACK_BYTES_AIM,
    PACK_HEAD_BYTES,
    TAIL_BYTES,
    PackBuilder,
    check_header,
    footer_nbytes,
    parse_footer,
)
from snapd.tier.widths import element_widths
from snapd.units import GIB, MIB
from tests.support.shard_builder import ShardBuilder

NAME = "ab" * 16 + "-000003"
KEY = f"jobs/job/packs/{NAME}.pack"
# Floats of one magnitude: exponents alike, mantissas random.
_RNG = random.Random(1)
FLOATS = memoryview(struct.pack("<8000f", *(_RNG.uniform(1.0, 2.0) for _ in range(8000))))
NOISE = memoryview(random.Random(2).randbytes(32_000))
TEXT = memoryview(b"the same words again and again " * 1000)


def stored(raw: memoryview, encoder: ChunkEncoder, width: int, offset: int = 64) -> tuple[StoredChunk, bytes]:
    way = encoder.encode(raw, width)
    chunk = StoredChunk(
        len(raw), xxhash.xxh3_128_digest(raw), NAME, offset, way.nbytes, way.encoding, way.element_nbytes
    )
    return chunk, bytes(way.buffer)


def built_pack() -> tuple[bytes, list[StoredChunk]]:
    builder, encoder = PackBuilder(NAME), ChunkEncoder("auto")
    pieces, chunks = [builder.header()], []
    for raw, width in ((FLOATS, 4), (NOISE, 4), (TEXT, 1)):
        chunk, data = stored(raw, encoder, width)
        chunks.append(
            builder.add(
                nbytes=chunk.nbytes,
                digest=chunk.digest,
                stored_nbytes=len(data),
                encoding=chunk.encoding,
                element_nbytes=chunk.element_nbytes,
            )
        )
        pieces.append(data)
        assert sum(map(len, pieces)) == builder.nbytes
    return b"".join([*pieces, builder.footer()]), chunks


def read_index(pack: bytes) -> tuple[StoredChunk, ...]:
    check_header(pack[:PACK_HEAD_BYTES], key=KEY, name=NAME)
    nbytes = footer_nbytes(pack[-TAIL_BYTES:], key=KEY, pack_nbytes=len(pack))
    return parse_footer(pack[-nbytes:], key=KEY, name=NAME, pack_nbytes=len(pack))


def refused(call: Callable[[], object]) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        call()
    return caught.value


def test_a_pack_is_read_back_without_a_manifest() -> None:
    pack, chunks = built_pack()
    assert [chunk.encoding for chunk in chunks] == [Encoding.SHUFFLED_ZSTD, Encoding.RAW, Encoding.ZSTD]
    assert list(read_index(pack)) == chunks
    for chunk, raw in zip(chunks, (FLOATS, NOISE, TEXT), strict=True):
        out = memoryview(bytearray(chunk.nbytes))
        decode_chunk(pack[chunk.offset : chunk.offset + chunk.stored_nbytes], chunk, out)
        assert out == raw


def test_an_empty_pack_is_one_too() -> None:
    builder = PackBuilder(NAME)
    assert read_index(builder.header() + builder.footer()) == ()


def test_every_flipped_bit_of_a_pack_is_found_and_named() -> None:
    pack, chunks = built_pack()
    decoder = ChunkDecoder()
    rng = random.Random(3)
    footer_at = chunks[-1].offset + chunks[-1].stored_nbytes
    places = [*range(PACK_HEAD_BYTES), *range(footer_at, len(pack))]
    places += [chunk.offset + rng.randrange(chunk.stored_nbytes) for chunk in chunks for _ in range(40)]
    for place in places:
        bad = bytearray(pack)
        bad[place] ^= 1 << rng.randrange(8)
        owner = next((c for c in chunks if c.offset <= place < c.offset + c.stored_nbytes), None)
        if owner is None:
            error = refused(lambda bad=bad: read_index(bytes(bad)))
            assert error.kind == "tier_pack" and KEY in str(error), place
        else:
            out = memoryview(bytearray(owner.nbytes))
            data = bytes(bad[owner.offset : owner.offset + owner.stored_nbytes])
            error = refused(lambda data=data, owner=owner, out=out: decoder.decode(data, owner, out))
            assert error.kind == "tier_chunk" and NAME in str(error) and str(owner.offset) in str(error)


def test_a_pack_that_is_cut_off_or_another_is_refused() -> None:
    pack, _ = built_pack()
    for nbytes in (0, 1, PACK_HEAD_BYTES, PACK_HEAD_BYTES + TAIL_BYTES, len(pack) - 1):
        assert refused(lambda nbytes=nbytes: read_index(pack[:nbytes])).kind == "tier_pack"
    assert "its chunks end at byte" in str(refused(lambda: read_index(pack[:64] + b"x" + pack[64:])))
    other = "cd" * 16 + "-000003"
    assert "is pack" in str(refused(lambda: check_header(pack[:64], key=KEY, name=other)))
    nbytes = footer_nbytes(pack[-TAIL_BYTES:], key=KEY, pack_nbytes=len(pack))
    assert "is that of pack" in str(
        refused(lambda: parse_footer(pack[-nbytes:], key=KEY, name=other, pack_nbytes=len(pack)))
    )


def test_a_pack_from_the_future_is_named_as_such() -> None:
    pack, _ = built_pack()
    head = bytearray(pack[:56])
    struct.pack_into("<I", head, 12, 9)
    data = bytes(head) + xxhash.xxh3_64_digest(bytes(head))
    assert refused(lambda: check_header(data, key=KEY, name=NAME)).kind == "tier_version"
    nbytes = footer_nbytes(pack[-TAIL_BYTES:], key=KEY, pack_nbytes=len(pack))
    footer = bytearray(pack[-nbytes:])
    struct.pack_into("<I", footer, nbytes - TAIL_BYTES + 8, 9)
    footer[-24:-8] = xxhash.xxh3_128_digest(bytes(footer[:-24]))
    error = refused(lambda: parse_footer(bytes(footer), key=KEY, name=NAME, pack_nbytes=len(pack)))
    assert error.kind == "tier_version"


def test_a_full_pack_takes_no_more() -> None:
    builder = PackBuilder(NAME)
    assert builder.has_room(PACK_BYTES_AIM * 2)  # alone
    builder.add(nbytes=MIB, digest=b"a" * 16, stored_nbytes=MIB, encoding=Encoding.RAW)
    assert builder.has_room(PACK_BYTES_AIM - MIB) and not builder.has_room(PACK_BYTES_AIM - MIB + 1)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("raw", [FLOATS, NOISE, TEXT, memoryview(b"x"), memoryview(bytes(70_001))])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_chunks_come_back_from_every_way_of_storing(mode: Mode, raw: memoryview, width: int) -> None:
    chunk, data = stored(raw, ChunkEncoder(mode), width)
    assert len(data) <= len(raw)
    out = memoryview(bytearray(len(raw)))
    decode_chunk(data, chunk, out)
    assert out == raw


def test_what_does_not_shrink_is_neither_compressed_nor_copied() -> None:
    encoder = ChunkEncoder("auto")
    assert encoder.encode(NOISE, 4).buffer is NOISE
    assert encoder.encode(FLOATS, 4, is_allowed=False).buffer is FLOATS
    assert ChunkEncoder("off").encode(TEXT, 1).buffer is TEXT
    mostly_noise = memoryview(
        bytes(NOISE[:31_000]) + bytes(1000)
    )  # 3 %: too little for `auto`, enough for `always`
    assert encoder.encode(mostly_noise, 1).encoding is Encoding.RAW
    assert ChunkEncoder("always").encode(mostly_noise, 1).encoding is Encoding.ZSTD


def test_planes_are_taken_only_where_they_help() -> None:
    assert ChunkEncoder("auto").encode(TEXT, 4).encoding is Encoding.ZSTD
    assert ChunkEncoder("auto").encode(FLOATS, 1).nbytes > ChunkEncoder("auto").encode(FLOATS, 4).nbytes


def test_a_frame_of_another_size_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(50 * MIB))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    for frame, nbytes, what in (
        (bomb, 8000, "its zstd frame is of 52428800 bytes, the chunk of 8000"),
        (streamed, 1000, "its zstd frame is of"),
        (b"no frame at all", 8000, "its zstd frame"),
        (zstandard.ZstdCompressor().compress(bytes(8000))[:-3], 8000, "its zstd frame"),
        (zstandard.ZstdCompressor().compress(bytes(8000)), 8000, "does not have the recorded XXH3-128"),
    ):
        data = frame + xxhash.xxh3_64_digest(frame)
        chunk = StoredChunk(nbytes, b"d" * 16, NAME, 64, len(data), Encoding.ZSTD)
        out = memoryview(bytearray(nbytes))
        error = refused(lambda data=data, chunk=chunk, out=out: decode_chunk(data, chunk, out))
        assert error.kind == "tier_chunk" and what in str(error)
    chunk = StoredChunk(5, b"d" * 16, NAME, 64, 5, Encoding.RAW)
    assert "4 bytes came" in str(refused(lambda: decode_chunk(b"1234", chunk, memoryview(bytearray(5)))))


def test_a_raw_chunk_that_was_read_to_its_place_is_only_checked() -> None:
    place = memoryview(bytearray(NOISE))
    chunk, _ = stored(NOISE, ChunkEncoder("off"), 1)
    ChunkDecoder().decode(place, chunk, place)
    check_digest(place, chunk)
    place[7] ^= 1
    assert refused(lambda: check_digest(place, chunk)).kind == "tier_chunk"


def test_widths_follow_the_layout() -> None:
    builder = ShardBuilder(chunk_bytes=4096)
    builder.plain("floats", "float32", [2000], bytes(8000))
    builder.plain("halves", "bfloat16", [2500], bytes(5000), "halves")
    builder.plain("codes", "uint8", [5000], bytes(5000), "codes")
    builder.plain("complex", "complex64", [500], bytes(4000), "complex")
    builder.plain("both-small", "float64", [100], bytes(800), "both")
    builder.plain("both-large", "bfloat16", [1000], bytes(2000), "both")
    holed = builder.region(bytes(4000), "holed")
    builder.tensor("holed", "float32", [10, 10], holed, nbytes=(9 * 100 + 9 * 2 + 1) * 4, strides=[100, 2])
    builder.remote_region(1, 4096)
    built = builder.build()
    widths = element_widths(built.layout, len(built.record.chunks))
    # layout, early values, then the ranges in the order of their names' first use
    assert widths == (1, 1, 4, 4, 2, 2, 1, 1, 4, 2, 4)
    assert element_widths(built.layout, 3) == (1, 1, 4)
    built.layout.chunk_bytes = 0
    assert element_widths(built.layout, 2) == (1, 1)


def test_compressing_pays_while_packs_get_away_as_fast() -> None:
    paying = Paying()
    assert paying.decide() == (False, "how fast the store is, is not known yet")
    paying.note(64 * MIB, 64 * MIB / 400e6, is_compressed=False)
    assert paying.decide() == (True, "how fast compressing is, is not known yet")
    paying.note(64 * MIB, 64 * MIB / 480e6, is_compressed=True)
    assert paying.decide() == (True, "a packer gets 480 MB/s away compressed, 400 MB/s raw")
    paying.note(GIB, GIB / 390e6, is_compressed=True)  # what is saved in bytes is worth a little time
    assert paying.decide()[0]
    paying.note(GIB, GIB / 200e6, is_compressed=True)
    assert not paying.decide()[0]


def test_the_other_way_is_tried_again_after_a_while() -> None:
    paying = Paying()
    paying.note(64 * MIB, 64 * MIB / 2000e6, is_compressed=False)
    paying.note(64 * MIB, 64 * MIB / 600e6, is_compressed=True)
    for _ in range(64):
        assert not paying.decide()[0]
        paying.note(64 * MIB, 64 * MIB / 2000e6, is_compressed=False)
    paying.note(64 * MIB, 64 * MIB / 2000e6, is_compressed=False)
    assert paying.decide() == (True, "how fast compressing is, is not known yet")
    paying.note(64 * MIB, 64 * MIB / 2500e6, is_compressed=True)  # the store has become slow for raw bytes
    assert paying.decide()[0]


def test_a_few_bytes_are_not_believed() -> None:
    paying = Paying()
    paying.note(MIB, 5.0, is_compressed=False)
    assert paying.decide() == (False, "how fast the store is, is not known yet")
