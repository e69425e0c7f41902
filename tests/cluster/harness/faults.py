"""Faults of the network and of peers. Every one checks that it happened, and ends with its `with` block.

They need hosts that are network namespaces, iptables, tc, and for delays the Python package NetfilterQueue.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.daemon import BULK_PORT, PORT, ClusterDaemon
from tests.cluster.harness.hosts import Host
from tests.support.waiting import wait_for

DELAYER = Path(__file__).with_name("delay.py")
HAPPENS_S = 30.0
DAEMON_PORTS = (PORT, BULK_PORT)


def can_cut() -> bool:
    return shutil.which("iptables") is not None and shutil.which("tc") is not None


def can_delay() -> bool:
    return can_cut() and importlib.util.find_spec("netfilterqueue") is not None


@dataclass(frozen=True)
class Cut:
    """Packets that arrive at `at` from `source` are dropped. `ports`: only TCP to or from these; empty: all."""

    at: Host
    source: Host
    ports: tuple[int, ...] = ()

    def rules(self) -> list[list[str]]:
        base = ["INPUT", "-s", self.source.address]
        if not self.ports:
            return [[*base, "-j", "DROP"]]
        listed = ",".join(map(str, self.ports))
        tcp = [*base, "-p", "tcp", "-m", "multiport"]
        return [[*tcp, option, listed, "-j", "DROP"] for option in ("--dports", "--sports")]

    def begin(self) -> None:
        for rule in self.rules():
            self.at.run("iptables", "-w", "-I", *rule)

    def end(self) -> None:
        for rule in self.rules():
            self.at.run("iptables", "-w", "-D", *rule)

    def dropped(self) -> int:
        """Packets that it has stopped."""
        found = 0
        for line in self.at.run("iptables", "-w", "-nvxL", "INPUT").splitlines():
            words = line.split()
            if len(words) > 7 and words[2] == "DROP" and words[7] == self.source.address:
                found += int(words[0])
        return found


@contextlib.contextmanager
def cuts(*sides: Sequence[Cut]) -> Iterator[None]:
    """These cuts together; at the end of the block some packet must have been dropped on each of the sides."""
    assert sides and all(sides)
    chosen = [cut for side in sides for cut in side]
    begun: list[Cut] = []
    try:
        for cut in chosen:
            cut.begin()
            begun.append(cut)
        yield
        wait_for(
            lambda: all(any(cut.dropped() for cut in side) for side in sides),
            "packets are dropped on every side of the cut",
            HAPPENS_S,
            lambda: "; ".join(f"{cut.at.name} from {cut.source.name}: {cut.dropped()}" for cut in chosen),
        )
    finally:
        for cut in begun:
            cut.end()


def partition(
    one: Iterable[Host], other: Iterable[Host], *, ports: tuple[int, ...] = ()
) -> contextlib.AbstractContextManager[None]:
    """Nothing passes between the two sets, in either direction."""
    pairs = [(a, b) for a in one for b in other]
    return cuts([Cut(a, b, ports) for a, b in pairs], [Cut(b, a, ports) for a, b in pairs])


def one_way_loss(
    source: Host, targets: Iterable[Host], *, ports: tuple[int, ...] = ()
) -> contextlib.AbstractContextManager[None]:
    """What `source` sends to the targets is lost; what they send arrives."""
    return cuts(*([Cut(target, source, ports)] for target in targets))


@contextlib.contextmanager
def delay(host: Host, seconds: float, log: Path) -> Iterator[None]:
    """Every TCP packet that arrives at `host` is held back for so long."""
    rule = ["INPUT", "-i", host.interface, "-j", "NFQUEUE", "--queue-num", "1", "--queue-bypass"]
    process = host.start([sys.executable, str(DELAYER), str(seconds)], env={}, log=log)
    try:
        wait_for(lambda: log.exists() and "ready" in log.read_text(), "the delayer is ready", HAPPENS_S)
        host.run("iptables", "-w", "-I", *rule)
        try:
            yield
        finally:
            host.run("iptables", "-w", "-D", *rule)
    finally:
        process.terminate()
        process.wait(10)
    held = re.findall(r"held (\d+)", log.read_text())
    assert held and int(held[-1]) > 0, f"no packet was held back: {log.read_text()[-500:]}"


@contextlib.contextmanager
def rate_limit(host: Host, bits_per_s: int) -> Iterator[None]:
    """What `host` sends is shaped to a rate; at the end something must have had to wait or was dropped by it."""
    shape = ["tbf", "rate", f"{bits_per_s}bit", "burst", "64kb", "latency", "100ms"]
    host.run("tc", "qdisc", "add", "dev", host.interface, "root", *shape)
    try:
        yield
        said = host.run("tc", "-s", "qdisc", "show", "dev", host.interface)
        counts = re.search(r"dropped (\d+), overlimits (\d+)", said)
        assert counts and int(counts[2]) > 0, f"the limit was never reached: {said}"
    finally:
        host.run("tc", "qdisc", "del", "dev", host.interface, "root")


@contextlib.contextmanager
def stalled(daemon: ClusterDaemon) -> Iterator[None]:
    """The daemon keeps its connections and says nothing more."""
    daemon.freeze()
    try:
        yield
    finally:
        daemon.thaw()


def corrupt(
    daemon: ClusterDaemon, job: str, *, files: str = "rank-*.seg-*", seed: int = 0, count: int = 0
) -> int:
    """Turn bytes of a job's segments over, on the daemon's own memory, behind its back.

    `count`: how many places per file; 0: one in every 4 KiB. Returns how many bytes were turned.
    """
    chance = random.Random(seed)
    turned = 0
    for path in sorted((daemon.arena / "jobs" / job).glob(files)):
        nbytes = path.stat().st_size
        with path.open("r+b") as segment:
            places = (
                range(0, nbytes, 4096) if count == 0 else [chance.randrange(nbytes) for _ in range(count)]
            )
            for place in places:
                segment.seek(place)
                (byte,) = segment.read(1)
                segment.seek(place)
                segment.write(bytes([byte ^ 0x5A]))
                turned += 1
    assert turned, f"{daemon.node} has no {files} of {job}"
    return turned


def connections_between(one: Host, other: Host) -> int:
    """Established TCP connections, as the first host sees them."""
    said = one.run("ss", "-Htn", "state", "established", "dst", other.address, check=False)
    return len(said.splitlines())


def wait_unheard(daemons: Sequence[ClusterDaemon], node: str, timeout_s: float = HAPPENS_S) -> float:
    """Wait until these daemons count a node as not living; returns how long it took."""
    began = time.monotonic()

    def is_unheard() -> bool:
        rows = [row for daemon in daemons for row in daemon.status().cluster.nodes if row.node == node]
        return bool(rows) and all(row.state != "living" for row in rows)

    wait_for(is_unheard, f"{node} is missed", timeout_s, every_s=0.1)
    return time.monotonic() - began
