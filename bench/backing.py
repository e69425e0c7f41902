"""How fast a segment of the arena is backed and its pages cleared, by how many threads.

python bench/backing.py --nbytes 8589934592 --threads 1,2,4,8
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import spread

from snapd.memory import segments


def backed(nbytes: int, threads: int) -> float:
    """Seconds of `back_segment` with at most so many threads; half of the cores must be as many."""
    segments.CLEARING_THREADS_MAX = threads
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="snapd-bench-") as folder:
        began = time.perf_counter()
        segment = segments.back_segment(Path(folder) / "segment", 0, nbytes)
        seconds = time.perf_counter() - began
        segment.mapping.close()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nbytes", type=int, default=1 << 30)
    parser.add_argument("--threads", default="1,2,4,8", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    allowed = max(1, (os.cpu_count() or 1) // 2)
    counts = sorted({min(allowed, int(text)) for text in args.threads.split(",")})
    samples: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(args.rounds):
        for count in counts:
            samples[count].append(args.nbytes / 1e9 / backed(args.nbytes, count))
    for count, rates in samples.items():
        print(f"{count} threads: {spread(rates, 2)} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
