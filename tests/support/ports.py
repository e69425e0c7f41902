"""Ports of one's own for servers that tests start. Runs side by side on one machine never get the same ones.

A set of ports is reserved by the name of a socket in the abstract namespace, which, like the ports themselves, belongs
to the network namespace and ends with the process. Whether somebody else has one of the ports is seen by binding it;
who takes it between that and the server's start is found by the caller, who then asks for another set.
"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

FIRST, END = (
    12_000,
    22_000,
)  # they, and those `beside` them, lie below what Linux hands out by itself (from 32,768)
SET_PORTS = 8
HOST = "127.0.0.1"
_LISTENS = "0A"


class PortSet:
    """Reserved until `close`, or until this process ends."""

    def __init__(self, first: int, lock: socket.socket) -> None:
        self.first = first
        self._lock = lock

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < SET_PORTS:
            raise IndexError(index)
        return self.first + index

    def close(self) -> None:
        self._lock.close()


def reserve(*, beside: int = 0) -> PortSet:
    """A set of which every port is free now, and so is each one that lies `beside` higher."""
    firsts = list(range(FIRST, END, SET_PORTS))
    random.SystemRandom().shuffle(firsts)
    for first in firsts:
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lock.bind(f"\0snapd-test-ports-{first}")
        except OSError as error:
            lock.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        offsets = (0, beside) if beside else (0,)
        if all(is_free(first + index + offset) for index in range(SET_PORTS) for offset in offsets):
            return PortSet(first, lock)
        lock.close()
    raise AssertionError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def listens(pid: int, port: int) -> bool:
    """Whether that process, and not another one, listens on the port."""
    wanted = f":{port:04X}"
    sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == _LISTENS:
                sockets.add(f"socket:[{fields[9]}]")
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(descriptor.readlink()) in sockets:
                return True
        except FileNotFoundError:
            continue
    return False
