"""The binding of the copy engine: what it refuses and reports; that it lets the GIL go and ends with its process."""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator

import pytest
import snapd_native
from snapd_native import ZERO_FILL, CopyEngine, CopyPlan

MIB = 1 << 20


class Memory:
    """`nbytes` writable bytes with an address."""

    def __init__(self, nbytes: int, byte: int = 0) -> None:
        self.raw = (ctypes.c_ubyte * nbytes)()
        ctypes.memset(self.raw, byte, nbytes)
        self.address = ctypes.addressof(self.raw)

    @property
    def content(self) -> bytes:
        return bytes(self.raw)


def plain_plan(nbytes: int, group_count: int = 1) -> CopyPlan:
    """One source to one destination, in equal groups."""
    share = nbytes // group_count
    at = [share * index for index in range(group_count)]
    zeros = [0] * group_count
    return CopyPlan(zeros, at, zeros, at, [share] * group_count, list(range(group_count)))


@pytest.fixture
def engine() -> Iterator[CopyEngine]:
    engine = CopyEngine()
    yield engine
    engine.close()


def test_the_kernel_is_one_of_those_documented() -> None:
    assert snapd_native.copy_kernel() in {"avx512", "avx2", "sse2", "scalar"}


@pytest.mark.parametrize("name", ["scalar", "mmx"])
def test_the_environment_forces_a_kernel_or_is_refused(name: str) -> None:
    environment = {**os.environ, "SNAPD_COPY_KERNEL": name}
    code = "import snapd_native; print(snapd_native.copy_kernel())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if name == "scalar":
        assert done.stdout.strip() == "scalar"
    else:
        assert done.returncode != 0
        assert "SNAPD_COPY_KERNEL is 'mmx'" in done.stderr


def test_a_ticket_tells_how_it_went(engine: CopyEngine) -> None:
    source, target = Memory(8 * MIB, 7), Memory(8 * MIB)
    before_ns = time.monotonic_ns()
    ticket = engine.submit(plain_plan(8 * MIB, 4), [source.address], [target.address])
    assert ticket.wait(help=False)
    assert target.content == source.content
    assert ticket.progress() == (8 * MIB, 8 * MIB)
    assert before_ns <= ticket.started_ns <= ticket.finished_ns <= time.monotonic_ns()
    assert ticket.cpu_ns > 0
    assert ticket.helped_bytes == 0
    assert not ticket.is_cancelled
    assert all(ticket.is_done(group) for group in (-1, 0, 1, 2, 3, 200))


def test_the_descriptor_becomes_readable_when_all_is_copied(engine: CopyEngine) -> None:
    source, target = Memory(MIB), Memory(MIB)
    ticket = engine.submit(plain_plan(MIB), [source.address], [target.address])
    readable, _, _ = select.select([ticket.fileno()], [], [], 20)
    assert readable == [ticket.fileno()]
    assert ticket.is_done()


def test_a_ticket_may_be_dropped_before_its_copy_is_done(engine: CopyEngine) -> None:
    source, target = Memory(32 * MIB, 9), Memory(32 * MIB)
    plan = plain_plan(32 * MIB)
    engine.submit(plan, [source.address], [target.address])
    assert engine.submit(
        plan, [source.address], [target.address]
    ).wait()  # in order: the dropped one is over too
    assert target.content == source.content


def test_cancelling_ends_the_wait_of_another_thread(engine: CopyEngine) -> None:
    source, target = Memory(64 * MIB, 1), Memory(64 * MIB)
    plan = plain_plan(64 * MIB)
    tickets = [engine.submit(plan, [source.address], [target.address]) for _ in range(20)]
    outcome: list[bool] = []
    waiter = threading.Thread(target=lambda: outcome.append(tickets[-1].wait(help=False)))
    waiter.start()
    for ticket in reversed(tickets):
        ticket.cancel()
    waiter.join(20)
    assert outcome == [False]
    assert tickets[-1].is_cancelled
    assert not tickets[-1].is_done()
    assert tickets[-1].progress()[0] == 0


def test_waiting_lets_other_threads_run(engine: CopyEngine) -> None:
    """A helper that held the GIL would let the counter stand still while it copies."""
    source, target = Memory(64 * MIB), Memory(64 * MIB)
    plan = plain_plan(64 * MIB)
    count, is_over = 0, threading.Event()

    def work() -> None:
        nonlocal count
        while not is_over.is_set():
            count += 1

    worker = threading.Thread(target=work)
    worker.start()
    before = count
    for _ in range(30):
        plan.run([source.address], [target.address])
        assert engine.submit(plan, [source.address], [target.address]).wait()
    during = count - before
    is_over.set()
    worker.join()
    assert during > 1000


