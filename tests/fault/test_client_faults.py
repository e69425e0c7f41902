"""The trainer's side when something around it fails: the daemon dies or hangs, the process forks or just ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snapd_client import CaptureError, ConfigError, Snapshotter

from demo.node import Node
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("SNAPD_AUTOSTART", "0")
    with Node("snapd-test-client") as node:
        for name, value in node.env().items():
            monkeypatch.setenv(name, value)
        yield node


class Loop:
    """A small training loop, step by step."""

    def __init__(self, job: str = "loop", seed: int = 1, **options: object) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 64)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state: dict[str, object] = {"model": self.model, "optimizer": self.optimizer}
        self.snap = Snapshotter(self.state, job=job, **options)  # type: ignore[arg-type]
        self.start = self.snap.restore()
        self.step_number = self.start

    def step(self) -> float:
        """One step; returns how long the call of snap.step took."""
        self.model(torch.randn(8, 64)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        started = time.monotonic()
        self.snap.step(self.step_number)
        return time.monotonic() - started

    def weights(self) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in self.model.parameters()]


def test_the_loop_does_not_notice_a_daemon_that_is_killed_and_restarted(node: Node) -> None:
    loop = Loop()
    for _ in range(3):
        loop.step()
    assert loop.snap.wait() == "captured"
    node.kill()
    during = [loop.step() for _ in range(5)]
    wait_for(lambda: not loop.snap.health()["is_connected"])
    during += [loop.step() for _ in range(5)]
    assert sum(during) < 4.0, "the loop was held while the daemon was away"
    node.start()
    wait_for(lambda: bool(loop.snap.health()["is_connected"]))
    assert loop.snap.health()["reconnects"] == 1

    def captured_again() -> bool:
        loop.step()
        return int(str(loop.snap.health()["complete_step"])) > 13

    wait_for(captured_again)
    assert loop.snap.wait() == "captured"
    weights, last = loop.weights(), loop.step_number
    loop.snap.close()
    again = Loop(seed=2)
    assert (again.start, again.weights()) == (last, weights)
    again.snap.close(final=True)


def test_a_snapshot_committed_while_the_daemon_was_dead_is_taken_up(node: Node) -> None:
    loop = Loop()
    loop.step()
    assert loop.snap.wait() == "captured"
    node.kill()
    loop.step()
    loop.snap.fence()
    assert loop.snap.health()["committed"] == 2, "the copy was not finished without the daemon"
    node.start()
    wait_for(lambda: loop.snap.health()["complete_step"] == 2)
    loop.snap.close(final=True)


def test_a_daemon_that_hangs_holds_the_loop_once_for_wait_max(node: Node) -> None:
    loop = Loop(wait_max_s=0.3)
    loop.step()
    assert loop.snap.wait() == "captured"
    node.signal(signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{node.pid}/stat").read_text().split()[2] == "T")
    held = [loop.step() for _ in range(20)]
    assert sum(held) < 1.5, held
    assert int(str(loop.snap.health()["skipped"])) > 10
    node.signal(signal.SIGCONT)

    def captured_again() -> bool:
        loop.step()
        return int(str(loop.snap.health()["complete_step"])) > 21

    wait_for(captured_again)
    loop.snap.close(final=True)


def test_a_forked_child_is_harmless(node: Node) -> None:
    loop = Loop()
    loop.step()
    pid = os.fork()
    if pid == 0:  # a DataLoader worker that got hold of everything
        loop.snap.step(99)
        loop.snap.fence()
        loop.snap.close(final=True)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    loop.step()
    assert loop.snap.wait() == "captured" and loop.snap.last() == 2
    loop.snap.close(final=True)


def test_an_orphaned_child_does_not_keep_the_session_alive(node: Node, tmp_path: Path) -> None:
    """The trainer is killed, its forked worker lives on: the next start must not wait for it."""
    script = f"""
import os, signal, time, sys
sys.path[:0] = [{str(ROOT)!r}]
from tests.fault.test_client_faults import Loop
loop = Loop(job="orphan")
loop.step(); loop.snap.wait()
pid = os.fork()
if pid == 0:
    time.sleep(60); os._exit(0)
open({str(tmp_path / "child")!r}, "w").write(str(pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    child = int((tmp_path / "child").read_text())
    try:
        assert killed.returncode == -signal.SIGKILL
        os.kill(child, 0)  # the orphan lives
        wait_for(
            lambda: all(s.state == "dead" for s in node.status("orphan").jobs[0].sessions), timeout_s=5.0
        )
        loop = Loop(job="orphan", seed=2)
        assert loop.start == 1
        loop.snap.close(final=True)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "raise KeyboardInterrupt"])
