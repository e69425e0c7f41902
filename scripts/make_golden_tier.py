"""Write tests/golden/tier_v1/: a tier of format version 1. Never run again for a version that was released.

    python scripts/make_golden_tier.py [--out tests/golden/tier_v1]

tier/ holds the objects by key, expected.json what the tensors hold (from the source data, not from reading them back),
and MADE_BY what the compressed bytes depend on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.tier_golden import golden_tier, made_by  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "tier_v1")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    objects, expected = golden_tier()
    for key, data in objects.items():
        path = out / "tier" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (out / "MADE_BY").write_text(made_by())
    print(f"{len(objects)} objects, {sum(map(len, objects.values()))} bytes in {out}")


if __name__ == "__main__":
    main()
