"""How fast rows are coded and decoded, one thread, and what the size of pyeclib's pieces does to it.

    python scripts/codec_rates.py [--rounds 7] [--pieces]

GB/s count the k data fragments of 4 MiB. Decoding: one data fragment lost, and as many as there may be. Codes take
turns within a round, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Callable

from snapd.codec import ec
from snapd.codec.isal import make_codec
from snapd.core.cluster import Code

FRAGMENT_BYTES = 4 << 20
CODES = ("1+1", "2+1", "2+2", "3+2", "4+2", "6+2", "12+4")
PIECES = (128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20)


def fragment() -> memoryview:
    """Random bytes, in pages of their own."""
    view = memoryview(mmap.mmap(-1, FRAGMENT_BYTES))
    view[:] = os.urandom(FRAGMENT_BYTES)
    return view


class Row:
    """A coded row, and what to call for each thing that is measured."""

    def __init__(self, code: Code, codec: ec.ErasureCodec) -> None:
        self.code, self._codec = code, codec
        self._data = [fragment() for _ in range(code.k)]
        self._parity = [fragment() for _ in range(code.m)]
        self._room = [fragment() for _ in range(code.m)]
        self.encode()
        self._all = dict(enumerate([*self._data, *self._parity]))

    def encode(self) -> None:
        self._codec.encode(self._data, self._parity)

    def decode(self, count: int) -> None:
        """Lose the first `count` data fragments."""
        present = {number: view for number, view in self._all.items() if number >= count}
        self._codec.decode(present, dict(enumerate(self._room[:count])), FRAGMENT_BYTES)

    def rate(self, call: Callable[[], None]) -> float:
        began_s = time.perf_counter()
        call()
        return self.code.k * FRAGMENT_BYTES / 1e9 / (time.perf_counter() - began_s)

    def rates(self) -> tuple[float, float, float]:
        most = min(self.code.k, self.code.m)
        return (
            self.rate(self.encode),
            self.rate(lambda: self.decode(1)),
            self.rate(lambda: self.decode(most)),
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}..{max(values):.1f}]"


def print_codes(rounds: int) -> None:
    """As it runs, and through pyeclib."""
    makers = {"ISA-L": make_codec, "pyeclib": ec.ErasureCodec}
    rows = [
        (how, Row(Code.parse(text), make(Code.parse(text)))) for text in CODES for how, make in makers.items()
    ]
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {
        (str(r.code), how): [] for how, r in rows
    }
    for _ in range(rounds):
        for how, row in rows:
            found[str(row.code), how].append(row.rates())
    print("| code | | encode, GB/s | decode 1 | decode m |\n| --- | --- | --- | --- | --- |")
    for (text, how), results in found.items():
        print(f"| {text} | {how} | {' | '.join(spread([r[i] for r in results]) for i in range(3))} |")


def print_pieces(rounds: int) -> None:
    print("| data in a piece | encode 4+2, GB/s | decode 2 of 4+2 |\n| --- | --- | --- |")
    rows: dict[int, Row] = {}
    for size in PIECES:
        ec.ENCODE_PIECE_BYTES = ec.DECODE_PIECE_BYTES = size
        rows[size] = Row(Code(4, 2), ec.ErasureCodec(Code(4, 2)))
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in PIECES}
    for _ in range(rounds):
        for size, row in rows.items():
            found[size].append(row.rates())
    for size, results in found.items():
        print(f"| {size >> 10} KiB | {spread([r[0] for r in results])} | {spread([r[2] for r in results])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pieces", action="store_true", help="compare sizes of pieces instead")
    options = parser.parse_args()
    if options.pieces:
        print_pieces(options.rounds)
    else:
        print_codes(options.rounds)


if __name__ == "__main__":
    main()
