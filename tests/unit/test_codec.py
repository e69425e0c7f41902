"""The code's bytes: fixed for ever, equal to a slow twin, in any sizes."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable

import pytest
from pyeclib.ec_iface import ECDriver

from snapd.codec import ec, isal
from snapd.codec.ec import EC_TYPE, HEADER_BYTES, ErasureCodec
from snapd.codec.isal import IsalCodec, make_codec
from snapd.core.cluster import DATA_FRAGMENTS_MAX, PARITY_FRAGMENTS_MAX, Code
from snapd.errors import LocalProtocolError, NotRestorable

# SHA-256 of all parity fragments of `sample`, one after the other. What is stored under a row's id has these bytes: a
# library that gives others must not be used, so never adjust a value here.
GOLDEN = {
    "1+1": "96931b79452f8b7dcf79bb69314e5bcdb9d904bc9d137e1f89ce6ae8245129ad",
    "2+1": "d77ab718ebf0e4306993a8a486a7e00e11217cd6e4df74cc8a7e1293de30ec7d",
    "2+2": "8b16390721c9268bc2de66af1cc12bea020d80ece52ce5749942ac88be116093",
    "3+2": "14eb51d616a425c5252abc1578883442035c04cf82b4368a005aae3b9d44cdad",
    "4+2": "22de3d3dc49181263d7e8610038853768c4fca707f1f01aea08f3f9ef8d2a9bc",
    "6+2": "7c1c286b44c63a9e9abb5769475e48ccbee0074462a1915b9f644a9891f1962c",
    "8+3": "7cf87a05ca996bf621ed29fb4ef3a5e97353ba87253a6e722b3446ef88206840",
    "24+8": "c449519f092beddb33ae3bdc399f803dbba563c76ead59389111752b5c429f07",
}


Make = Callable[[Code], ErasureCodec]


@pytest.fixture(params=["pyeclib", "isa-l"])
def make(request: pytest.FixtureRequest) -> Make:
    """Either implementation; the second is the one that runs, where ISA-L is."""
    return ErasureCodec if request.param == "pyeclib" else make_codec


def sample(number: int, nbytes: int) -> bytes:
    """Reproducible bytes of a data fragment."""
    return hashlib.shake_128(b"fragment %d" % number).digest(nbytes)


def views(count: int, nbytes: int) -> list[memoryview]:
    return [memoryview(bytearray(nbytes)) for _ in range(count)]


def encoded(make: Make, code: str, data: list[bytes], nbytes: int) -> list[bytes]:
    codec = make(Code.parse(code))
    parity = views(codec.m, nbytes)
    codec.encode([memoryview(part) for part in data], parity)
    return [bytes(view) for view in parity]


def multiply(a: int, b: int) -> int:
    """In GF(256) with the polynomial 0x11d, bit by bit."""
    result = 0
    while b:
        result ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return result


@functools.cache
def inverse(a: int) -> int:
    return next(b for b in range(1, 256) if multiply(a, b) == 1)


def twin(data: list[bytes], m: int) -> list[bytes]:
    """Parity by the definition: row i of the matrix is 1 / (k + i xor j)."""
    k, result = len(data), []
    for i in range(k, k + m):
        row = bytearray(len(data[0]))
        for j, fragment in enumerate(data):
            factor = inverse(i ^ j)
            row = bytearray(a ^ multiply(factor, b) for a, b in zip(row, fragment, strict=True))
        result.append(bytes(row))
    return result


@pytest.mark.parametrize("code", sorted(GOLDEN))
def test_parity_is_what_it_always_was(make: Make, code: str) -> None:
    parity = encoded(make, code, [sample(i, 1000) for i in range(Code.parse(code).k)], 1000)
    assert hashlib.sha256(b"".join(parity)).hexdigest() == GOLDEN[code]


@pytest.mark.parametrize("code", ["1+1", "1+3", "2+1", "6+2", "24+8"])
def test_parity_is_what_the_definition_says(make: Make, code: str) -> None:
    asked = Code.parse(code)
    data = [sample(i, 97) for i in range(asked.k)]
    assert encoded(make, code, data, 97) == twin(data, asked.m)


def test_the_copy_of_1_and_1_is_what_the_library_gives(make: Make) -> None:
    data = sample(0, 12_345)
    library = ECDriver(k=1, m=1, ec_type=EC_TYPE).encode(data)[1][HEADER_BYTES:]
    assert encoded(make, "1+1", [data], 12_345) == [data] == [library]


def test_every_code_within_the_bounds_recovers_the_loss_of_m(make: Make) -> None:
    for k in range(1, DATA_FRAGMENTS_MAX + 1):
        for m in range(1, PARITY_FRAGMENTS_MAX + 1):
            codec = make(Code(k, m))
            data, parity = [sample(i, 65) for i in range(k)], views(m, 65)
            codec.encode([memoryview(part) for part in data], parity)
            fragments = dict(enumerate([*map(memoryview, data), *parity]))
            lost = list(range(k + m))[:: 2 if k >= m else 1][:m]
            out = dict(zip(lost, views(m, 65), strict=True))
            codec.decode({i: v for i, v in fragments.items() if i not in lost}, out, 65)
            assert all(out[i] == fragments[i] for i in lost), (k, m)


@pytest.mark.parametrize("nbytes", [1, 63, 64, 4096, 4097])
def test_the_size_of_pieces_does_not_matter(make: Make, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [sample(i, nbytes) for i in range(3)]
    whole = encoded(make, "3+2", data, nbytes)
    monkeypatch.setattr(ec, "ENCODE_PIECE_BYTES", 3 * 64)
    monkeypatch.setattr(ec, "DECODE_PIECE_BYTES", 3 * 64)
    assert encoded(make, "3+2", data, nbytes) == whole


def test_several_threads_share_a_codec(make: Make) -> None:
    codec = make(Code(4, 2))
    data = [sample(i, 600_000) for i in range(4)]
    expected = encoded(make, "4+2", data, 600_000)
    found: list[bool] = []

    def work() -> None:
        for _ in range(3):
            parity = views(2, 600_000)
            codec.encode([memoryview(part) for part in data], parity)
            out = {0: memoryview(bytearray(600_000)), 3: memoryview(bytearray(600_000))}
            present = {1: data[1], 2: data[2], 4: parity[0], 5: parity[1]}
            codec.decode({i: memoryview(part) for i, part in present.items()}, out, 600_000)
            found.append([*map(bytes, parity)] == expected and out[0] == data[0] and out[3] == data[3])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


def test_headers_are_kept_for_a_bounded_number_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec, "_HEADER_SETS_MAX", 3)
    codec = ErasureCodec(Code(2, 1))
    for nbytes in range(1, 9):
        data, parity = [memoryview(sample(i, nbytes)) for i in range(2)], views(1, nbytes)
        codec.encode(data, parity)
        out = views(1, nbytes)[0]
        codec.decode({1: data[1], 2: parity[0]}, {0: out}, nbytes)
        assert out == data[0]
    assert len(codec._headers) == 3


def test_too_few_fragments_are_said(make: Make) -> None:
    codec = make(Code(3, 2))
    with pytest.raises(NotRestorable, match=r"2 fragments of a row are there and 3 are needed \[fragments\]"):
        codec.decode({0: None, 4: memoryview(bytes(8))}, {1: memoryview(bytearray(8))}, 8)


def test_wrong_calls_are_refused(make: Make) -> None:
    codec = make(Code(2, 1))
    eight, nine, room = memoryview(bytes(8)), memoryview(bytes(9)), memoryview(bytearray(8))
    wide = memoryview(bytearray(32)).cast("I")
    calls = [
        lambda: make(Code(25, 1)),
        lambda: make(Code(2, 9)),
        lambda: codec.encode([eight], [room]),
        lambda: codec.encode([eight, eight], [room, room]),
        lambda: codec.encode([eight, nine], [room]),
        lambda: codec.encode([eight, wide], [room]),
        lambda: codec.decode({0: eight, 3: eight}, {1: room}, 8),
        lambda: codec.decode({0: eight, 2: None}, {1: room}, 8),
        lambda: codec.decode({0: nine, 2: eight}, {1: room}, 8),
        lambda: codec.decode({0: eight, 2: eight}, {1: memoryview(bytearray(9))}, 8),
    ]
    for call in calls:
        with pytest.raises(LocalProtocolError):
            call()


def test_isa_l_is_called_directly_where_pyeclib_has_it() -> None:
    assert type(make_codec(Code(4, 2))) is IsalCodec


def test_without_isa_l_or_with_another_code_of_its_own_pyeclib_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isal, "_library", lambda: None)
    assert type(make_codec.__wrapped__(Code(4, 2))) is ErasureCodec
    monkeypatch.undo()
    code = Code(4, 2)

    class Other(IsalCodec):
        """Its parity fragments are swapped."""

        def _encode(self, data, parity, nbytes) -> None:  # type: ignore[no-untyped-def]
            super()._encode(data, parity[::-1], nbytes)

    monkeypatch.setattr(isal, "IsalCodec", Other)
    assert type(make_codec.__wrapped__(code)) is ErasureCodec


def test_what_is_open_for_reading_only_is_coded_too() -> None:
    data, parity = [memoryview(sample(i, 5000)) for i in range(4)], views(2, 5000)
    make_codec(Code(4, 2)).encode(data, parity)
    assert [bytes(view) for view in parity] == encoded(ErasureCodec, "4+2", [bytes(d) for d in data], 5000)
