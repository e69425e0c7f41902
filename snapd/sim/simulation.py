"""One run: machines, store, network, trainers, faults and the truth about them, from one seed.

The same seed and settings give the same run, event by event: all chance comes from one generator, and nothing follows
the order of a set or of addresses.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from snapd.core.cluster import GroupTable
from snapd.core.ids import SnapshotId
from snapd.core.keyspace import Keyspace
from snapd.sim import crowd
from snapd.sim.clock import VirtualLoop
from snapd.sim.disk import Content
from snapd.sim.facts import BrokenPromise
from snapd.sim.machines import Machine
from snapd.sim.network import STORE, Network
from snapd.sim.parity import Plans
from snapd.sim.settings import Clock, SimSettings
from snapd.sim.store import Backup, SimStore
from snapd.sim.training import Training
from snapd.sim.truth import Truth

Result = TypeVar("Result")
TRACE_KEPT = 400
HEARD_AFTER_S = 1.0  # who came back so shortly ago may not have been heard when the table was rebuilt
WATCH_EVERY_S = 0.5
QUIET_EVENTS = ("table.overtaken", "newest.unwritten", "lease.left")


@dataclass(frozen=True, slots=True)
class Line:
    at_s: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at_s:9.3f}  {self.who:<6} {self.what}"


@dataclass(slots=True)
class Timing:
    """How long one kind of decision took, by a real clock; nothing without one."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)


