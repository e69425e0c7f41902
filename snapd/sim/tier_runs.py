"""Long seeded runs of a tier in virtual time: stalls, crashes at any operation, lost answers, late requests, two
collectors by mistake, writers whose clock jumps. The same programs and promises as in tier_explorer.py.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.core.stored import Condemned
from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_collector import Collecting, collecting, tidied, unnamed
from snapd.sim.tier_model import (
    KEYS,
    Become,
    Item,
    Op,
    Program,
    Store,
    Verb,
    named_by,
    standing,
    standing_among,
)
from snapd.sim.tier_programs import Rewriting, Writing, rewriting, writing

ROUND_S = 3600.0
RULES = CollectRules(
    keep=KeepRules(last=2, every_steps=200), round_s=ROUND_S, intent_ttl_s=ROUND_S, void_ttl_s=24 * ROUND_S
)
STALLS_S = (0.5 * ROUND_S, 1.2 * ROUND_S, 2.5 * ROUND_S, 6 * ROUND_S)  # far below void_ttl_s


@dataclass(frozen=True, slots=True)
class RunSettings:
    """`days` of virtual time; probabilities per operation."""

    days: float = 2.0
    snapshot_every_s: float = 1500.0
    nodes: int = 2
    crash: float = 0.01
    stall: float = 0.02
    lost: float = 0.02
    collectors: int = 1
    bugs: frozenset[TierBug] = frozenset()


@dataclass(slots=True)
class RunOutcome:
    seed: int
    broken: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)


class LiveStore:
    """As tier_model.Store, changed in place: a long run has hundreds of objects."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Item]] = {}

    def _folder(self, key: str) -> dict[str, Item]:
        return self._folders.setdefault(key.split("/")[2], {})

    def has(self, key: str) -> bool:
        return key in self._folder(key)

    def under(self, prefix: str) -> tuple[Item, ...]:
        folder = self._folder(prefix)
        return tuple(folder[key] for key in sorted(folder) if key.startswith(prefix))

    def snapshot(self) -> Store:
        items = [item for folder in self._folders.values() for item in folder.values()]
        return Store(tuple(sorted(items, key=lambda item: item.key)))

    def apply(self, op: Op, now_s: float) -> tuple[bool, Any]:
        """(whether anything changed, the answer)."""
        if op.verb == Verb.LIST:
            return False, self.under(op.key)
        if op.verb == Verb.CLOCK:
            return False, now_s
        if op.verb == Verb.SLEEP:
            return False, None
        folder = self._folder(op.key)
        found = folder.get(op.key)
        if op.verb == Verb.READ:
            return False, found.content if found else None
        if op.verb == Verb.DELETE:
            return folder.pop(op.key, None) is not None, None
        assert op.content is not None
        if op.verb == Verb.CREATE and found is not None:
            return False, found.content
        folder[op.key] = Item(op.key, op.content, now_s)
        return True, op.content


@dataclass(slots=True)
class _Actor:
    name: str
    program: Program
    answer: Any = None
    is_begun: bool = False


