"""What every benchmark writes: facts of the machine, claims with their limits, all samples."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("bench-out")
_PACKAGES = ("torch", "numpy", "grpcio", "protobuf", "xxhash", "safetensors")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and versions; nothing that names a person or a folder."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "?",
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / (1 << 20), 1),
        "kernel": platform.release(),
        "load": os.getloadavg(),
        "versions": versions,
        "commit": commit(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def commit() -> str:
    """The commit of the sources, with a + when they differ from it; "?" outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "?"
    return head + ("+" if changed else "")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median [min..max] of all values."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


@dataclass
class Claim:
    name: str
    value: float
    limit: float
    unit: str
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def line(self) -> str:
        verdict = "PASS" if self.holds else "FALLS SHORT"
        numbers = f"{self.value:9.3f}  limit {self.limit:7.3f} {self.unit:<9}"
        return f"{self.name:<46} {numbers} {verdict}  {self.detail}"


@dataclass
class Report:
    """Collects claims and samples of one benchmark; `finish` prints and appends them."""

    benchmark: str
    settings: dict[str, Any]
    claims: list[Claim] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    def claim(self, name: str, value: float, limit: float, unit: str, detail: str = "") -> None:
        self.claims.append(Claim(name, value, limit, unit, detail))
        print(self.claims[-1].line(), flush=True)

    def finish(self, out: Path = OUT) -> int:
        """Append one JSON line to OUT/claims.jsonl; 0 if every claim holds."""
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "benchmark": self.benchmark,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": machine(),
            "settings": self.settings,
            "claims": [asdict(claim) | {"holds": claim.holds} for claim in self.claims],
            "samples": self.samples,
        }
        with open(out / "claims.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return 0 if all(claim.holds for claim in self.claims) else 1
