"""Power cuts under a tier on xfs: what had been reported durable must be there, whole, on the disk after the cut.

    power_cut.py [--cuts 10] [--seed 1]        root; needs nbdkit, nbdfuse, xfsprogs

xfs lies on a loop device, on a file that nbdfuse shows, on an image that nbdkit writes. At a random moment nbdkit is
stopped in the middle of its work and the image copied: what the page cache, xfs or the loop device still held is lost
in the copy, as at a power cut. The copy is mounted (xfs replays its log), and every snapshot that it shows is verified.

Then the same is done with a writer that syncs nothing, which must be caught: a check that cannot fail shows nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from demo.node import Node  # noqa: E402

IMAGE_BYTES = 1 << 30
WAIT_S = 60.0

TRAINER = """
import sys, time, torch
from snapd_client import Snapshotter
model = torch.nn.Linear(1024, 1024); optimizer = torch.optim.AdamW(model.parameters())
snap = Snapshotter({"model": model, "optimizer": optimizer}, job="cut")
step = snap.restore()
while True:
    step += 1
    model(torch.randn(4, 1024)).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
    snap.step(step); time.sleep(0.05)
"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Disk:
    """An xfs whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mount = folder / "disk.img", folder / "disk"
        self.nbdkit: subprocess.Popen[bytes] | None = None
        self._folder = folder

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as undo:
            self.image.touch()
            os.truncate(self.image, IMAGE_BYTES)
            socket, shown = self._folder / "nbd.sock", self._folder / "shown"
            shown.mkdir()
            self.mount.mkdir()
            command = ["nbdkit", "-f", "-U", str(socket), "file", str(self.image)]
            self.nbdkit = subprocess.Popen(command)
            undo.callback(self._end, self.nbdkit)
            _until(socket.exists, "nbdkit listens")
            fuse = subprocess.Popen(["nbdfuse", str(shown), "--unix", str(socket)])
            undo.callback(self._end, fuse)
            _until(lambda: (shown / "nbd").exists(), "nbdfuse shows the disk")
            loop = run("losetup", "-f", "--show", str(shown / "nbd"))
            undo.callback(run, "losetup", "-d", loop)
            run("mkfs.xfs", "-q", "-K", loop)
            run("mount", loop, str(self.mount))
            undo.callback(run, "umount", str(self.mount))
            yield

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)

    @contextmanager
    def cut(self, number: int) -> Iterator[Path]:
        """The disk as it would be found after a power cut now, mounted."""
        assert self.nbdkit is not None
        copy, mount = self._folder / f"cut-{number}.img", self._folder / f"cut-{number}"
        self.nbdkit.send_signal(signal.SIGSTOP)
        try:
            run("cp", "--sparse=always", str(self.image), str(copy))
        finally:
            self.nbdkit.send_signal(signal.SIGCONT)
        mount.mkdir()
        run("mount", "-o", "loop,nouuid", str(copy), str(mount))
        try:
            yield mount
        finally:
            run("umount", str(mount))
            copy.unlink()


def _until(is_so: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"not in {WAIT_S} s: {what}")
        time.sleep(0.02)


def snapd(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "snapd", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout or done.stderr


def durable_step(node: Node) -> int:
    """The newest step that the daemon calls durable; 0: none."""
    environment = {**os.environ, **node.env()}
    done = subprocess.run(
        [sys.executable, "-m", "snapd", "status", "--json"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        return 0
    flushes = [job.get("flush") or {} for job in json.loads(done.stdout)["jobs"]]
    return max((int((flush.get("durable") or {}).get("step") or 0) for flush in flushes), default=0)


def looked_at(mount: Path, promised: int) -> str:
    """What is wrong with the tier at that place; empty: nothing."""
    code, text = snapd("verify", "--deep", "--json", "--from", str(mount / "tier"))
    if code != 0:
        return f"verify ended with {code}: {text[:400]}"
    code, text = snapd("ls", "--json", "--from", str(mount / "tier"))
    listed = json.loads(text)
    snapshots = listed["snapshots"] if isinstance(listed, dict) else listed
    newest = max((int(one["step"]) for one in snapshots), default=0)
    if newest < promised:
        return f"step {promised} had been durable, the newest there is {newest}"
    return ""


def cut_often(cuts: int, chance: random.Random, folder: Path) -> int:
    """How often a cut lost something that had been promised, or left something torn."""
    broken = 0
    disk = Disk(folder)
    with ExitStack() as stack:
        stack.enter_context(disk.on())
        (disk.mount / "tier").mkdir()
        settings = {"SNAPD_TIER_SHARED": str(disk.mount / "tier"), "SNAPD_TIER_EVERY_STEPS": "1"}
        settings |= {"SNAPD_TIER_GC_EVERY": "2s", "SNAPD_TIER_INTENT_TTL": "10s", "SNAPD_TIER_KEEP_LAST": "3"}
        os.environ.update(settings)
        node = stack.enter_context(Node(prefix="snapd-cut"))
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER], env={**os.environ, **node.env()})
        stack.callback(trainer.wait)
        stack.callback(trainer.kill)
        _until(lambda: durable_step(node) > 0, "something is durable")
        for number in range(cuts):
            time.sleep(chance.uniform(0.2, 2.0))
            promised = durable_step(node)
            with disk.cut(number) as mount:
                problem = looked_at(mount, promised)
            print(
                f"cut {number}: step {promised} was durable: {problem or 'there, all verified'}", flush=True
            )
            broken += bool(problem)
        if trainer.poll() is not None:
            raise SystemExit("the trainer ended")
    return broken


def careless(chance: random.Random, folder: Path) -> bool:
    """Whether a writer that syncs nothing is caught."""
    disk = Disk(folder)
    with disk.on():
        for number in range(10):
            path = disk.mount / f"file-{number}"
            path.write_bytes(chance.randbytes(1 << 16))
        with disk.cut(999) as mount:
            return any(
                not (mount / f"file-{number}").exists() or (mount / f"file-{number}").stat().st_size < 1 << 16
                for number in range(10)
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    missing = [tool for tool in ("nbdkit", "nbdfuse", "mkfs.xfs", "losetup") if shutil.which(tool) is None]
    if missing or os.geteuid():
        raise SystemExit(f"needs root and {', '.join(missing) or 'nothing else'}")
    with tempfile.TemporaryDirectory(prefix="snapd-cut-") as name:
        for part in ("careless", "tier"):
            (Path(name) / part).mkdir()
        if not careless(chance, Path(name) / "careless"):
            raise SystemExit("a writer that syncs nothing lost nothing: these cuts show nothing")
        print("a writer that syncs nothing loses its files: the cuts are real", flush=True)
        broken = cut_often(options.cuts, chance, Path(name) / "tier")
    print(f"{options.cuts} cuts, {broken} with a broken promise")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
