"""What `make bench` compares: snapd, torch.save, DCP async."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch


class System(Protocol):
    """One way of saving. All methods run on the training thread."""

    def save(self, step: int) -> None:
        """The state of `step`; what the trainer waits for here is stall."""

    def before_update(self) -> None:
        """The state is about to change."""

    def finish(self) -> None:
        """Until the last save is complete."""


class NoSnapshots:
    def __init__(self, work: Any, folder: Path) -> None: ...

    def save(self, step: int) -> None: ...

    def before_update(self) -> None: ...

    def finish(self) -> None: ...


class Snapd:
    def __init__(self, work: Any, folder: Path) -> None:
        from snapd_client import Snapshotter

        self._snap = Snapshotter(work.state(), job="compare", strict=True)
        self._snap.restore()
        self._has_saved = False

    def save(self, step: int) -> None:
        self._snap.step(step)
        self._has_saved = True

    def before_update(self) -> None:
        self._snap.fence()

    def finish(self) -> None:
        if self._has_saved:
            self._snap.wait("captured", timeout=60)


class TorchSave:
    """torch.save to a file, fsync, rename; the last two are kept."""

    def __init__(self, work: Any, folder: Path) -> None:
        self._work, self._folder = work, folder

    def save(self, step: int) -> None:
        state = {"model": self._work.model.state_dict(), "optimizer": self._work.optimizer.state_dict()}
        path = self._folder / f"step-{step}.pt"
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".tmp").rename(path)
        (self._folder / f"step-{step - 2}.pt").unlink(missing_ok=True)

    def before_update(self) -> None: ...

    def finish(self) -> None: ...


class DcpAsync:
    """torch.distributed.checkpoint.async_save, staging overlapped with the next step, buffers kept."""

    def __init__(self, work: Any, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._work, self._folder = work, folder
        self._stager = DefaultStager(StagingOptions(False, False, True, False))
        self._written: Any = None
        self._staged: Any = None

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        self.finish()  # one at a time, as its tutorial does
        answer = dcp.async_save(
            {"state": self._work.flat()},
            checkpoint_id=self._folder / f"step-{step}",
            async_stager=self._stager,
            no_dist=True,
        )
        self._staged, self._written = answer.staging_completion, answer.upload_completion
        shutil.rmtree(self._folder / f"step-{step - 2}", ignore_errors=True)

    def before_update(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def finish(self) -> None:
        self.before_update()
        if self._written is not None:
            self._written.result()
            self._written = None


SYSTEMS: dict[str, type[Any]] = {
    "no snapshots": NoSnapshots,
    "snapd": Snapd,
    "torch.save (disk)": TorchSave,
    "torch.save (/dev/shm)": TorchSave,
    "DCP async": DcpAsync,
}
