"""The comparison with the uninterrupted run, and the table that sums the demo up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from final import first_difference
from world import Kill, RunFailed, RunLog, Watch

__all__ = ["Found", "RunFailed", "compare", "table"]


@dataclass
class Found:
    difference: str | None
    losses: int
    tensors: int


def _losses(run: RunLog, rank: int) -> dict[int, list[str]]:
    by_step: dict[int, list[str]] = {}
    for event in run.of("step", rank):
        by_step.setdefault(event["step"], []).append(event["loss"])
    return by_step


def compare(out: Path, reference: RunLog, run: RunLog, kill: Kill, ranks: int, steps: int) -> Found:
    """Every loss of every rank at every step, those before the kill included, then the final states."""
    losses = tensors = 0
    for rank in range(ranks):
        wanted, got = _losses(reference, rank), _losses(run, rank)
        if sorted(wanted) != list(range(1, steps + 1)) or not set(range(1, steps + 1)) <= set(got):
            return Found(f"rank {rank}: not every step was logged", losses, tensors)
        for step in range(1, steps + 1):
            for loss in got[step]:  # twice where a step was lost and done again
                losses += 1
                if loss != wanted[step][0]:
                    text = f"rank {rank}: loss of step {step}: {wanted[step][0]} became {loss}"
                    return Found(text, losses, tensors)
        if not any(e["step"] == run.start + 1 and e["began"] > kill.t for e in run.of("step", rank)):
            return Found(f"rank {rank}: did not go on with step {run.start + 1}", losses, tensors)
    for rank in range(ranks):
        name = f"final-{rank}.safetensors"
        difference, count = first_difference(out / "reference" / name, out / "interrupted" / name)
        tensors += count
        if difference:
            return Found(f"rank {rank}: {difference}", losses, tensors)
    return Found(None, losses, tensors)


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return f"{statistics.median(seconds) * 1e3:.1f} ms [{low:.1f}..{high:.1f}], {len(seconds)} samples"


def table(reference: RunLog, run: RunLog, kill: Kill, watch: Watch, found: Found) -> str:
    """What a reader wants to know, one line each; medians with [min..max]."""
    restored = [e for e in run.of("restored") if e["t"] > kill.t]
    again = max(e["ended"] for e in run.of("step") if e["t"] > kill.t and e["step"] == run.start + 1)
    finished = max((e["step"] for e in run.of("step") if e["t"] <= kill.t), default=0)
    calls = [e["ended"] - e["stepped"] for e in run.of("step")]
    healths = [e["health"] for e in run.of("health")]
    fences = [seconds for health in healths for seconds in health.get("fence_s", [])]
    rows = [
        ("steps", f"{max(e['step'] for e in run.of('step'))}, a snapshot after each"),
        (
            "a step, without snapd",
            _spread([e["ended"] - e["began"] for e in reference.of("step")][run.ranks :]),
        ),
        (
            "a step, with snapd",
            _spread([e["ended"] - e["began"] for e in run.of("step")][run.ranks :]),
        ),
        ("stall per snapshot: the call of snap.step", _spread(calls)),
        ("stall per snapshot: the fence (last start)", _spread(fences)),
        ("window until captured", _spread(list(watch.windows.values()))),
        (
            "killed",
            f"in step {kill.step} ({', '.join(b.phase for b in kill.beats)}), all {run.ranks} ranks, SIGKILL",
        ),
        ("went on from", f"step {run.start}"),
        ("lost", f"{max(finished - run.start, 0)} finished steps, and the step under way"),
        ("time to restore", _spread([e["seconds"] for e in restored])),
        (
            "torchrun started again to next step done",
            f"{again - run.restarted_t:.1f} s (imports, building, restore, one step)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
