"""The kinds of rounds: each kills or stops something, then holds the result against what was promised."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

from scene import START_S, Scene, Wrong
from worlds import World, wait_until

ROOT = Path(__file__).resolve().parents[2]
_CLIENT_POINT = re.compile(r"""\bpoint\(\s*["'](client\.[a-z0-9_.]+)["']""")
_DAEMON_POINT = re.compile(r"""["'](daemon\.[a-z0-9_]+\.(?:before|after))["']""")
_ONCE = (
    "imported", "restore", "rollback", "generation", "reserve", "session", "segment", "plan", "parent",
    "finish", "daemon.fence",
)  # fmt: skip
SETTLE_S = 0.05


CLUSTER_POINTS = ("daemon.protect.", "daemon.bring.", "daemon.repair.")  # passed only where worlds span nodes


def named_points(side: str) -> list[str]:
    """All fault points of one machine in the sources of "client" or "daemon": one that is added is tested by itself."""
    folder, pattern = {
        "client": (ROOT / "client" / "snapd_client", _CLIENT_POINT),
        "daemon": (ROOT / "snapd" / "runtime", _DAEMON_POINT),
    }[side]
    found: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        found |= set(pattern.findall(path.read_text()))
    return sorted(point for point in found if not point.startswith(CLUSTER_POINTS))


def is_once(point: str) -> bool:
    """Points that a process, or a start of the job, passes once."""
    return any(word in point for word in _ONCE)


def _finish(scene: Scene, job: str, ranks: int) -> int:
    """Start the job again and check what it goes on from; leaves no trainer behind."""
    before = scene.observer.reported(job)
    world = scene.start(job, ranks=ranks)
    start = scene.check_restored(world, before)
    if start < scene.steps - 3:
        scene.wait_reported_beyond(job, before)
    scene.end(world)
    return start


def _warm(scene: Scene, job: str, ranks: int) -> World:
    """A world whose first snapshots are complete."""
    before = scene.observer.reported(job)
    world = scene.start(job, ranks=ranks)
    scene.check_restored(world, before)
    scene.wait_reported_beyond(job, before)
    return world


class Random:
    """SIGKILL or SIGSTOP/SIGCONT at random moments, the job going on from round to round."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.chance = scene, random.Random(seed)
        self.job, self.ranks = scene.new_job(), 2

    def next_job(self) -> None:
        """A new job once this one is near its end."""
        if self.scene.observer.reported(self.job)[1] > self.scene.steps * 2 // 3:
            self.scene.remove(self.job)
            self.job = self.scene.new_job()
            self.ranks = self.chance.choice((1, 2))

    def kill_all(self, *, during: str = "training") -> str:
        """Every rank at one moment of its start, its restore, or its training."""
        return self._kill_ranks(during, everyone=True)

    def kill_one(self, *, during: str = "training") -> str:
        """One rank; the others are ended as a launcher would, a moment later."""
        return self._kill_ranks(during, everyone=False)

    def _kill_ranks(self, during: str, everyone: bool) -> str:
        scene, chance = self.scene, self.chance
        self.next_job()
        before = scene.observer.reported(self.job)
        world = scene.start(self.job, ranks=self.ranks, rollback_every=chance.choice((0, 10)))
        if during == "start":
            time.sleep(chance.random() * 0.6)
        elif during == "restore":
            wait_until(
                lambda: "starting" not in {r.beat()[1] for r in world.ranks}, START_S, "a restore", world.tail
            )
            time.sleep(chance.random() * 0.02)
        else:
            scene.check_restored(world, before)
            time.sleep(chance.random() * 0.4)
        phase = scene.note_phase(world)
        victims = world.ranks if everyone else [chance.choice(world.ranks)]
        for rank in victims:
            rank.signal(signal.SIGKILL)
        if not everyone:
            time.sleep(chance.random() * 0.1)
            world.kill()
        world.wait_gone()
        if not any(rank.status == -signal.SIGKILL for rank in world.ranks) and not _ended_well(world):
            raise Wrong(f"no rank was killed: {[rank.status for rank in world.ranks]}")
        scene.check_log(world)
        _finish(scene, self.job, self.ranks)
        return phase

    def kill_daemon(self, times: int = 1) -> str:
        """The daemon, while the ranks train; they go on, and its successor finds what was captured."""
        scene, chance = self.scene, self.chance
        self.next_job()
        world = _warm(scene, self.job, self.ranks)
        phase = ""
        for _ in range(times):
            time.sleep(chance.random() * 0.15)
            phase = scene.note_phase(world)
            scene.restart_daemon()
            before = scene.observer.reported(self.job)
            self._goes_on(world, before)
        scene.end(world)
        _finish(scene, self.job, self.ranks)
        return phase

    def stop_and_continue(self, what: str) -> str:
        """SIGSTOP, a while, SIGCONT: of all ranks, of one, or of the daemon."""
        scene, chance = self.scene, self.chance
        self.next_job()
        world = _warm(scene, self.job, self.ranks)
        time.sleep(chance.random() * 0.1)
        phase = scene.note_phase(world)
        pids = {
            "daemon": [scene.node.pid],
            "all": [rank.pid for rank in world.ranks],
            "one": [chance.choice(world.ranks).pid],
        }[what]
        with scene.stopped(pids, 0.1 + chance.random()):
            before = scene.observer.reported(self.job)
        self._goes_on(world, before)
        scene.end(world)
        _finish(scene, self.job, self.ranks)
        return phase

    def _goes_on(self, world: World, before: tuple[int, int]) -> None:
        """No trainer fell, and new snapshots become complete (unless the run is over)."""
        scene = self.scene

        def lives() -> bool:
            if any(rank.status not in (None, 0) for rank in world.ranks):
                raise Wrong(f"a trainer fell:\n{world.tail()}\n{scene.node.tail()}")
            return scene.observer.reported(world.job) > before or _ended_well(world)

        wait_until(lives, START_S, f"new snapshots after {before}", world.tail, scene.node.tail)

    def zombie(self, steps_meanwhile: int = 20) -> str:
        """A whole world is stopped, a new one goes on, and the old one wakes up and goes on writing."""
        scene, chance = self.scene, self.chance
        self.next_job()
        old = _warm(scene, self.job, self.ranks)
        time.sleep(chance.random() * 0.1)
        phase = scene.note_phase(old)
        with scene.stopped([rank.pid for rank in old.ranks], 0.0):
            before = scene.observer.reported(self.job)
            new = scene.start(self.job, ranks=self.ranks)
            start = scene.check_restored(new, before)
            scene.wait_reported_beyond(self.job, before)
        at_wake = old.step()
        wait_until(
            lambda: old.step() > at_wake + 5 or not old.is_whole, START_S, "steps of the zombie", old.tail
        )
        scene.reach_step(new, min(start + steps_meanwhile, scene.steps))
        scene.end(new)
        _finish(scene, self.job, self.ranks)  # while the zombie still writes
        scene.end(old)
        return phase


def _ended_well(world: World) -> bool:
    return all(rank.status == 0 for rank in world.ranks)


def client_point(
    scene: Scene, point: str, *, count: int, ranks: int = 1, victim: int = 0, action: str = "kill"
) -> None:
    """A trainer reaches `point` for the `count`-th time and is killed (or stopped, and killed later)."""
    job = scene.new_job()
    world = _warm(scene, job, ranks)
    scene.end(world)
    before = scene.observer.reported(job)
    is_hurried = "fence" in point  # passed only where the copy is not over before the fence
    world = scene.start(job, ranks=ranks, points={victim: f"{point}:{count}={action}"}, is_hurried=is_hurried)
    rank = world.ranks[victim]
    if action == "stop":
        _wait_stopped(rank.pid, point)
        time.sleep(SETTLE_S)
        rank.signal(signal.SIGCONT)
        scene.check_restored(world, before)
        scene.wait_reported_beyond(job, before)
    else:
        what = f"the {count}th passage of point {point}"
        wait_until(lambda: rank.status is not None, START_S, what, world.tail, scene.node.tail)
        if rank.status != -signal.SIGKILL:
            raise Wrong(
                f"point {point} did not fire: status {rank.status}\n{world.tail()}\n{scene.node.tail()}"
            )
    scene.phases[f"point {point}"] += 1
    scene.end(world)
    _finish(scene, job, ranks)
    scene.remove(job)


def _wait_stopped(pid: int, point: str) -> None:
    def is_stopped() -> bool:
        text = Path(f"/proc/{pid}/stat").read_text()
        return text[text.rindex(")") + 2] == "T"

    wait_until(is_stopped, START_S, f"point {point}: the process did not stop")


def daemon_point(scene: Scene, point: str, *, count: int, ranks: int = 1) -> None:
    """The daemon reaches `point` for the `count`-th time and dies; its successor serves what was captured."""
    job = scene.new_job()
    if "segment" not in point:  # segments are made for a new job
        world = _warm(scene, job, ranks)
        scene.end(world)
    scene.node.stop()
    worlds: list[World] = []
    if _starts_armed(scene, f"{point}:{count}=kill"):
        if "fence" in point:  # an older generation is there to be fenced
            worlds.append(_warm(scene, job, ranks))
        worlds.append(_until_daemon_dies(scene, job, f"{point}:{count}", ranks))
    scene.phases[f"point {point}"] += 1
    before = scene.observer.reported(job)
    scene.node.start()
    if len(worlds) == 1:
        _outlive(scene, worlds[0], before)
    for world in reversed(worlds):
        scene.end(world)
    _finish(scene, job, ranks)
    scene.remove(job)


def _starts_armed(scene: Scene, points: str) -> bool:
    """Start the daemon; False: the point was reached while it took up what it had found, and it died."""
    try:
        scene.node.start(env={"SNAPD_FAULT_POINTS": points})
    except RuntimeError:
        if scene.node.status_of_process() != -signal.SIGKILL:
            raise
        return False
    return True


def _until_daemon_dies(scene: Scene, job: str, point: str, ranks: int) -> World:
    """Start a world and wait for the armed daemon's death."""
    node = scene.node
    world = scene.start(job, ranks=ranks)
    what = f"the daemon's death at {point}"
    wait_until(lambda: node.status_of_process() is not None, START_S, what, world.tail, node.tail)
    if node.status_of_process() != -signal.SIGKILL:
        raise Wrong(f"point {point} did not fire: status {node.status_of_process()}\n{node.tail()}")
    node.forget()
    return world


def _outlive(scene: Scene, world: World, before: tuple[int, int]) -> None:
    """The trainers go on, snapshots become complete again; one that was just starting may have given up."""

    def is_settled() -> bool:
        fallen = [rank for rank in world.ranks if rank.status not in (None, 0)]
        if fallen:
            late = [rank for rank in fallen if rank.events("restored")]
            if late:
                text = f"{world.tail()}\n{scene.node.tail()}"
                raise Wrong(f"a trainer fell in its loop because the daemon died:\n{text}")
            return True
        return scene.observer.reported(world.job) > before or _ended_well(world)

    wait_until(is_settled, START_S, "snapshots after the daemon's return", world.tail, scene.node.tail)
