"""All claims, one after the other: `make bench-claims`. About a quarter of an hour on two cores.

python bench/claims.py            # everything, as stated in docs/performance.md
python bench/claims.py --quick    # smaller state and fewer samples: a look, not a measurement
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FULL = (
    ("stall.py", "--size", "medium", "--snapshots", "200"),
    ("stall.py", "--size", "medium", "--snapshots", "60", "--ranks", "2"),
    ("end_to_end.py", "--size", "small", "--pairs", "10"),
    ("restore.py", "--size", "medium", "--times", "5"),
    ("memory.py", "--size", "medium", "--snapshots", "1000"),
)
QUICK = (
    ("stall.py", "--size", "small", "--snapshots", "30"),
    ("stall.py", "--size", "small", "--snapshots", "12", "--ranks", "2"),
    ("end_to_end.py", "--size", "small", "--pairs", "8", "--block", "5"),
    ("restore.py", "--size", "small", "--times", "3"),
    ("memory.py", "--size", "small", "--snapshots", "200"),
)


def main() -> int:
    worst = 0
    for script, *options in QUICK if "--quick" in sys.argv[1:] else FULL:
        print(f"\n== {script} {' '.join(options)}", flush=True)
        worst = max(
            worst, subprocess.run([sys.executable, str(HERE / script), *options], check=False).returncode
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
