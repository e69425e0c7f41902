"""Writers that are slower than `tier.intent_ttl` give signs of life meanwhile, and end; those that stand still are
given up, and begin anew when they go on. A collector works beside them all the time.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.store.base import Store
from snapd.store.faulty import Effect, Fault, FaultyStore
from snapd.tier.collecting import Collector, Pass
from snapd.tier.flush import Stage
from snapd.tier.writing import BATCH_BYTES
from tests.support.flush_parts import CHUNK, Writers, contents_of, flush, shard
from tests.support.flush_scene import BY_STEPS, intents, read_tier, tier_daemon
from tests.support.stores import directory_store
from tests.support.tier_audit import audit, unnamed
from tests.support.waiting import wait_for

ONE = SnapshotId(1, 1)
TTL_S = 1.0
RULES = CollectRules(keep=KeepRules(last=1), round_s=0.2, intent_ttl_s=TTL_S, void_ttl_s=60.0)
STATE = 6 << 16


class Collecting:
    """A collector at work in a thread. `condemned`: all keys that its lists ever named."""

    def __init__(self, store: Store, rules: CollectRules) -> None:
        self.condemned: set[str] = set()
        self.passes: list[Pass] = []
        self.error: BaseException | None = None
        self._collector = Collector(store, "a", rules, write_id=secrets.token_hex(16))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            try:
                done = self._collector.run()
            except BaseException as error:
                self.error = error
                raise
            self.passes.append(done)
            self.condemned.update(item.key for item in done.condemned)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.error is None


@contextmanager
def collecting(store: Store, rules: CollectRules = RULES) -> Iterator[Collecting]:
    made = Collecting(store, rules)
    try:
        yield made
    finally:
        made.close()


def ended_at_once(store: Store, beside: Collecting, writer_key: str) -> None:
    """The flush went well in one attempt, and nothing that it needed was ever condemned."""
    assert list(read_tier(store, "a")) == [ONE]
    assert writer_key not in beside.condemned
    assert not any("/packs/" in key for key in beside.condemned)
    assert len(beside.passes) > 5


def test_a_pack_that_takes_longer_than_the_time_to_live(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    slow = FaultyStore(
        store, [Fault("commit", Effect.STALL, prefix="jobs/a/packs/")], stall=lambda: time.sleep(3 * TTL_S)
    )
    writers = Writers()
    writer = writers.make(slow, ttl_s=TTL_S, round_s=RULES.round_s * 50)
    key = writer.keys.intent(writer.write_id)
    with collecting(store) as beside:
        flushed = flush(writer, [shard(contents_of(1))])
    writers.close()
    assert [call for call, _, _ in slow.struck] == ["commit"]
    assert flushed.is_ours
    ended_at_once(store, beside, key)


def test_a_rate_that_makes_a_pack_take_longer_than_the_time_to_live(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    writers = Writers(rate=BATCH_BYTES / (3 * TTL_S))  # what a batch takes too much, the next one waits for
    writer = writers.make(store, ttl_s=TTL_S, round_s=RULES.round_s * 50)
    key = writer.keys.intent(writer.write_id)
    began_s = time.monotonic()
    with collecting(store) as beside:
        flush(writer, [shard(contents_of(1, changed=3 * BATCH_BYTES // (2 * CHUNK)))])
    writers.close()
    assert time.monotonic() - began_s > 2 * TTL_S
    ended_at_once(store, beside, key)


def test_a_node_that_waits_for_others(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    writers = Writers()
    first = writers.make(store, ttl_s=TTL_S, round_s=RULES.round_s * 50)
    second = writers.make(store, ttl_s=TTL_S, round_s=RULES.round_s * 50)
    key = first.keys.intent(first.write_id)
    parts = [shard(contents_of(1, rank=rank), rank=rank, world_size=2) for rank in range(2)]
    stage = Stage()
    with collecting(store) as beside:
        waiting = threading.Thread(target=lambda: flush(first, parts[:1], world_size=2, stage=stage))
        waiting.start()
        wait_for(lambda: stage.is_waiting, "the first node waits")
        time.sleep(3 * TTL_S)
        flush(second, parts[1:], world_size=2)
        waiting.join()
    writers.close()
    ended_at_once(store, beside, key)


@pytest.mark.parametrize("point", ["daemon.flush.pack.after", "daemon.flush.commit.before"])
def test_a_daemon_that_stands_still_is_given_up_and_writes_anew(point: str) -> None:
    rules = CollectRules(keep=KeepRules(last=1), round_s=0.5, intent_ttl_s=4.0, void_ttl_s=60.0)
    settings = {**BY_STEPS, "SNAPD_TIER_INTENT_TTL": "4s", "SNAPD_TIER_GC_EVERY": "1h"}
    with tier_daemon(**settings) as scene:
        scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}=stop")
        process = scene.daemon.process
        assert process is not None
        trainer = scene.daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=STATE)
        trainer.capture(2, 1)
        wait_for(lambda: os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)[1], "the daemon stands still")
        (intent,) = intents(scene.store, "a")
        try:
            with collecting(scene.store, rules) as beside:
                wait_for(lambda: not intents(scene.store, "a"), "its intent is gone", 30)
                wait_for(
                    lambda: not any("/packs/" in key for key in unnamed(scene.store, "a")),
                    "its packs, too",
                    30,
                )
                assert audit(scene.store, "a") == {}
                process.send_signal(signal.SIGCONT)
                scene.wait_durable(2)
        finally:
            process.send_signal(signal.SIGCONT)
        assert intent in beside.condemned
        assert scene.snapshots() == {SnapshotId(1, 2): [trainer.chunks(2, 1, 6)]}
        told = [each["event"] for each in scene.daemon.events() if each["event"].startswith("flush.")]
        kinds = {each["kind"] for each in scene.daemon.events("flush.paused")}
        assert told and kinds <= {
            "tier_condemned",
            "store_failing",
        }  # the file that it had open may be gone, too
        trainer.capture(4, 1)
        scene.wait_durable(4)
