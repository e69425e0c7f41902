"""Scenarios as text: what happens, in words, and below a line of dashes what followed, as it was when it was accepted.

```
cluster nodes=4 ranks=4 code=2+1      the first line; further: racks, slots, step_s
until protected                       a snapshot that was handed over after this moment is protected
until restored | complete | epoch | target
run 5                                 let 5 seconds go by
crash n1 | crash n1 after 7           kill its daemon, now or before its 7th next effect; it is started again
crash collector | crash planner       whoever that is now
lose n1 n2 | lose rack1               gone with all their memory
back n1                               a lost machine comes back, empty
cut n1 | cut n1 store | cut n1 out | cut n1 in | cut n1+n2       from all, the store, one way, as a part
mend
store away | back | wiped | copied | rolled-back
kill 2                                the trainer of rank 2
rollback                              all trainers return to the newest snapshot
move                                  the next world starts on other machines
drain n1 | undrain n1
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from snapd.coordination.kv import Write
from snapd.core.cluster import Code
from snapd.sim.network import STORE
from snapd.sim.settings import SimSettings
from snapd.sim.simulation import Simulation
from snapd.sim.store import Backup

SEED = 1
PATIENCE_S = 120.0
RULE = "-" * 40
HIDDEN = ("send", "job.", "newest.", "member.absent")


class ScenarioError(Exception):
    """A line that cannot be read, or whose `until` did not come."""


@dataclass(slots=True)
class Scenario:
    """One run of one text. `lines` is the trace, with the commands in it."""

    sim: Simulation
    lines: list[str] = field(default_factory=list)
    copy: Backup | None = None
    _shown: int = 0

    def do(self, command: str) -> None:
        words = command.split()
        act = self._commands().get(words[0])
        if act is None:
            raise ScenarioError(f"unknown command: {command}")
        self.lines.append(f"> {command}")
        act(words[1:])
        self._show()

    def _commands(self) -> dict[str, Callable[[list[str]], None]]:
        return {
            "run": lambda words: self.sim.run_for(float(words[0])),
            "until": self._until,
            "crash": self._crash,
            "lose": self._lose,
            "back": lambda words: self.sim.machines[words[0]].come_back(),
            "cut": self._cut,
            "mend": lambda _: self.sim.network.cut.clear(),
            "store": self._store,
            "kill": lambda words: self.sim.training.kill(int(words[0])),
            "rollback": lambda _: self.sim.training.roll_back(),
            "move": lambda _: setattr(self.sim.training, "move_ranks", 1.0),
            "drain": lambda words: self._drain(words[0], b"1"),
            "undrain": lambda words: self._drain(words[0], None),
        }

    def _show(self) -> None:
        """What the run has noted since; times to the second, so that small delays do not matter."""
        trace = list(self.sim.trace)
        new = trace[-(self.sim.noted_count - self._shown) :] if self.sim.noted_count > self._shown else []
        self._shown = self.sim.noted_count
        for line in new:
            if not line.what.startswith(HIDDEN):
                self.lines.append(f"{line.at_s:6.0f}  {line.who:<5}  {line.what}")

    # waiting

    def _until(self, words: list[str]) -> None:
        sim, truth = self.sim, self.sim.truth
        at_s = sim.loop.now_s
        complete, restores = truth.captured, truth.commits
        epochs, targets = len(truth.tables), truth.targets
        tests: dict[str, Callable[[], bool]] = {
            "protected": lambda: sim.is_protected_after(at_s),
            "complete": lambda: truth.captured is not complete,
            "restored": lambda: truth.commits > restores,
            "epoch": lambda: len(truth.tables) > epochs,
            "target": lambda: truth.targets > targets,
        }
        sim.run_for(PATIENCE_S, tests[words[0]])
        if not tests[words[0]]():
            raise ScenarioError(f"not {words[0]} within {PATIENCE_S:.0f} s")

    # faults

    def _who(self, word: str) -> str:
        if word in self.sim.machines:
            return word
        for machine in self.sim.machines.values():
            daemon = machine.daemon
            if daemon is None or not machine.is_serving:
                continue
            if (word == "collector" and daemon.collector is not None) or (
                word == "planner" and daemon.state.is_planner
            ):
                return machine.name
        raise ScenarioError(f"there is no {word}")

    def _crash(self, words: list[str]) -> None:
        after = int(words[2]) if len(words) > 2 else 0
        self.sim.machines[self._who(words[0])].crash_daemon(after, restart_after_s=1.0)
        self.sim.run_for(0.0)

    def _lose(self, words: list[str]) -> None:
        for word in words:
            rack = [m.name for m in self.sim.machines.values() if m.domain == word]
            for name in rack or [self._who(word)]:
                self.sim.lose_machine(name)
        self.sim.run_for(0.0)

    def _cut(self, words: list[str]) -> None:
        part = words[0].split("+")
        way = words[1] if len(words) > 1 else "all"
        others = [STORE] if way == "store" else [STORE, *(n for n in self.sim.machines if n not in part)]
        for node in part:
            for other in others:
                if way != "in":
                    self.sim.network.cut.add((node, other))
                if way != "out":
                    self.sim.network.cut.add((other, node))

    def _store(self, words: list[str]) -> None:
        sim = self.sim
        acts: dict[str, Callable[[], None]] = {
            "away": sim.store.stop,
            "back": sim.store.start,
            "wiped": lambda: sim.replace_store(None),
            "copied": self._copy_store,
            "rolled-back": lambda: sim.replace_store(self.copy),
        }
        acts[words[0]]()

    def _copy_store(self) -> None:
        self.copy = self.sim.store.backup()

    def _drain(self, node: str, value: bytes | None) -> None:
        self.sim.store.transact("", [], [Write(self.sim.keys.drain(node), value)])


def run_text(text: str, *, seed: int = SEED) -> list[str]:
    """Run a scenario; return the trace.

    Raises:
        ScenarioError, BrokenPromise.
    """
    commands = [line for line in _script(text) if line and not line.startswith("#")]
    if not commands or not commands[0].startswith("cluster"):
        raise ScenarioError("a scenario begins with its cluster")
    sim = Simulation(seed, _settings(commands[0].split()[1:]))
    sim.training.move_ranks = 0.0
    scenario = Scenario(sim)
    try:
        sim.boot()
        for command in commands[1:]:
            scenario.do(command)
    finally:
        sim.close()
    return scenario.lines


def parts_of(text: str) -> tuple[str, list[str]]:
    """(the script with its rule, the accepted trace)."""
    script, _, trace = text.partition(RULE + "\n")
    return script, trace.splitlines()


def _script(text: str) -> list[str]:
    return [line.strip() for line in parts_of(text)[0].splitlines()]


def _settings(words: list[str]) -> SimSettings:
    values = dict(word.split("=", 1) for word in words)
    known: dict[str, Callable[[str], object]] = {
        "nodes": int,
        "ranks": int,
        "racks": int,
        "slots": int,
        "ranks_per_node_max": int,
        "step_s": float,
        "code": Code.parse,
        "chunks": lambda text: tuple(int(word) for word in text.split(",")),
    }
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ScenarioError(f"unknown: {', '.join(unknown)}")
    return SimSettings(**{name: known[name](text) for name, text in values.items()})  # type: ignore[arg-type]
