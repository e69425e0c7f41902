"""Any k fragments give all others back, whatever is short or absent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.codec.ec import ErasureCodec
from snapd.codec.isal import make_codec
from snapd.core.cluster import DATA_FRAGMENTS_MAX, PARITY_FRAGMENTS_MAX, Code


@st.composite
def rows(draw: st.DrawFn) -> tuple[Code, int, list[bytes | None], set[int], dict[int, int]]:
    """Code, size, data (some short, some absent), numbers that are present, sizes of the views that are wanted."""
    code = Code(draw(st.integers(1, DATA_FRAGMENTS_MAX)), draw(st.integers(1, PARITY_FRAGMENTS_MAX)))
    nbytes = draw(st.one_of(st.integers(1, 200), st.sampled_from([4096, 100_001, 600_000])))
    seed = draw(st.randoms(use_true_random=False))
    lengths = draw(
        st.lists(
            st.one_of(st.none(), st.just(nbytes), st.integers(0, nbytes)), min_size=code.k, max_size=code.k
        )
    )
    data = [None if length is None else seed.randbytes(length) for length in lengths]
    count = draw(st.integers(code.k, code.size))
    present = set(draw(st.permutations(range(code.size)))[:count])
    wanted = draw(st.dictionaries(st.integers(0, code.size - 1), st.integers(0, nbytes), max_size=code.size))
    return code, nbytes, data, present, wanted


@pytest.mark.parametrize("make", [ErasureCodec, make_codec])
@given(row=rows())
def test_any_k_fragments_give_the_others(
    make: Callable[[Code], ErasureCodec],
    row: tuple[Code, int, list[bytes | None], set[int], dict[int, int]],
) -> None:
    code, nbytes, data, present, wanted = row
    codec = make(code)
    parity = [memoryview(bytearray(b"\xaa" * nbytes)) for _ in range(code.m)]
    codec.encode([None if part is None else memoryview(part) for part in data], parity)
    whole = [(part or b"").ljust(nbytes, b"\0") for part in data] + [bytes(view) for view in parity]
    stored = [*data, *parity]
    given_views = {i: None if (part := stored[i]) is None else memoryview(part) for i in present}
    out = {i: memoryview(bytearray(b"\x55" * length)) for i, length in wanted.items()}
    codec.decode(given_views, out, nbytes)
    for number, view in out.items():
        assert bytes(view) == whole[number][: len(view)], number
