"""What chunks of real training states take in a tier, and what that costs: bytes stored against raw, seconds, CPU.

    for v in fp32 bf16 int8; do python bench/compression_states.py --out DIR --variant $v; done
    python bench/compression.py --states DIR [--level 1 --level 3] [--rounds 3]

One thread. Every field of a state is cut into chunks of 4 MiB, as in a shard, and goes through the encoder and decoder
that flush and restore use (digests are checked in decoding, as always). `xor N`: the chunk of the last state XOR the
same chunk N steps before, then encoded alike; reading it back needs the other chunk too. Best of the rounds. `raw`:
stored as it is, for comparison.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from snapd.codec.compress import ChunkDecoder, ChunkEncoder
from snapd.core.stored import Encoding, StoredChunk

CHUNK_BYTES = 4 << 20
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}


@dataclass
class Cost:
    raw: int = 0
    stored: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    raw_chunks: int = 0
    chunks: int = 0

    def add(self, other: Cost) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self, name: str) -> str:
        gb = self.raw / 1e9
        return (
            f"| {name:34} | {self.raw / 1e6:7.1f} | {100 * self.stored / self.raw:5.1f} % | {self.encode_s / gb:5.2f}"
            f" | {self.decode_s / gb:5.2f} | {self.raw_chunks}/{self.chunks} |"
        )


def best(call: Callable[[], object], rounds: int) -> float:
    """CPU seconds of this thread; all work is done in it."""
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times)


def measure(
    raw: memoryview, width: int, encoder: ChunkEncoder, rounds: int, prepare: Callable[[], object]
) -> Cost:
    """One chunk; `prepare` is done again for each encoding and each decoding, and counted."""

    def encode() -> None:
        prepare()
        encoder.encode(raw, width)

    way = encoder.encode(raw, width)
    encoded_s = best(encode, rounds)
    chunk = StoredChunk(
        len(raw), xxhash.xxh3_128_digest(raw), "pack", 64, way.nbytes, way.encoding, way.element_nbytes
    )
    out, decoder = memoryview(bytearray(len(raw))), ChunkDecoder()

    def decode() -> None:
        decoder.decode(way.buffer, chunk, out)
        prepare()

    decoded_s = best(decode, rounds)
    assert out == raw
    return Cost(len(raw), way.nbytes, encoded_s, decoded_s, int(way.encoding is Encoding.RAW), 1)


def chunks_of(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def plain_cost(path: Path, width: int, encoder: ChunkEncoder, rounds: int) -> Cost:
    total = Cost()
    for raw in chunks_of(path):
        total.add(measure(memoryview(raw), width, encoder, rounds, lambda: None))
    return total


def xor_cost(path: Path, base: Path, width: int, encoder: ChunkEncoder, rounds: int) -> Cost:
    total = Cost()
    for raw, old in zip(chunks_of(path), chunks_of(base), strict=True):
        now, before = np.frombuffer(raw, np.uint64), np.frombuffer(old, np.uint64)
        changed = np.empty_like(now)

        def xor(now: object = now, before: object = before, changed: object = changed) -> None:
            np.bitwise_xor(now, before, out=changed)

        xor()
        total.add(measure(memoryview(changed).cast("B"), width, encoder, rounds, xor))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--level", type=int, action="append")
    parser.add_argument("--mode", default="always", choices=("auto", "always"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| state, field, way | raw MB | stored | encode CPU s/GB | decode CPU s/GB | raw chunks |")
    print("|---|---|---|---|---|---|")
    for variant in sorted(p for p in args.states.iterdir() if p.is_dir()):
        steps = sorted(int(p.name) for p in variant.iterdir())
        last = variant / str(steps[-1])
        plain = Cost()
        for path in sorted(last.iterdir()):
            plain.add(plain_cost(path, 1, ChunkEncoder("off"), args.rounds))
        print(plain.row(f"{variant.name} ALL raw"), flush=True)
        for level in args.level or [1, 3]:
            encoder = ChunkEncoder(args.mode, level)
            totals: dict[str, Cost] = {}
            for path in sorted(last.iterdir()):
                width = WIDTHS[path.suffix[1:]]
                unfiltered = plain_cost(path, 1, encoder, 1)
                print(unfiltered.row(f"{variant.name} {path.name} no filter, level {level}"), flush=True)
                ways = {"": plain_cost(path, width, encoder, args.rounds)}
                for step in steps[:-1]:
                    base = variant / str(step) / path.name
                    ways[f" xor {steps[-1] - step}"] = xor_cost(path, base, width, encoder, args.rounds)
                for way, cost in ways.items():
                    totals.setdefault(way, Cost()).add(cost)
                    print(cost.row(f"{variant.name} {path.name}{way}, level {level}"), flush=True)
            for way, cost in totals.items():
                print(cost.row(f"{variant.name} ALL{way}, level {level}"), flush=True)


if __name__ == "__main__":
    main()
