"""Writes what was measured into docs/performance.md, between the marks that are there for it.

    python bench/tables.py --claims bench-out/claims.jsonl --peers probe-small-single-compute-t1.jsonl

`--claims`: what the scripts of this folder appended; of each benchmark and setting the newest run is shown. `--peers`:
a probe of the peer harness (one JSON object a line).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import ROOT, spread

PAGE = ROOT / "docs" / "performance.md"
TABLES = {  # mark in the page -> whose claims stand there
    "claims": ("stall", "restore", "end_to_end", "memory"),
    "tiers": ("tiers", "tiers_flush", "tiers_restore", "tiers_far", "tiers_disk"),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def claims_table(records: Iterable[dict[str, Any]]) -> str:
    newest = {(r["benchmark"], json.dumps(r["settings"], sort_keys=True)): r for r in records}
    lines = ["| claim | measured | limit | unit | | spread |", "| --- | ---: | ---: | --- | --- | --- |"]
    notes = []
    for record in newest.values():
        for claim in record["claims"]:
            verdict = "holds" if claim["holds"] else "**falls short**"
            cells = (
                claim["name"],
                f"{claim['value']:.3f}",
                f"{claim['limit']:.3f}",
                claim["unit"],
                verdict,
                claim["detail"],
            )
            lines.append("| " + " | ".join(cells) + " |")
        machine = record["machine"]
        load = ", ".join(f"{value:.1f}" for value in machine["load"])
        where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}"
        notes.append(
            f"- `python bench/{record['command']}`: {record['when']}, {where}, commit {machine['commit']}, "
            f"load averages at the end {load}"
        )
    return "\n".join([*lines, "", *notes])


def peers_table(records: Iterable[dict[str, Any]]) -> str:
    by_system: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("ckpts"):
            by_system.setdefault(record["system"], []).append(record)
    lines = [
        "| system | stall | stall + tax | until safe, idle | run time, a save after every step | restore |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for system, runs in by_system.items():
        stall, taxed, idle, every, restore = [], [], [], [], []
        for run in runs:
            unit = statistics.median(run["floors"]["memcpy1"])
            for save in run["ckpts"][1:]:
                stall.append((save["stall_save"] + save["wait"]) / unit)
                taxed.append(
                    (save["stall_save"] + sum(step - save["calm"] for step in save["overlap"])) / unit
                )
            idle += [save["durable"] / unit for save in run["idle"]]
            every += every_step(run)
            restore += [f"{r['source']} {r['s'] / unit:.1f}" for r in run.get("restore", []) if r.get("s")]
        cells = (
            spread(stall, 2),
            spread(taxed, 1),
            spread(idle, 1),
            spread(every, 2),
            ", ".join(restore) or "-",
        )
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def every_step(run: dict[str, Any]) -> list[float]:
    """Run time with a save after every step, over the run time of as many steps without."""
    by_interval = {row["k"]: row["run"] / row["n"] for row in run["e2e"]}
    return [by_interval[1] / by_interval[0]] if {0, 1} <= set(by_interval) else []


def put(page: str, mark: str, text: str) -> str:
    """Replace what stands between `<!-- MARK:begin -->` and `<!-- MARK:end -->`."""
    head, rest = page.split(f"<!-- {mark}:begin -->")
    _, tail = rest.split(f"<!-- {mark}:end -->")
    return f"{head}<!-- {mark}:begin -->\n\n{text}\n\n<!-- {mark}:end -->{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claims", type=Path)
    parser.add_argument("--peers", type=Path)
    args = parser.parse_args()
    page = PAGE.read_text()
    if args.claims:
        for mark, benchmarks in TABLES.items():
            records = [row for row in rows_of(args.claims) if row["benchmark"] in benchmarks]
            if records:
                page = put(page, mark, claims_table(records))
    if args.peers:
        page = put(page, "peers", peers_table(rows_of(args.peers)))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
