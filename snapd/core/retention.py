"""Which snapshots of a job a durable tier keeps, and why.

Pure. Rules add up: what one of them keeps stays. Times are those that the store gave to the commit records, never a
writer's clock. A snapshot needs no other (chunks are shared between snapshots, and packs stay while anything names
them), so a parent may go before its children.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from snapd.core.ids import SnapshotId

HOUR_S = 3600
DAY_S = 24 * HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """`last`: the newest so many. `every_steps`: those whose step is a multiple. `hourly`, `daily`: the newest of each
    of the newest so many hours and days (UTC, by the store's clock) that have one. 0: that rule is off; all 0: nothing
    is ever deleted.
    """

    last: int = 0
    every_steps: int = 0
    hourly: int = 0
    daily: int = 0

    @property
    def keeps_all(self) -> bool:
        return not (self.last or self.every_steps or self.hourly or self.daily)


@dataclass(frozen=True, slots=True)
class TierSnapshot:
    """A commit record as retention sees it. `committed_s`: by the store's clock. `problem`: what is missing or broken;
    empty: complete.
    """

    id: SnapshotId
    committed_s: float
    problem: str = ""

    @property
    def is_complete(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class KeepVerdict:
    id: SnapshotId
    is_kept: bool
    reason: str


def judge_retention(
    snapshots: Sequence[TierSnapshot], rules: KeepRules, pins: Mapping[str, SnapshotId]
) -> tuple[KeepVerdict, ...]:
    """A verdict on each snapshot, newest first.

    What is damaged takes no complete snapshot's place: it stays as long as the rules would keep it if it were whole,
    and while no complete one is newer.
    """
    newest_first = sorted(snapshots, key=lambda snapshot: snapshot.id, reverse=True)
    complete = [snapshot for snapshot in newest_first if snapshot.is_complete]
    reasons = _kept(complete, rules, pins)
    if complete:
        reasons.setdefault(complete[0].id, []).insert(0, "the newest complete")
    as_if_whole = _kept(newest_first, rules, pins)
    verdicts = []
    for snapshot in newest_first:
        if snapshot.is_complete:
            kept = reasons.get(snapshot.id, [])
            verdicts.append(_verdict(snapshot, kept, rules))
            continue
        kept = as_if_whole.get(snapshot.id, [])
        if not complete or snapshot.id > complete[0].id:
            kept = ["no complete one is newer", *kept]
        verdicts.append(_verdict(snapshot, kept, rules))
    return tuple(verdicts)


def _verdict(snapshot: TierSnapshot, reasons: Sequence[str], rules: KeepRules) -> KeepVerdict:
    text = ", ".join(reasons) or f"not kept by {_names(rules)}"
    if snapshot.problem:
        text += f" (damaged: {snapshot.problem})"
    return KeepVerdict(snapshot.id, bool(reasons), text)


def _names(rules: KeepRules) -> str:
    """The rules that are on, in words."""
    parts = [
        f"the last {rules.last}" if rules.last else "",
        f"every {rules.every_steps} steps" if rules.every_steps else "",
        f"{rules.hourly} hourly" if rules.hourly else "",
        f"{rules.daily} daily" if rules.daily else "",
    ]
    return ", ".join(part for part in parts if part)


def _kept(
    newest_first: Sequence[TierSnapshot], rules: KeepRules, pins: Mapping[str, SnapshotId]
) -> dict[SnapshotId, list[str]]:
    reasons: dict[SnapshotId, list[str]] = {}

    def keep(ids: Collection[SnapshotId], reason: str) -> None:
        for snapshot in ids:
            reasons.setdefault(snapshot, []).append(reason)

    if rules.keeps_all:
        keep([snapshot.id for snapshot in newest_first], "no rule of retention is set")
    keep([snapshot.id for snapshot in newest_first[: rules.last]], f"one of the last {rules.last}")
    if rules.every_steps:
        steps = [s.id for s in newest_first if s.id.step % rules.every_steps == 0]
        keep(steps, f"every {rules.every_steps} steps")
    keep(_newest_of_each(newest_first, rules.hourly, lambda at_s: at_s // HOUR_S), "hourly")
    keep(_newest_of_each(newest_first, rules.daily, lambda at_s: at_s // DAY_S), "daily")
    there = {snapshot.id for snapshot in newest_first}
    for name, pinned in sorted(pins.items()):
        if pinned in there:
            keep([pinned], f"pinned as {name}")
    return reasons


def _newest_of_each(
    newest_first: Sequence[TierSnapshot], count: int, period_of: Callable[[float], float]
) -> list[SnapshotId]:
    """The newest snapshot of each of the `count` latest periods that have one."""
    newest: dict[float, SnapshotId] = {}
    for snapshot in newest_first:
        newest.setdefault(period_of(snapshot.committed_s), snapshot.id)
    return [newest[period] for period in sorted(newest, reverse=True)[:count]]
