"""Every interleaving of a tier's programs, store operation by store operation, with crashes and late requests.

A state is the store, each program's place, the requests that are still on their way, and what the checker remembers.
From each state every program may do its next operation; while the budgets last it may also end right before or after
it (a crash), and its request may land a second time, or for the first time after its sender has ended, at any later
moment. Time does not exist: everything is old (rules of age never protect anything), or, with `is_young`, intents and
what nobody names never are. What is found holds for any clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.core.stored import Intent
from snapd.sim.tier_collector import Collecting, tidied, unnamed
from snapd.sim.tier_model import Op, Program, Store, Verb, missing_of, standing
from snapd.sim.tier_programs import promised

NOW_S = 1e9
# Everything is older than these. Void records end by time alone, so they never end here.
OLD = CollectRules(keep=KeepRules(last=1), round_s=-1.0, intent_ttl_s=-1.0, void_ttl_s=float("inf"))
COLLECTOR = Collecting(number=9, rules=OLD)
TIDY_EVERY = 16  # one state in so many is tidied up, besides those in which all have ended


class Place(NamedTuple):
    """Where a program is. `program` None: it has ended."""

    program: Callable[..., Program] | None
    arguments: tuple[Any, ...] = ()
    results: tuple[Any, ...] = ()


ENDED = Place(None)


class State(NamedTuple):
    store: Store
    places: tuple[Place, ...]
    late: tuple[Op, ...]
    crashes_left: int
    late_left: int
    newest: SnapshotId | None  # that was ever complete


@dataclass(frozen=True, slots=True)
class Scenario:
    """`programs`: by name, (program, arguments). `crashes`, `late`: how many at most. `is_young`: no intent is ever
    old.
    """

    store: Store
    programs: Mapping[str, tuple[Callable[..., Program], tuple[Any, ...]]]
    crashes: int = 0
    late: int = 0
    is_young: bool = False
    states_max: int = 2_000_000


@dataclass(slots=True)
class Explored:
    """`broken`: the first broken promise, with the steps that led to it."""

    states: int = 0
    ends: int = 0
    broken: str = ""
    trace: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class Explorer:
    """One exploration; depth first, each state once."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._names = list(scenario.programs)
        self._next: dict[Place, Op | None] = {}
        self._after: dict[tuple[Place, Any], Place] = {}
        self.found = Explored()

    def run(self) -> Explored:
        start = self._checked(
            State(
                self._scenario.store,
                tuple(self._settled(Place(*each)) for each in self._scenario.programs.values()),
                (),
                self._scenario.crashes,
                self._scenario.late,
                None,
            )
        )
        before: dict[State, tuple[State, str] | None] = {start: None}
        stack = [start]
        ends: set[Store] = set()
        while stack and not self.found.broken:
            state = stack.pop()
            self.found.states += 1
            if self.found.states > self._scenario.states_max:
                raise OverflowError(f"more than {self._scenario.states_max} states")
            for label, following in self._following(state):
                if following in before:
                    continue
                before[following] = (state, label)
                broken = broken_promise(following)
                if broken:
                    self._tell(broken, following, before)
                    break
                stack.append(self._checked(following))
                if stack[-1] is not following:
                    before.setdefault(stack[-1], (state, label))
            if not self.found.broken and self._is_to_tidy(state) and state.store not in ends:
                ends.add(state.store)
                left = left_over(state.store)
                if left:
                    self._tell(f"left for ever: {', '.join(left)}", state, before)
        self.found.ends = len(ends)
        return self.found

    def _is_to_tidy(self, state: State) -> bool:
        return all(place == ENDED for place in state.places) or self.found.states % TIDY_EVERY == 0

    def _tell(self, broken: str, state: State, before: Mapping[State, tuple[State, str] | None]) -> None:
        self.found.broken = broken
        step = before.get(state)
        while step is not None:
            self.found.trace.append(step[1])
            step = before.get(step[0])
        self.found.trace.reverse()

    def _checked(self, state: State) -> State:
        """The state with what the checker remembers brought up to date."""
        complete = [name for name, record in standing(state.store) if not missing_of(state.store, record)]
        newest = max([*complete, *([state.newest] if state.newest else [])], default=None)
        return state if newest == state.newest else state._replace(newest=newest)

    # steps

    def _following(self, state: State) -> Iterator[tuple[str, State]]:
        for index, place in enumerate(state.places):
            op = self._op(place)
            if op is None:
                continue
            name = self._names[index]
            store, answer = state.store.apply(op, self._at_s(op))
            done = self._moved(state, index, self._step(place, answer), store)
            if done != state:
                yield f"{name}: {_words(op)}", done
            if not op.is_write:
                continue
            if state.late_left and op.verb != Verb.DELETE:
                self.found.kinds["a request lands twice"] += 1
                late = (*state.late, op)
                yield (
                    f"{name}: {_words(op)}, and once more later",
                    done._replace(late=late, late_left=state.late_left - 1),
                )
            if state.crashes_left:
                self.found.kinds["crash"] += 1
                dead = self._moved(state, index, ENDED, state.store)._replace(
                    crashes_left=state.crashes_left - 1
                )
                yield f"{name} ends before {_words(op)}", dead
                if state.late_left:
                    self.found.kinds["a request lands after its sender's end"] += 1
                    yield (
                        f"{name} ends, {_words(op)} on its way",
                        dead._replace(late=(*state.late, op), late_left=state.late_left - 1),
                    )
        for index, op in enumerate(state.late):
            store, _ = state.store.apply(op, self._at_s(op))
            rest = state.late[:index] + state.late[index + 1 :]
            yield f"late: {_words(op)}", state._replace(store=store, late=rest)

    def _at_s(self, op: Op) -> float:
        return 2 * NOW_S if self._scenario.is_young and isinstance(op.content, Intent) else NOW_S

    def _moved(self, state: State, index: int, place: Place, store: Store) -> State:
        places = (*state.places[:index], place, *state.places[index + 1 :])
        return state._replace(store=store, places=places)

    # programs

    def _op(self, place: Place) -> Op | None:
        """The next operation; None: the program has ended. Sleeping and asking the clock are no steps."""
        if place.program is None or place.program is promised:
            return None
        if place not in self._next:
            self._next[place] = self._asked(place)
        return self._next[place]

    def _asked(self, place: Place) -> Op | None:
        assert place.program is not None
        program = place.program(*place.arguments)
        try:
            op = next(program)
            for result in place.results:
                op = program.send(result)
        except StopIteration:
            return None
        return op

    def _step(self, place: Place, answer: Any) -> Place:
        key = (place, answer)
        if key not in self._after:
            self._after[key] = self._settled(place._replace(results=(*place.results, answer)))
        return self._after[key]

    def _settled(self, place: Place) -> Place:
        """Where a program stands when it next does something to the store."""
        while place.program is not None and place.program is not promised:
            program = place.program(*place.arguments)
            try:
                op = next(program)
                for result in place.results:
                    op = program.send(result)
            except StopIteration as end:
                place = Place(end.value.program, end.value.arguments) if end.value else ENDED
                continue
            if op.verb in (Verb.SLEEP, Verb.CLOCK):
                answer = NOW_S if op.verb == Verb.CLOCK else None
                place = place._replace(results=(*place.results, answer))
                continue
            return place
        return place


def _words(op: Op) -> str:
    content = f" {type(op.content).__name__}" if op.content is not None else ""
    return f"{op.verb} {op.key}{content}"


def broken_promise(state: State) -> str:
    """What a reader, or somebody who has pinned, would find broken now; empty: nothing."""
    found = dict(standing(state.store))
    for name, record in found.items():
        missing = missing_of(state.store, record)
        if missing:
            return f"{name} is committed (revision {record.revision}), and {missing[0]} is not there"
    if state.newest is not None and not any(name >= state.newest for name in found):
        return f"{state.newest} was the newest complete snapshot, and is gone"
    for place in state.places:
        if place.program is promised and place.arguments[0] not in found:
            return f"{place.arguments[0]} was pinned, and is gone"
    return ""


def left_over(store: Store) -> list[str]:
    """What is left that nothing names when everybody has ended here and a collector has looked often enough."""
    return unnamed(tidied(store, COLLECTOR, 4 * NOW_S))
