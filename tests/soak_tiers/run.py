"""`make soak-tiers`: kill -9 of daemon, trainer and S3 server while snapshots become durable, at every named point and
at many moments. After each: every snapshot that the bucket offers is read to its last byte. At the end: `gc`, and what
is in the bucket is what manifests name.

    python tests/soak_tiers/run.py --seed 1 --points 5 --moments 300

Exit status 0: every promise held. The histogram of the phases hit is printed at the end, in either case.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.errors import SnapdError
from snapd.runtime.faultpoints import COLLECT_POINTS, FLUSH_POINTS
from snapd.store.s3 import S3Store
from tests.support.daemon_process import DaemonProcess, TrainerProcess, daemon_folders
from tests.support.fake_trainer import Refused, content
from tests.support.seaweed import BUCKET, Seaweed, running
from tests.support.tier_audit import audit, collect_until_quiet, pack_nbytes, unnamed
from tests.support.waiting import wait_for

JOB = "soak"
CHUNKS = 240
CHUNK_BYTES = 64 << 10
ROUND_S, TTL_S, KEEP = 2.0, 15.0, 3
SETTINGS = {
    "SNAPD_ARENA_CHUNK_BYTES": "64KiB",
    "SNAPD_TIER_EVERY_STEPS": "1",
    "SNAPD_TIER_EVERY": "0",
    "SNAPD_TIER_RATE": "10MiB",
    "SNAPD_TIER_COMPRESSION": "off",
    "SNAPD_TIER_DEADLINE": "2s",
    "SNAPD_TIER_STALL": "1s",
    "SNAPD_TIER_CONNECT": "1s",
    "SNAPD_TIER_KEEP_LAST": str(KEEP),
    "SNAPD_TIER_GC_EVERY": f"{ROUND_S}s",
    "SNAPD_TIER_INTENT_TTL": f"{TTL_S}s",
}
RULES = CollectRules(keep=KeepRules(last=KEEP), round_s=ROUND_S, intent_ttl_s=TTL_S)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclass
class Scene:
    """One bucket, one daemon, one trainer at a time. `worlds`: incarnations so far, each a generation. `seed`: of the
    bytes that are captured now.
    """

    server: Seaweed
    store: S3Store
    daemon: DaemonProcess
    trainer: TrainerProcess | None = None
    step: int = 0
    worlds: int = 0
    seed: int = 0
    seeds: dict[int, int] = field(default_factory=dict)  # by step
    newest: SnapshotId | None = None
    phases: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    audits: int = 0
    snapshots_read: int = 0

    # life

    def start_trainer(self) -> None:
        self.worlds += 1
        self.trainer = self.daemon.trainer_process()
        self.trainer.do(
            "open", job=JOB, incarnation=f"world-{self.worlds}", state_bytes_estimate=CHUNKS * CHUNK_BYTES
        )

    def capture(self) -> None:
        """One more step; a daemon that was killed meanwhile is not held against the trainer."""
        assert self.trainer is not None
        self.step += 1
        self.seeds[self.step] = self.seed
        self.trainer.do("capture", step=self.step, seed=self.seed, chunk_count=CHUNKS)

    def phase(self) -> str:
        """What the flush is doing, in few words."""
        try:
            reason = self.daemon.job(JOB).flush.reason
        except (OSError, RuntimeError, grpc.RpcError, Refused) as error:
            return f"no answer ({type(error).__name__})"
        text = reason.partition(": ")[2] or reason
        return " ".join(word for word in text.split() if not any(c.isdigit() for c in word))[:44]

    def wait_durable(self, timeout_s: float = 120.0) -> None:
        """The newest captured step becomes durable."""

        def is_durable() -> bool:
            flush = self.daemon.job(JOB).flush
            return bool(flush.has_durable and flush.durable_step >= self.step)

        try:
            wait_for(is_durable, f"step {self.step} is durable", timeout_s)
        except TimeoutError:
            print(self.daemon.job(JOB).flush)
            raise

    # killing

    def kill(self, victim: str) -> None:
        self.kills[victim] += 1
        if victim == "daemon":
            self.daemon.kill()
        elif victim == "trainer":
            assert self.trainer is not None
            self.trainer.kill()
        else:
            self.server.kill()

    def mend(self, victim: str) -> None:
        if victim == "daemon":
            self.daemon.start(SNAPD_FAULT_POINTS="")
            assert self.trainer is not None
            self.trainer.do("reconnect")
        elif victim == "trainer":
            self.start_trainer()
        else:
            self.server.start()

    def check(self) -> None:
        """Every offered snapshot is whole and right; the newest is never older than before."""
        found = audit(self.store, JOB)
        self.audits += 1
        self.snapshots_read += len(found)
        for snapshot, ranks in found.items():
            for chunks in ranks:
                assert len(chunks) == CHUNKS, (snapshot, len(chunks))
                for index in range(2, CHUNKS - 1):
                    expected = content(CHUNK_BYTES, JOB, 0, snapshot.step, self.seeds[snapshot.step], index)
                    assert chunks[index] == expected, (snapshot, index)
        if found:
            assert self.newest is None or max(found) >= self.newest, (max(found), self.newest)
            self.newest = max(found)
        assert found or self.newest is None, "nothing is offered any more"


# kills at named points and at moments


def named_points(scene: Scene, times: int, only: str) -> None:
    for point in [point for point in (*FLUSH_POINTS, *COLLECT_POINTS) if only in point and times]:
        for turn in range(times):
            scene.seed += 1  # another frozen chunk: the pack that has it is soon worth rewriting
            scene.daemon.kill()
            scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}:{1 + turn % 3}=kill")
            assert scene.trainer is not None
            scene.trainer.do("reconnect")
            process = scene.daemon.process
            assert process is not None
            until_s = time.monotonic() + 120
            while process.poll() is None:
                assert time.monotonic() < until_s, f"{point} was not passed"
                try:
                    scene.capture()
                except (RuntimeError, EOFError):
                    break
                time.sleep(0.8)
            process.wait(20)
            assert process.returncode == -signal.SIGKILL, process.returncode
            scene.kills["daemon"] += 1
            scene.phases[point] += 1
            scene.check()
            scene.daemon.start(SNAPD_FAULT_POINTS="")
            mended(scene)
        say(f"{point}: killed {times} times")


def mended(scene: Scene) -> None:
    """The trainer goes on: with its session, or with a world of its own where it was cut off in mid-step."""
    assert scene.trainer is not None
    try:
        scene.trainer.do("reconnect")
        scene.capture()
    except (RuntimeError, EOFError):
        scene.trainer.kill()
        scene.start_trainer()
        scene.capture()
    scene.wait_durable()


def moments(scene: Scene, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for turn in range(count):
        victim = ("daemon", "server", "trainer")[turn % 3]
        scene.capture()
        time.sleep(chance.uniform(0.0, 1.3))
        scene.phases[f"{victim}: {scene.phase()}"] += 1
        scene.kill(victim)
        if victim == "server":
            time.sleep(chance.uniform(0.0, 3.0))
            scene.capture()  # training goes on while the store is away
        else:
            scene.check()
        scene.mend(victim)
        if victim == "trainer":
            scene.capture()
        elif victim == "daemon":
            mended(scene)
        scene.check()
        if turn % 5 == 4:
            scene.wait_durable()
            scene.check()
            say(f"{turn + 1} moments; {scene.snapshots_read} snapshots read")


def finish(scene: Scene) -> None:
    """`gc`, and nothing is there but what manifests name."""
    scene.wait_durable()
    scene.daemon.kill()  # an intent may stay, and uploads
    passes = collect_until_quiet(scene.store, JOB, RULES)
    scene.check()
    left = unnamed(scene.store, JOB)
    assert left == [], left
    unfinished = [key for key, _, _ in scene.store.unfinished()]
    assert unfinished == [], unfinished
    stored, live = pack_nbytes(scene.store, JOB)
    requests = sum(done.requests for done in passes)
    say(
        f"after gc ({len(passes)} passes, {requests} requests): {stored} bytes in packs, {live} of chunks that"
        f" manifests name ({stored / live:.3f}); nothing unnamed, no unfinished upload"
    )
    assert stored <= 1.4 * live, (stored, live)


@contextmanager
def opened() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="snapd-soak-") as folder, running(Path(folder)) as server:
        settings = {
            **SETTINGS,
            "SNAPD_TIER_SHARED": f"s3://{BUCKET}/{JOB}",
            "SNAPD_TIER_ENDPOINT": server.endpoint,
        }
        with daemon_folders(**settings) as daemon:
            store = server.store(JOB)
            scene = Scene(server, store, daemon)
            try:
                yield scene
            finally:
                store.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=5, help="kills per named point (0: none)")
    parser.add_argument("--only", default="", help="only points with this in their names")
    parser.add_argument(
        "--moments", type=int, default=100, help="random moments, of each of the three in turn"
    )
    args = parser.parse_args()
    began_s = time.monotonic()
    with opened() as scene:
        try:
            scene.daemon.start()
            scene.start_trainer()
            scene.capture()
            scene.wait_durable()
            scene.check()
            named_points(scene, args.points, args.only)
            moments(scene, args.seed, args.moments)
            finish(scene)
        except (AssertionError, SnapdError, TimeoutError, RuntimeError):
            say("the daemon's last words:\n" + scene.daemon.log_file.read_text()[-4000:])
            raise
        finally:
            say(f"{time.monotonic() - began_s:.0f} s, kills: {dict(scene.kills)}, {scene.audits} audits")
            for phase, count in scene.phases.most_common():
                print(f"  {count:4}  {phase}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
