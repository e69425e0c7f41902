"""The faults that the system must survive, and when they strike.

Within the code: of each group of the newest protected snapshot at most m nodes are lost until it is protected again
(`beyond_code` lifts that: then a restore must say what is missing). Everything else may strike at any moment, daemons
before any of their effects:

- crash     a daemon is killed, and started again a little later
- lose      a machine is gone with all its memory, and comes back empty, soon or after it was given up
- rack      all machines of a rack at once
- trainer   a trainer is killed
- cut       a machine is cut off: from all, from one half, one way only, or from the store only
- halves    the network falls apart into two halves
- drain     a node is to be emptied, and is taken back later
- store     the store is away for some time
- wipe, roll back   the store forgets everything, or what happened since a copy was made
- weather   messages are lost, repeated, late; chunks arrive with other bytes
- rollback  all trainers return to the newest snapshot
- leave     a machine is cut off from the store, and the agent starts the world again on others; the old trainers run
            on for some steps, those of that machine behind the others (only where it is asked for)

Counted as node-faults: crash, lose (also of a rack, each machine), trainer, cut (each machine on the smaller side),
leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from snapd.coordination.kv import Write
from snapd.sim.network import STORE, Weather

if TYPE_CHECKING:
    from snapd.sim.simulation import Simulation

NODE_FAULTS = ("crash", "lose", "trainer", "cut")
WEIGHTS = {
    "crash": 10,
    "lose": 8,
    "trainer": 6,
    "cut": 7,
    "rack": 2,
    "halves": 1,
    "drain": 1,
    "store": 2,
    "wipe": 1,
    "roll back": 1,
    "weather": 2,
    "rollback": 1,
    "leave": 4,
}
ASKED_FOR = ("leave",)


class Faults:
    """Strikes until `settings.faults` node-faults have been; `is_over` then, with everything mended."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._rng = sim.chance_of("faults")
        self._backup = sim.store.backup()
        self.is_over = False
        self.node_faults = 0
        self.by_kind: dict[str, int] = {}
        kinds = sim.settings.kinds or tuple(kind for kind in WEIGHTS if kind not in ASKED_FOR)
        self._kinds = [kind for kind in WEIGHTS if kind in kinds]
        self._weights = [WEIGHTS[kind] for kind in self._kinds]

    async def run(self) -> None:
        sim = self._sim
        strikes: dict[str, Callable[[], None]] = {
            "crash": self._crash,
            "lose": self._lose,
            "trainer": self._trainer,
            "cut": self._cut,
            "rack": self._rack,
            "halves": self._halves,
            "drain": self._drain,
            "store": self._store,
            "wipe": self._wipe,
            "roll back": self._roll_back_store,
            "weather": self._weather,
            "rollback": self._rollback,
            "leave": self._leave,
        }
        while self.node_faults < sim.settings.faults:
            await asyncio.sleep(self._rng.expovariate(1 / sim.settings.fault_every_s))
            if self._rng.random() < 0.05:
                self._backup = sim.store.backup()
            strikes[self._rng.choices(self._kinds, self._weights)[0]]()
        await asyncio.sleep(self._rng.random() * 3)
        self.mend()

    def mend(self) -> None:
        """The end of all faults: whoever is away comes back."""
        sim = self._sim
        sim.note("*", "all faults are over")
        sim.network.cut.clear()
        sim.network.weather = Weather()
        sim.network.bytes_bad = 0.0
        if not sim.store.is_up:
            sim.store.start()
        for machine in sim.machines.values():
            self._undrain(sim.keys.drain(machine.name))
            machine.come_back()
            if machine.daemon is not None and machine.daemon.life.is_alive:
                machine.daemon.life.crash_after = None
        self.is_over = True

    # which may be lost

    def may_be_lost(self, names: list[str]) -> bool:
        """Whether the newest protected snapshot is still there without these machines."""
        sim = self._sim
        if sim.settings.beyond_code:
            return True
        if sum(not m.is_up for m in sim.machines.values()) + len(names) > len(sim.machines) // 2:
            return False
        last = sim.truth.last_protection(sim.truth.newest_protected)
        arenas = {m.name: m.disk.arena_id for m in sim.machines.values()}
        return last is None or all(
            sum(node in names or arenas[node] != last.arenas[node] for node in nodes) <= m
            for nodes, m in last.groups
        )

    # what strikes

    def _count(self, kind: str, nodes: int) -> None:
        self.node_faults += nodes
        self.by_kind[kind] = self.by_kind.get(kind, 0) + max(1, nodes)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        self._sim.loop.call_later(seconds, lambda: None if self.is_over else work())

    def _pick(self, names: list[str]) -> str:
        return names[self._rng.randrange(len(names))]

    def _crash(self) -> None:
        sim = self._sim
        names = [machine.name for machine in sim.machines.values() if machine.is_serving]
        if names:
            name = self._pick(names)
            after = 0 if self._rng.random() < 0.2 else self._rng.randrange(1, 120)
            sim.note("*", f"{name}'s daemon will be killed before its {after}th next effect")
            sim.machines[name].crash_daemon(after, restart_after_s=0.1 + self._rng.random() ** 3 * 12)
            self._count("crash", 1)

    def _lose(self) -> None:
        sim = self._sim
        names = [m.name for m in sim.machines.values() if m.is_up and self.may_be_lost([m.name])]
        if names:
            self._lose_all([self._pick(names)])
            self._count("lose", 1)

    def _lose_all(self, names: list[str]) -> None:
        sim = self._sim
        long_s = sim.settings.lost_after_s * 2
        for name in names:
            sim.lose_machine(name)
            away_s = self._rng.random() * (3.0 if self._rng.random() < 0.5 else long_s)
            self._later(0.2 + away_s, sim.machines[name].come_back)

    def _rack(self) -> None:
        sim = self._sim
        racks = sorted({machine.domain for machine in sim.machines.values()})
        rack = self._pick(racks)
        names = [m.name for m in sim.machines.values() if m.domain == rack and m.is_up]
        if names and self.may_be_lost(names):
            self._lose_all(names)
            self._count("rack", len(names))

    def _trainer(self) -> None:
        sim = self._sim
        sim.training.kill(self._rng.randrange(sim.settings.ranks))
        self._count("trainer", 1)

    def _cut(self) -> None:
        """One machine is cut off, in one of several ways."""
        sim = self._sim
        name = self._pick(list(sim.machines))
        others = [other for other in sim.machines if other != name]
        way = self._rng.choice(["all", "half", "out", "in", "store"])
        if way == "half":
            others = self._rng.sample(others, (len(others) + 1) // 2)
        pairs: list[tuple[str, str]] = []
        for other in [STORE] if way == "store" else [*others, STORE]:
            if way != "in":
                pairs.append((name, other))
            if way != "out":
                pairs.append((other, name))
        sim.note("*", f"{name} is cut off: {way}")
        self._cut_for(pairs)
        self._count("cut", 1)

    def _cut_for(self, pairs: list[tuple[str, str]]) -> None:
        sim = self._sim
        fresh = [pair for pair in pairs if pair not in sim.network.cut]
        sim.network.cut.update(fresh)

        def mend() -> None:
            sim.note("*", "a cut is mended")
            sim.network.cut.difference_update(fresh)

        self._later(0.3 + self._rng.random() ** 2 * sim.settings.lost_after_s * 2, mend)

    def _halves(self) -> None:
        sim = self._sim
        names = list(sim.machines)
        few = self._rng.sample(names, max(1, len(names) // 2))
        many = [name for name in names if name not in few]
        with_store = self._rng.random() < 0.5
        one, other = (few, [*many, STORE]) if with_store else ([*few, STORE], many)
        sim.note("*", f"the network falls apart: {'+'.join(one)} and the others")
        self._cut_for([pair for a in one for b in other for pair in ((a, b), (b, a))])
        self._count("cut", len(few))

    def _drain(self) -> None:
        sim = self._sim
        name = self._pick(list(sim.machines))
        key = sim.keys.drain(name)
        if sim.store.is_up and key not in sim.store.entries:
            sim.note("*", f"{name} is drained")
            sim.store.transact("", [], [Write(key, b"1")])
            self._later(5 + self._rng.random() * 10, lambda: self._undrain(key))
            self._count("drain", 0)

    def _undrain(self, key: str) -> None:
        if self._sim.store.is_up and key in self._sim.store.entries:
            self._sim.store.transact("", [], [Write(key, None)])

    def _store(self) -> None:
        sim = self._sim
        if sim.store.is_up:
            sim.note(STORE, "goes away")
            sim.store.stop()
            self._later(0.5 + self._rng.random() ** 2 * 15, self._store_comes_back)
            self._count("store", 0)

    def _store_comes_back(self) -> None:
        if not self._sim.store.is_up:
            self._sim.note(STORE, "comes back")
            self._sim.store.start()

    def _wipe(self) -> None:
        self._sim.replace_store(None)
        self._count("wipe", 0)

    def _roll_back_store(self) -> None:
        self._sim.replace_store(self._backup)
        self._count("roll back", 0)

    def _weather(self) -> None:
        sim = self._sim
        chance = self._rng.random
        sim.note("*", "bad weather")
        sim.network.weather = Weather(
            loss=chance() * 0.1, repeat=chance() * 0.1, slow=chance() * 0.2, slow_s=0.2 + chance()
        )
        sim.network.bytes_bad = chance() * 0.1
        self._later(1 + chance() * 8, self._clear_up)
        self._count("weather", 0)

    def _clear_up(self) -> None:
        self._sim.network.weather, self._sim.network.bytes_bad = Weather(), 0.0

    def _leave(self) -> None:
        training = self._sim.training
        if training.is_running:
            name = training.trainers[self._rng.randrange(len(training.trainers))].machine.name
            self._sim.note("*", f"{name} is cut off from the store, and left behind")
            self._cut_for([(name, STORE), (STORE, name)])
            training.leave_behind(name)
            self._count("leave", 1)

    def _rollback(self) -> None:
        if self._sim.training.is_running:
            self._sim.training.roll_back()
            self._count("rollback", 0)