def test_closed_engines_refuse_and_close_twice() -> None:
    engine = CopyEngine(2)
    engine.close()
    engine.close()
    memory = Memory(8)
    with pytest.raises(ValueError, match="closed"):
        engine.submit(plain_plan(8), [memory.address], [memory.address])


@pytest.mark.parametrize("thread_count", [0, -1, 65, "1"])
def test_the_number_of_threads_has_bounds(thread_count: int) -> None:
    with pytest.raises(ValueError, match="thread_count is"):
        CopyEngine(thread_count)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (([0], [0], [0], [0], [1], []), "equal length"),
        (([-1], [0], [0], [0], [1], [0]), r"src_index\[0\] is -1"),
        (([ZERO_FILL + 1], [0], [0], [0], [1], [0]), "src_index"),
        (([0], [2**64], [0], [0], [1], [0]), "src_offset"),
        (([0], ["0"], [0], [0], [1], [0]), r"src_offset\[0\] is '0'"),
        (([0], [0], [ZERO_FILL], [0], [1], [0]), "dst_index"),
        (([0], [0], [0], [0], [1 << 43], [0]), "nbytes"),
        (([0], [0], [0], [0], [1], [256]), r"group\[0\] is 256"),
        ((0, [0], [0], [0], [1], [0]), "src_index is int"),
        ((array("d", [0]), [0], [0], [0], [1], [0]), "src_index is a buffer of format 'd'"),
        ((array("q", [-4]), [0], [0], [0], [1], [0]), r"src_index\[0\] is -4"),
    ],
)
def test_columns_out_of_bounds_are_refused_by_name(columns: tuple[list[int], ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CopyPlan(*columns)


@pytest.mark.parametrize("code", ["B", "H", "I", "L", "Q", "i", "l", "q"])
def test_columns_are_taken_from_any_array_of_integers(code: str) -> None:
    source, target = Memory(16, 5), Memory(16)
    zero, nbytes = array(code, [0]), array(code, [16])
    CopyPlan(zero, zero, zero, zero, nbytes, zero).run([source.address], [target.address])
    assert target.content == source.content


def test_bases_that_are_missing_or_null_are_refused(engine: CopyEngine) -> None:
    plan = plain_plan(8)
    memory = Memory(8)
    for src, dst, text in (
        ([], [8], "src_bases has 0"),
        ([0], [8], r"src_bases\[0\]"),
        ([8], [0], r"dst_bases\[0\]"),
    ):
        with pytest.raises(ValueError, match=text):
            engine.submit(plan, src, dst)
        with pytest.raises(ValueError, match=text):
            plan.run(src, dst)
        with pytest.raises(ValueError, match=text):
            plan.differing(src, dst)
    with pytest.raises(ValueError, match="first_piece"):
        plan.run([memory.address], [memory.address], 2)
    with pytest.raises(ValueError, match="piece_count"):
        plan.run([memory.address], [memory.address], 0, 2)
    with pytest.raises(ValueError, match="share_max"):
        plan.sample([memory.address], 0, 4096, 1.5)


@pytest.mark.parametrize("group", [-2, 256])
def test_groups_have_bounds(engine: CopyEngine, group: int) -> None:
    memory, target = Memory(8), Memory(8)
    ticket = engine.submit(plain_plan(8), [memory.address], [target.address])
    for ask in (ticket.wait, ticket.fence, ticket.is_done):
        with pytest.raises(ValueError, match="group is"):
            ask(group)
    ticket.wait()


IN_A_CHILD = """
import ctypes, os, sys
from snapd_native import CopyEngine, CopyPlan
N = 256 << 20
source, target = ctypes.create_string_buffer(N), ctypes.create_string_buffer(N)
plan = CopyPlan([0], [0], [0], [0], [N], [0])
bases = [ctypes.addressof(source)], [ctypes.addressof(target)]
engine = CopyEngine(2)
ticket = engine.submit(plan, *bases)
"""


def run_script(script: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IN_A_CHILD + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.parametrize(
    "script",
    [
        "",
        "sys.exit(0)",
        "del engine, ticket",
        "raise SystemExit(0)",
    ],
)
def test_a_process_may_end_in_the_middle_of_a_copy(script: str) -> None:
    done = run_script(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_is_refused_and_ends() -> None:
    done = run_script(
        """
child = os.fork()
if child == 0:
    refused = 0
    for call in (ticket.wait, ticket.fence, ticket.fileno, lambda: engine.submit(plan, *bases)):
        try:
            call()
        except ValueError as error:
            refused += "fork of it" in str(error)
    ticket.cancel()
    engine.close()
    del ticket, engine
    sys.exit(refused)  # through the interpreter's whole shutdown
_, status = os.waitpid(child, 0)
assert ticket.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    )
    assert (done.returncode, done.stderr) == (4, "")
