"""What `snapd gc` shows."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType

from snapd.cli.output import format_age, table
from snapd.core.condemning import Garbage
from snapd.tier.collecting import Pass
from snapd.tier.rewriting import Rewritten
from snapd.units import format_size

HEADINGS = ("SNAPSHOT", "AGE", "SIZE", "KEPT", "WHY")


def pass_parts(job: str, done: Pass, rewritten: Rewritten, *, is_dry: bool) -> list[RenderableType]:
    """Snapshots with what retention says of each, then what was done, or would be."""
    would = "would be " if is_dry else ""
    rows = []
    for verdict in done.judgement.verdicts:
        seen = done.judgement.current[verdict.id]
        held = done.judgement.held.get(verdict.id, "")
        size = format_size(seen.record.nbytes) if seen.record is not None else "?"
        reason = f"{verdict.reason}; still there: {held}" if held else verdict.reason
        age = format_age(done.sight.now_s - seen.committed_s)
        rows.append((str(verdict.id), age, size, "yes" if verdict.is_kept else "no", reason))
    lines = [
        f"{job}: {format_size(done.stored_nbytes)} in {len(done.sight.packs)} packs,"
        f" {format_size(done.live_nbytes)} of them in packs that a snapshot names",
        f"  {_told(done.deleted)} {would}deleted now; {_told(done.condemned)} {would}condemned",
    ]
    if rewritten.plan.packs:
        lines.append(f"  {len(rewritten.plan.packs)} packs {would}rewritten: {rewritten.plan.reason}")
    if done.judgement.uploads:
        lines.append(f"  {len(done.judgement.uploads)} unfinished uploads {would}aborted")
    if done.next_s is not None and not is_dry:
        lines.append(f"  what is condemned is looked at again in {format_age(done.next_s)}")
    if done.ended_early:
        lines.append(f"  ended early: {done.ended_early}")
    lines += [f"  problem: {problem}" for problem in (*done.judgement.problems, *rewritten.problems)]
    lines.append(f"  {done.requests} requests")
    return [table(HEADINGS, rows, right=("AGE", "SIZE"), text=("WHY",)), "", *lines]


def _told(items: tuple[Garbage, ...] | list[Garbage]) -> str:
    counts = Counter(item.order.name.lower() for item in items)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    size = format_size(sum(item.nbytes for item in items))
    return f"{len(items)} objects ({kinds}; {size})" if items else "nothing"


def pass_json(job: str, done: Pass, rewritten: Rewritten, *, is_dry: bool) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "job": job,
        "is_dry_run": is_dry,
        "snapshots": [
            {
                "generation": verdict.id.generation,
                "step": verdict.id.step,
                "is_kept": verdict.is_kept,
                "reason": verdict.reason,
                "still_there": done.judgement.held.get(verdict.id),
                "revision": done.judgement.current[verdict.id].revision,
                "committed_s": done.judgement.current[verdict.id].committed_s,
            }
            for verdict in done.judgement.verdicts
        ],
        "packs": len(done.sight.packs),
        "stored_nbytes": done.stored_nbytes,
        "named_nbytes": done.live_nbytes,
        "deleted": _objects(done.deleted),
        "condemned": _objects(done.condemned),
        "voided": done.voided,
        "uploads_aborted": len(done.judgement.uploads),
        "rewritten": {
            "packs": sorted(rewritten.plan.packs),
            "reason": rewritten.plan.reason,
            "snapshots": [str(snapshot) for snapshot in rewritten.snapshots],
            "nbytes": rewritten.nbytes,
        },
        "is_quiet": done.is_quiet and not rewritten.snapshots,
        "next_s": done.next_s,
        "ended_early": done.ended_early or None,
        "problems": [*done.judgement.problems, *rewritten.problems],
        "requests": done.requests,
    }


def _objects(items: tuple[Garbage, ...] | list[Garbage]) -> list[dict[str, object]]:
    return [{"key": item.key, "reason": item.reason, "nbytes": item.nbytes} for item in items]