def test_a_process_that_ends_without_close_keeps_its_last_step(node: Node, ending: str) -> None:
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from tests.fault.test_client_faults import Loop
loop = Loop(job="unclosed")
for _ in range(3): loop.step()
print("trained", flush=True)
{ending}
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert "trained" in ended.stdout, ended.stderr
    assert ended.returncode == (-signal.SIGINT if "Interrupt" in ending else 0), ended.stderr[-2000:]
    loop = Loop(job="unclosed", seed=2)
    assert loop.start == 3
    loop.snap.close(final=True)


class Uncapturable:
    """Holds a lock: no way to write it down."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_a_failure_in_the_loop_is_told_once_and_training_goes_on(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop()
    loop.step()
    assert loop.snap.wait() == "captured"
    loop.state["odd"] = Uncapturable()
    for _ in range(3):
        loop.step()
    health = loop.snap.health()
    assert health["failures"] == 3 and "odd" in str(health["last_error"])
    assert sum("training goes on" in record.getMessage() for record in caplog.records) == 1
    del loop.state["odd"]
    loop.step()
    assert loop.snap.wait() == "captured" and loop.snap.last() == 5
    loop.snap.close(final=True)


def test_strict_raises_in_the_loop(node: Node) -> None:
    loop = Loop(strict=True)
    loop.state["odd"] = Uncapturable()
    with pytest.raises(CaptureError, match="odd"):
        loop.step()
    loop.snap.close(final=True)


def test_a_run_that_forgets_to_restore_does_not_overwrite_the_job(node: Node) -> None:
    loop = Loop()
    loop.step()
    assert loop.snap.wait() == "captured"
    loop.snap.close()
    model = torch.nn.Linear(2, 2)
    careless = Snapshotter({"model": model}, job="loop")
    with pytest.raises(ConfigError, match=r"restore\(\)"):
        careless.step(1)
    careless.close()
    again = Loop(seed=2)
    assert again.start == 1
    again.snap.close(final=True)


def test_the_structure_may_change_in_mid_run(node: Node) -> None:
    """A parameter group joins: another layout, and both are restored as they were."""
    loop = Loop()
    loop.step()
    before = int(str(loop.snap.health()["layouts"]))
    extra = torch.nn.Linear(64, 8)
    loop.state["extra"] = extra
    loop.optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.5})
    loop.step()
    assert loop.snap.wait() == "captured"
    assert loop.snap.health()["layouts"] == before + 1
    loop.snap.close(final=True)


def test_the_same_step_twice_gives_one_snapshot(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.step()
    first = loop.snap.save(1)
    assert loop.snap.save(1) is first
    assert any("captured already" in record.getMessage() for record in caplog.records)
    assert loop.snap.wait() == "captured" and loop.snap.health()["committed"] == 1
    loop.snap.close(final=True)


class FrozenLoop(Loop):
    """A frozen base of 8 MB under a small head."""

    def __init__(self, seed: int = 1) -> None:
        torch.manual_seed(seed)
        base = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(8)]).requires_grad_(
            False
        )
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 512), base, torch.nn.Linear(512, 64))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.snap = Snapshotter(self.state, job="frozen", strict=True)
        self.start = self.step_number = self.snap.restore()

    @property
    def frozen(self) -> torch.Tensor:
        return self.model[1][3].weight

    def captured(self) -> int:
        self.step()
        assert self.snap.wait() == "captured"
        return int(str(self.snap.health()["lazy_bytes"]))


def test_a_frozen_base_is_not_copied_again(node: Node) -> None:
    loop = FrozenLoop()
    first = loop.captured()
    later = [loop.captured() for _ in range(4)]
    assert first > 8 << 20 and max(later) < first // 4, (first, later)
    loop.snap.close()
    again = FrozenLoop(seed=2)
    assert again.start == 5 and again.weights() == loop.weights()
    again.snap.close(final=True)


@pytest.mark.parametrize("how", ["in place", "other storage"])
def test_a_frozen_tensor_that_is_written_after_all_is_copied_again(node: Node, how: str) -> None:
    """A base into which an adapter is merged: the snapshot that follows holds the merged values."""
    loop = FrozenLoop()
    for _ in range(3):
        loop.captured()
    with torch.no_grad():
        if how == "in place":
            loop.frozen.add_(1.0)
        else:
            loop.frozen.data = loop.frozen.data + 1.0
    loop.captured()
    loop.snap.close()
    again = FrozenLoop(seed=2)
    assert again.start == 4 and again.weights() == loop.weights()
    again.snap.close(final=True)
