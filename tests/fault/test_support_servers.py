"""What the other tests stand on: servers of several runs side by side never meet on a port."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support import ports, seaweed


def taken(port: int) -> socket.socket:
    held = socket.socket()
    held.bind((ports.HOST, port))
    held.listen()
    return held


def test_sets_that_are_reserved_have_nothing_in_common() -> None:
    sets = [ports.reserve(beside=10_000) for _ in range(20)]
    all_ports = {one[index] for one in sets for index in range(ports.SET_PORTS)}
    assert len(all_ports) == 20 * ports.SET_PORTS
    for one in sets:
        one.close()


def test_a_set_whose_neighbours_are_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ports.reserve(beside=10_000)
    wanted.close()
    monkeypatch.setattr(ports, "FIRST", wanted.first)
    monkeypatch.setattr(ports, "END", wanted.first + 2 * ports.SET_PORTS)
    with taken(wanted[3] + 10_000):
        found = ports.reserve(beside=10_000)
    assert found.first == wanted.first + ports.SET_PORTS
    found.close()


def test_a_server_begins_elsewhere_when_its_port_is_taken_in_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweed.require_weed()
    unlucky = ports.reserve(beside=10_000)
    sets = [unlucky, ports.reserve(beside=10_000)]
    monkeypatch.setattr(seaweed, "reserve", lambda beside: sets.pop(0))
    monkeypatch.setattr(seaweed, "STARTED_WITHIN_S", 8.0)
    with taken(unlucky[0]) as held, seaweed.running(tmp_path) as server:
        assert sets == [] and server.port != held.getsockname()[1]
        assert ports.listens(server.pid, server.port) and not ports.listens(os.getpid(), server.port)
        assert ports.listens(os.getpid(), held.getsockname()[1])
