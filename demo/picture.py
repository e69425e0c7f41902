"""The picture that the demo leaves: what happened when, and both loss curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from world import Kill, RunLog, Watch

STEP, LOST, RESTORE, CAPTURED, KILL = "#4c78a8", "#c9c9c9", "#f2a33c", "#3a9a5b", "#d62728"


def _timeline(axes: Axes, run: RunLog, kill: Kill, watch: Watch) -> None:
    zero = min(e["t"] for e in run.events)
    for rank in range(run.ranks):
        for event in run.of("step", rank):
            lost = event["t"] <= kill.t and event["step"] > run.start
            left, width = event["began"] - zero, event["ended"] - event["began"]
            axes.barh(rank, width * 0.96, left=left, height=0.55, color=LOST if lost else STEP)
            if event["step"] % 5 == 0:
                axes.text(
                    left + width / 2,
                    rank,
                    str(event["step"]),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white",
                )
        last = max((e["t"] for e in run.events if e["rank"] == rank and e["t"] <= kill.t), default=kill.t)
        axes.barh(
            rank, kill.t - last, left=last - zero, height=0.55, color=LOST, hatch="///", edgecolor="white"
        )
        for event in run.of("restored", rank):
            if event["t"] > kill.t:
                left = event["t"] - event["seconds"] - zero
                axes.barh(rank, max(event["seconds"], 0.15), left=left, height=0.55, color=RESTORE)
    times = [t - zero for t, _, _ in watch.captures]
    axes.scatter(times, [run.ranks] * len(times), marker="^", s=18, color=CAPTURED, zorder=3)
    axes.axvline(kill.t - zero, color=KILL, linewidth=1.6)
    axes.text(kill.t - zero + 0.2, run.ranks + 0.45, f"SIGKILL, in step {kill.step}", color=KILL, fontsize=8)
    again = [e for e in run.of("restored") if e["t"] > kill.t]
    axes.annotate(
        f"restored step {run.start}\nin {max(e['seconds'] for e in again):.2f} s",
        (again[0]["t"] - zero, 0.3), (again[0]["t"] - zero - 0.3, 0.5), ha="right", fontsize=8,
    )  # fmt: skip
    axes.set_yticks(
        [*range(run.ranks), run.ranks], [*(f"rank {r}" for r in range(run.ranks)), "complete on\nall ranks"]
    )
    axes.set_ylim(-0.5, run.ranks + 0.8)
    axes.set_xlabel("seconds since the ranks were first started")
    axes.set_title("steps (blue), lost work (grey), restore (orange), snapshots complete (green)", fontsize=9)


def _losses(axes: Axes, reference: RunLog, run: RunLog, kill: Kill) -> None:
    wanted = reference.of("step", 0)
    axes.plot(
        [e["step"] for e in wanted], [float.fromhex(e["loss"]) for e in wanted],
        color="#b0b0b0", linewidth=5, label="uninterrupted, without snapd", solid_capstyle="round",
    )  # fmt: skip
    for part, label in (
        ([e for e in run.of("step", 0) if e["t"] <= kill.t], "until the kill"),
        ([e for e in run.of("step", 0) if e["t"] > kill.t], f"after the restart, from step {run.start}"),
    ):
        color = STEP if label == "until the kill" else RESTORE
        axes.plot(
            [e["step"] for e in part], [float.fromhex(e["loss"]) for e in part], color=color, label=label
        )
    axes.axvline(kill.step, color=KILL, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of rank 0 (nats per byte)")
    axes.legend(fontsize=8)


def draw(out: Path, reference: RunLog, run: RunLog, kill: Kill, watch: Watch) -> None:
    """Write `demo.png` and `demo.svg` to `out`."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(11, 6.2), height_ratios=(1, 1.2), layout="constrained"
    )
    _timeline(above, run, kill, watch)
    _losses(below, reference, run, kill)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"demo.{suffix}", dpi=150)
    plt.close(figure)
