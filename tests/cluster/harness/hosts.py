"""Hosts of a test: N network namespaces with real addresses on one bridge, or as many loopback addresses.

Both ways have the same interface, so that a test that needs no network faults runs on any machine. Everything that is
started on a host carries its marker in the environment: `kill_everything` ends what is there, as a power cut would.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "SNAPD_TEST_HOST"
PREFIX = "snapdt"
NETWORK = "10.220.0"
COMMAND_S = 30.0
END_S = 10.0


def can_have_namespaces() -> bool:
    """Whether this process may make network namespaces with addresses of their own."""
    tools = all(shutil.which(tool) for tool in ("ip", "nsenter"))
    return sys.platform == "linux" and os.geteuid() == 0 and tools and _made_one()


def _made_one() -> bool:
    name = f"{PREFIX}-{os.getpid()}-try"
    made = (
        subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=COMMAND_S).returncode == 0
    )
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=COMMAND_S, check=True)
    return made


def run(*command: str, check: bool = True) -> str:
    """The standard output of a short command; RuntimeError with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Host:
    """One machine of the test. `namespace` is empty in loopback mode."""

    name: str
    address: str
    interface: str
    namespace: str
    marker: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return (
            ["nsenter", f"--net=/run/netns/{self.namespace}", *command] if self.namespace else list(command)
        )

    def run(self, *command: str, check: bool = True) -> str:
        return run(*self.command(*command), check=check)

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process that dies with this one, its output appended to `log`."""
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*guard, *self.command(*command)],
                env={**os.environ, **env, MARKER: self.marker},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=cwd,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Processes that were started on this host, and their children."""
        return pids_with(MARKER, self.marker)

    def kill_everything(self) -> int:
        """SIGKILL to all that runs here; returns how many there were. They are gone when this returns."""
        return kill_all(self.pids, self.reap)

    def reap(self) -> None:
        self.started = [process for process in self.started if process.poll() is None]

    def free_port(self) -> int:
        """A port that nobody listens on at the moment."""
        if self.namespace:
            port = self.run(
                sys.executable,
                "-c",
                "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])",
            )
            return int(port)
        with socket.socket() as probe:
            probe.bind((self.address, 0))
            return int(probe.getsockname()[1])


def kill_all(find: Callable[[], list[int]], reap: Callable[[], None]) -> int:
    """SIGKILL to what `find` finds until it finds nothing; returns how many there were."""
    killed: set[int] = set()
    until = time.monotonic() + END_S
    while pids := find():
        if time.monotonic() > until:
            raise TimeoutError(f"still there after SIGKILL: {pids}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= set(pids)
        reap()
        time.sleep(0.005)
    reap()
    return len(killed)


def pids_with(variable: str, value: str) -> list[int]:
    """Living processes with this variable in the environment that they were started with."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except OSError:
            continue  # it ended, or is not ours
    return found


class Hosts:
    """N hosts, named n1..nN, and one more for what is no node of the cluster (etcd).

    `up` and `down` may be called again; `down` kills what still runs on the hosts.
    """

    def __init__(self, count: int, *, is_namespaced: bool | None = None) -> None:
        self.is_namespaced = can_have_namespaces() if is_namespaced is None else is_namespaced
        self.run_id = str(os.getpid())
        self._switch = f"{PREFIX}-{self.run_id}-sw"
        names = [*(f"n{number}" for number in range(1, count + 1)), "store"]
        everyone = [self._host(name, number) for number, name in enumerate(names, 1)]
        self.nodes, self.store = everyone[:-1], everyone[-1]

    def _host(self, name: str, number: int) -> Host:
        marker = f"{self.run_id}/{name}"
        if self.is_namespaced:
            return Host(name, f"{NETWORK}.{number}", "eth0", f"{PREFIX}-{self.run_id}-{name}", marker)
        pid = os.getpid()
        return Host(name, f"127.{1 + pid // 250 % 250}.{1 + pid % 250}.{number}", "lo", "", marker)

    @property
    def all(self) -> list[Host]:
        return [*self.nodes, self.store]

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.all if host.name == name)

    def __enter__(self) -> Hosts:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        if not self.is_namespaced:
            return
        _sweep()
        self.down()
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in self.all:
            port = f"v-{host.name}"
            inside = ("ip", "-n", host.namespace)
            run("ip", "netns", "add", host.namespace)
            run("ip", "link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", "eth0",
                "netns", host.namespace)  # fmt: skip
            run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
            run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "link", "set", "lo", "up")

    def down(self) -> None:
        for host in self.all:
            host.kill_everything()
        if self.is_namespaced:
            _remove(f"{PREFIX}-{self.run_id}-")

    def port_of(self, host: Host) -> tuple[str, str]:
        """(namespace, interface) of the bridge's port to a host."""
        return self._switch, f"v-{host.name}"


def _namespaces() -> Iterator[str]:
    for line in run("ip", "netns", "list").splitlines():
        if line.startswith(f"{PREFIX}-"):
            yield line.split()[0]


def _remove(prefix: str) -> None:
    for name in list(_namespaces()):
        if name.startswith(prefix):
            run("ip", "netns", "del", name)


def _sweep() -> None:
    """Remove what runs left that were themselves killed."""
    for owner in {name.split("-")[1] for name in _namespaces()}:
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(f"{PREFIX}-{owner}-")