class TierRun:
    """One seed."""

    def __init__(self, seed: int, settings: RunSettings) -> None:
        self._chance = random.Random(seed)
        self._settings = settings
        self._store = LiveStore()
        self._queue: list[tuple[float, int, str, Any]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self._newest: SnapshotId | None = None
        self._listed: dict[str, float] = {}  # key -> when a list that names it was published
        self.outcome = RunOutcome(seed)

    def run(self) -> RunOutcome:
        end_s = self._settings.days * 86400
        self._plan(end_s)
        while self._queue and not self.outcome.broken:
            now_s, _, what, subject = heapq.heappop(self._queue)
            if now_s > end_s and what != "late":
                continue  # everybody ends here: those who wait for somebody who never comes, too
            if what == "begin":
                self._begin(now_s, *subject)
            elif what == "late":
                self._apply(now_s, "late", subject)
            else:
                self._go_on(now_s, subject)
        if not self.outcome.broken:
            self._check_quiet(end_s)
        return self.outcome

    def _at(self, at_s: float, what: str, subject: Any) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), what, subject))

    def _plan(self, end_s: float) -> None:
        step = 0
        at_s = 0.0
        while at_s < end_s:
            step += 10
            at_s += self._settings.snapshot_every_s * self._chance.uniform(0.3, 1.7)
            for rank in range(self._settings.nodes):
                self._at(at_s + self._chance.uniform(0, 60), "begin", ("writer", SnapshotId(1, step), rank))
            if self._chance.random() < 0.1:
                self._at(at_s + self._chance.uniform(0, 4000), "begin", ("rewriter", SnapshotId(1, step), 0))
        for _ in range(self._settings.collectors):
            self._at(self._chance.uniform(0, ROUND_S), "begin", ("collector", None, end_s))

    def _begin(self, now_s: float, kind: str, target: Any, detail: Any) -> None:
        number, bugs = next(self._numbers), self._settings.bugs
        if kind == "writer":
            task = Writing(
                number, target, detail, self._settings.nodes, 3, round_s=ROUND_S, ttl_s=ROUND_S, bugs=bugs
            )
            gives_up = self._chance.random() < 0.05
            program = writing(replace(task, gives_up=gives_up), 0)
        elif kind == "rewriter":
            program = rewriting(Rewriting(number, target, bugs))
        else:
            passes = int((detail - now_s) / 900) + 1
            program = collecting(Collecting(number, RULES, passes, 900.0, bugs), 0)
        name = f"{kind} {number}" + (f" of {target}" if target else "")
        self._at(now_s, "go", (_Actor(name, program), kind, target, detail))

    def _go_on(self, now_s: float, subject: tuple[_Actor, str, Any, Any]) -> None:
        actor, kind, target, detail = subject
        while True:
            try:
                op = actor.program.send(actor.answer) if actor.is_begun else next(actor.program)
            except StopIteration as end:
                if not isinstance(end.value, Become):
                    self.outcome.counts[f"{kind} ended"] += 1
                    return
                actor.program, actor.is_begun = end.value.program(*end.value.arguments), False
                continue
            actor.is_begun = True
            break
        if op.is_write and self._chance.random() < self._settings.crash:
            self.outcome.counts["crash"] += 1
            if self._chance.random() < 0.5:
                self._at(now_s + self._chance.choice(STALLS_S), "late", op)
            restart = (kind, target, detail)
            if kind != "rewriter" and (kind == "collector" or self._chance.random() < 0.7):
                self._at(now_s + self._chance.uniform(5, 2 * ROUND_S), "begin", restart)
            return
        self._at(now_s + self._delay(kind, op), "go", subject)
        actor.answer = self._apply(now_s, actor.name, op)
        if op.verb in (Verb.CREATE, Verb.PUT) and self._chance.random() < self._settings.lost:
            self.outcome.counts["lost answer, lands again"] += 1
            self._at(now_s + self._chance.choice(STALLS_S), "late", op)

    def _delay(self, kind: str, op: Op) -> float:
        """Until the program goes on. A collector that stalls between its look and its deletions looks again."""
        if op.verb == Verb.SLEEP:
            return op.seconds * self._chance.uniform(0.8, 1.2)
        if self._chance.random() < self._settings.stall and kind != "collector":
            self.outcome.counts["stall"] += 1
            return self._chance.choice(STALLS_S)
        if self._chance.random() < self._settings.stall:
            return self._chance.uniform(1, 60)
        return self._chance.uniform(0.01, 0.3)

    def _apply(self, now_s: float, name: str, op: Op) -> Any:
        is_changed, answer = self._store.apply(op, now_s)
        if op.verb == Verb.CREATE and isinstance(op.content, Condemned) and is_changed:
            for key in op.content.keys:
                self._listed.setdefault(key, now_s)
        if is_changed:
            self.outcome.trace.append(f"{now_s:10.1f} {name}: {op.verb} {op.key}")
            self._check(now_s, name, op)
        return answer

    def _check(self, now_s: float, name: str, op: Op) -> None:
        if op.verb != Verb.DELETE and not op.key.startswith(KEYS.snapshots):
            return
        found = dict(standing_among(self._store.under(KEYS.snapshots)))
        for snapshot, record in found.items():
            missing = [key for key in named_by(record) if not self._store.has(key)]
            if missing:
                self.outcome.broken = f"{snapshot} is committed, and {missing[0]} is not there"
        if self._newest is not None and not any(snapshot >= self._newest for snapshot in found):
            self.outcome.broken = f"{self._newest} was the newest complete snapshot, and is gone"
        self._newest = max([*found, *([self._newest] if self._newest else [])], default=None)
        is_lasting = op.key.startswith((KEYS.packs, KEYS.shards, KEYS.snapshots))
        if name.startswith("collector") and op.verb == Verb.DELETE and is_lasting:
            self.outcome.counts["deleted"] += 1
            since_s = now_s - self._listed.get(op.key, now_s)
            if since_s < ROUND_S:
                self.outcome.broken = f"{op.key} was deleted {since_s:.0f} s after it was condemned"

    def _check_quiet(self, end_s: float) -> None:
        """After many rounds in which nobody writes, what is there is named."""
        store = self._store.snapshot()
        for number in range(12):
            task = Collecting(99, RULES, bugs=self._settings.bugs)
            store = tidied(store, task, end_s + 40 * 86400 + number * (ROUND_S + 1), passes=1)
        left = unnamed(store)
        if left:
            self.outcome.broken = f"left after quiet rounds: {', '.join(left[:4])}"
        self.outcome.counts["snapshots at the end"] = len(dict(standing(store)))


def settings_of(seed: int, bugs: frozenset[TierBug] = frozenset()) -> RunSettings:
    """What a seed tries: one or two nodes, calm or rough, one collector or, by mistake, two."""
    chance = random.Random(seed * 7919)
    return RunSettings(
        nodes=chance.choice((1, 2, 2, 3)),
        crash=chance.choice((0.0, 0.01, 0.04)),
        stall=chance.choice((0.0, 0.01, 0.05)),
        lost=chance.choice((0.0, 0.02, 0.05)),
        snapshot_every_s=chance.choice((900.0, 1500.0, 4000.0)),
        collectors=chance.choice((1, 1, 2)),
        bugs=bugs,
    )


def run_tier_seed(seed: int, bugs: frozenset[TierBug] = frozenset()) -> RunOutcome:
    return TierRun(seed, settings_of(seed, bugs)).run()
