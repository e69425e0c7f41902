"""`snapd plan --plot`: goodput over the interval, and what survives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapd.core.planning import Cluster, Plan
from snapd.errors import ConfigError

POINTS = 80
SUFFIXES = (".pdf", ".png", ".svg")


def draw_plot(path: Path, cluster: Cluster, plans: Sequence[Plan]) -> None:
    """Draw the plans into `path`.

    Raises:
        ConfigError: kind `plot`: no matplotlib, another suffix, or a file that cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"cannot draw into {path}", kind="plot", hint=f"name a file in {', '.join(SUFFIXES)}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install matplotlib; the table and --json need nothing"
        raise ConfigError(
            "--plot needs matplotlib, which is not installed", kind="plot", hint=hint
        ) from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    # The codes' curves lie on one another: the first stands for all of them.
    shown = [plan for plan in plans if plan.code is None]
    shown += [plan for plan in plans if plan.code is not None][:1]
    for plan in shown:
        low, high = plan.memory_interval_s / 20, plan.memory_interval_s * 20
        intervals = [low * (high / low) ** (i / POINTS) for i in range(POINTS + 1)]
        label = plan.name if plan.code is None else f"parity ({plan.name})"
        (line,) = left.plot(intervals, [plan.goodput_at(interval) for interval in intervals], label=label)
        left.plot([plan.memory_interval_s], [plan.goodput], "o", color=line.get_color())
    left.set(
        xscale="log", xlabel="seconds between snapshots", ylabel="goodput", title=f"{cluster.nodes} nodes"
    )
    left.legend(loc="lower left")
    for plan in plans:
        if plan.code is not None:
            right.plot(list(plan.survival), list(plan.survival.values()), "o-", label=plan.name)
    right.set(
        xscale="log",
        xlabel="nodes lost at once",
        ylabel="probability that memory survives",
        ylim=(-0.02, 1.02),
    )
    if right.lines:
        right.legend(loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", kind="plot") from error
