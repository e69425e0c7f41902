"""Measure the copy engine against `torch.Tensor.copy_` and libc's memcpy, into backed shared memory, one thread.

The contenders take turns within one process, so that a busy machine slows all of them alike; prints medians with
[min..max] and the ratio to memcpy. `--kernels` repeats it with each kernel, in processes of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable

import torch
from snapd_native import CopyEngine, CopyPlan, Mapping, copy_bytes, copy_kernel

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB


def chunked_plan(nbytes: int) -> CopyPlan:
    """One source to one destination in pieces of a chunk, as a shard is laid out."""
    at = array("Q", range(0, nbytes, CHUNK_BYTES))
    sizes = array("Q", (min(CHUNK_BYTES, nbytes - begin) for begin in at))
    zeros = array("Q", [0] * len(at))
    return CopyPlan(zeros, at, zeros, at, sizes, zeros)


def contenders(nbytes: int, mapping: Mapping, engine: CopyEngine) -> dict[str, Callable[[], object]]:
    """What to call for one copy of `nbytes` into the mapping, by name; all of them copy the same bytes."""
    source = torch.empty(nbytes, dtype=torch.uint8).random_()
    target = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes)
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    plan = chunked_plan(nbytes)
    src, dst = array("Q", [source.data_ptr()]), array("Q", [mapping.address])
    return {
        "memcpy": lambda: libc.memcpy(mapping.address, source.data_ptr(), nbytes),
        "torch copy_": lambda: target.copy_(source),
        "copy_bytes": lambda: copy_bytes(mapping.address, source.data_ptr(), nbytes),
        "plan.run": lambda: plan.run(src, dst),
        "engine": lambda: engine.submit(plan, src, dst).wait(help=False),
    }


def rates(calls: dict[str, Callable[[], object]], nbytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each call per round."""
    repeats = max(1, 64 * MIB // nbytes)
    result: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            rate = repeats * nbytes / (time.perf_counter() - begin) / 1e9
            if turn > 0:  # the first round warms up
                result[name].append(rate)
    return result


def measure(sizes: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    engine = CopyEngine(1)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, max(sizes))
        mapping = Mapping(file.fileno(), max(sizes), True)
        mapping.populate()
        for nbytes in sizes:
            found = rates(contenders(nbytes, mapping, engine), nbytes, rounds)
            floor = statistics.median(found["memcpy"])
            print(f"{nbytes / MIB:g} MiB, kernel {copy_kernel()}")
            for name, values in found.items():
                median = statistics.median(values)
                spread = f"[{min(values):.1f}..{max(values):.1f}]"
                print(f"  {name:12} {median:6.1f} GB/s {spread:14} {median / floor:5.2f} x memcpy")
    measure_submit(engine)
    engine.close()


def measure_submit(engine: CopyEngine, source_count: int = 1000) -> None:
    """What submit() costs its caller, with bases as arrays and as lists; median and 99th percentile."""
    source, target = ctypes.create_string_buffer(64 * MIB), ctypes.create_string_buffer(64 * MIB)
    share = 64 * MIB // source_count
    at = array("Q", range(0, share * source_count, share))
    count = range(source_count)
    plan = CopyPlan(
        array("I", count),
        [0] * source_count,
        [0] * source_count,
        at,
        [share] * source_count,
        [0] * source_count,
    )
    src = array("Q", (ctypes.addressof(source) + begin for begin in at))
    dst = array("Q", [ctypes.addressof(target)])
    for name, bases in (("arrays", src), ("lists", src.tolist())):
        costs = []
        for _ in range(300):
            begin = time.perf_counter()
            ticket = engine.submit(plan, bases, dst)
            costs.append((time.perf_counter() - begin) * 1e6)
            ticket.wait(help=False)
        costs.sort()
        print(
            f"submit of {source_count} sources as {name}: {costs[150]:.0f} us, 99th percentile {costs[297]:.0f} us"
        )
    samples = []
    for turn in range(100):
        begin = time.perf_counter()
        sample = plan.sample(src, turn, 4096, 1.0)
        samples.append((time.perf_counter() - begin) * 1e6)
    print(
        f"sample of {source_count} sources, {sample.nbytes / 1e6:.1f} MB: {statistics.median(samples):.0f} us"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=float, nargs="+", default=[0.25, 4, 64, 512, 1430], help="sizes in MiB")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", action="store_true", help="with each kernel in turn")
    arguments = parser.parse_args()
    if not arguments.kernels:
        measure([int(size * MIB) for size in arguments.mib], arguments.rounds)
        return 0
    plain = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--mib", *map(str, arguments.mib)]
    for name in ("scalar", "sse2", "avx2", "avx512"):
        subprocess.run(plain, env={**os.environ, "SNAPD_COPY_KERNEL": name}, check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
