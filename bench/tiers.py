"""Tiers against their floors, on this machine, in one run.

    python bench/tiers.py [transfer ...] --rounds 7

Parts: `transfer` - stores alone: a directory against large `write` and fsync, S3 (SeaweedFS on loopback) against
boto3's transfer manager on the same bytes with the same concurrency. `restore` - a directory's snapshot into memory
against reading the same bytes, DCP and safetensors (tiers_restore.py). All take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import Report
from tiers_restore import restore
from tiers_transfer import transfer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument(
        "--tmp", default=None, help="where files go: a real disk (default: the temporary folder)"
    )
    args = parser.parse_args()
    report = Report("tiers", {"rounds": args.rounds, "concurrency": args.concurrency})
    for name in args.parts or PARTS:
        PARTS[name](report, args)
    return report.finish()


PARTS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "transfer": lambda report, args: transfer(
        report, rounds=args.rounds, concurrency=args.concurrency, tmp=args.tmp
    ),
    "restore": lambda report, args: restore(report, rounds=args.rounds, nbytes=1 << 30, tmp=args.tmp),
}

if __name__ == "__main__":
    raise SystemExit(main())