class Simulation:
    """Build it, `boot` it, `run_for` some time, end with `close`."""

    def __init__(self, seed: int, settings: SimSettings, *, clock: Clock | None = None) -> None:
        self.seed, self.settings, self.bugs = seed, settings, settings.bugs
        self.rng = random.Random(f"snapd {seed}")
        self.loop = VirtualLoop()
        self.keys = Keyspace("sim")
        self.network = Network(self.loop, self.chance_of("network"))
        self.store = SimStore(self.loop, self.network)
        self.plans = Plans(settings.nodes)
        self.crowd = crowd.CrowdView(self.keys)
        self.truth = Truth(self)
        self.store.before_write.append(self.truth.about_to_write)
        self.arenas: dict[int, str] = {}  # of each daemon's instance
        self.trace: deque[Line] = deque(maxlen=TRACE_KEPT)
        self.timings: dict[str, Timing] = {}
        self.faults_done: dict[str, int] = {}
        self.noted_count = 0
        self.joined_s: dict[str, float] = {}
        self.store_was_replaced = False
        self.heard = 0  # newest generation of those who were there when a table was written since then
        self._first_handed: tuple[SnapshotId | None, int, float] = (None, -1, 0.0)
        self._clock = clock
        self._numbers = itertools.count(1)
        self._unheard: list[tuple[float, frozenset[str]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.machines = {
            machine.name: machine
            for machine in (
                Machine(self, f"n{i}", f"rack{i % settings.racks}" if settings.racks else f"n{i}")
                for i in range(settings.nodes)
            )
        }
        self.training = Training(self)

    # life of a run

    def boot(self) -> None:
        asyncio._set_running_loop(self.loop)
        for machine in self.machines.values():
            machine.start_daemon()
        if self.settings.is_crowd:
            crowd.admit(self)
        self.start(self.training.run())
        asyncio._set_running_loop(None)

    def start(self, work: Any) -> None:
        """Something outside of every daemon: trainers, faults."""
        task = self.loop.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.loop.call_exception_handler({"message": "a task failed", "exception": error})

    def run_for(self, seconds: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Raises BrokenPromise, and whatever else goes wrong in it."""
        self.loop.run_until(self.loop.now_s + seconds, is_over)

    def close(self) -> None:
        """Unwind what still runs; nothing has an effect any more."""
        self.loop.set_exception_handler(lambda *_: None)
        for machine in self.machines.values():
            machine.is_up = False
            if machine.daemon is not None:
                machine.daemon.life.end("at the end")
        for task in self._tasks:
            task.cancel()
        self.loop.failure = None
        self.loop.run_until(self.loop.now_s)
        left = asyncio.all_tasks(self.loop)
        assert not left, f"tasks that did not end: {sorted(task.get_name() for task in left)[:4]}"
        self.loop.close()

    # small things

    def chance_of(self, who: str) -> random.Random:
        """A generator of its own: what one part draws does not change what another one does."""
        return random.Random(f"snapd {self.seed} {who}")

    def next_number(self) -> int:
        return next(self._numbers)

    def random_id(self) -> str:
        return f"{self.rng.getrandbits(48):012x}"

    def note(self, who: str, what: str, *, is_repeated: bool = False) -> None:
        """A line of the trace. `is_repeated`: many nodes say the same; only changes are shown."""
        if is_repeated and any(line.what == what for line in itertools.islice(reversed(self.trace), 40)):
            return
        self.noted_count += 1
        self.trace.append(Line(self.loop.now_s, who, what))

    def noted(self, node: str, event: str, fields: Mapping[str, object]) -> None:
        """An event that a daemon would have logged."""
        if event == "cluster.joined":
            self.joined_s[node] = self.loop.now_s
        if event not in QUIET_EVENTS:
            shown = " ".join(f"{key}={value}" for key, value in fields.items())
            self.note(node, f"{event} {shown}", is_repeated=True)

    def timed(self, what: str, work: Callable[..., Result], *args: Any) -> Result:
        if self._clock is None:
            return work(*args)
        began_s = self._clock()
        try:
            return work(*args)
        finally:
            self.timings.setdefault(what, Timing()).add(self._clock() - began_s)

    def arrive(self, body: Content) -> Content | None:
        """A chunk's bytes after their way over the network; None: nothing came."""
        if not body:
            return None
        if self.network.bytes_bad and self.rng.random() < self.network.bytes_bad:
            return b"wrong" + body[5:]
        return body

    def is_reachable(self, node: str) -> bool:
        """Whether the agent that starts trainers gets through: as long as most other machines do."""
        if not self.machines[node].is_up or not self.network.cut:
            return self.machines[node].is_up
        others = [m.name for m in self.machines.values() if m.is_up and m.name != node]
        open_ = sum(self.network.is_open(node, o) and self.network.is_open(o, node) for o in others)
        return 2 * open_ >= len(others)

    # faults that are more than one object's matter

    def lose_machine(self, name: str) -> None:
        machine = self.machines[name]
        machine.lose()
        for trainer in self.training.trainers:
            if trainer.machine is machine:
                trainer.row.is_gone = True

    def replace_store(self, copy: Backup | None) -> None:
        """Wiped (None), or put back from a copy. Daemons that are away now cannot be asked when it is rebuilt."""
        self.store_was_replaced = True
        self.note(STORE, "is put back from a copy" if copy else "is wiped")
        self.store.put_back(copy)
        self.truth.recorded.clear()
        self.heard = 0

    def is_forgotten(self, generation: int) -> bool:
        """Whether every daemon that knew of a generation is away, or was lost: it may be given out again. Away is also
        who has not come back to a store that was replaced: an old copy calls him a member.
        """
        if not self.store_was_replaced:
            return False
        return generation > max(self.heard, self._known_by_members())

    def hear(self) -> None:
        """A table is written: whoever is there has said what he has seen, and may go."""
        self.heard = max(self.heard, self._known_by_members())

    def _known_by_members(self) -> int:
        """The newest generation of all who are in touch with the store, and have been for a moment."""
        return max(
            (
                self.truth.known_generation(machine.disk.arena_id)
                for machine in self.machines.values()
                if machine.is_serving
                and machine.daemon is not None
                and machine.daemon.state.away is None
                and not self._is_cut_off(machine.name)
                and self.keys.member(machine.name) in self.store.entries
                and self.loop.now_s - self.joined_s.get(machine.name, 0.0) > HEARD_AFTER_S
            ),
            default=0,
        )

    def _is_cut_off(self, node: str) -> bool:
        return not (self.network.is_open(node, STORE) and self.network.is_open(STORE, node))

    def still_knows(self, node: str, epoch: int, table: GroupTable) -> bool:
        """Whether a node acts upon this table now: its daemon runs, trusts the store and believes it."""
        daemon = self.machines[node].daemon
        if daemon is None or not daemon.life.is_alive or daemon.table is None:
            return False
        if daemon.state.away is not None or self._is_cut_off(node):
            return False
        return daemon.epoch == epoch and daemon.table.groups == table.groups

    # what scenarios wait for

    def is_protected_after(self, at_s: float) -> bool:
        """A snapshot that all trainers handed over after that moment is announced as protected."""
        newest = self.truth.announced
        if newest is None:
            return False
        if self._first_handed[:2] != (newest, self.truth.handed_count):
            lanes = (self.truth.handed.get((newest, rank)) for rank in range(self.settings.ranks))
            first = min((lane.at_s for lane in lanes if lane is not None), default=0.0)
            self._first_handed = newest, self.truth.handed_count, first
        return self._first_handed[2] > at_s

    def settled(self, at_s: float) -> SnapshotId | None:
        return self.truth.announced if self.is_protected_after(at_s) else None


@dataclass(slots=True)
class Outcome:
    """How a run went. `broken`: the promise, in words; empty if all were kept."""

    seed: int
    promise: str = ""
    broken: str = ""
    trace: list[str] = field(default_factory=list)
    node_faults: int = 0
    other_faults: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    events: int = 0
    virtual_s: float = 0.0
    steps: int = 0
    worlds: int = 0
    restores: int = 0
    refusals: int = 0
    fresh_starts: int = 0
    protected: int = 0


__all__ = ["BrokenPromise", "Line", "Outcome", "Simulation", "Timing"]
