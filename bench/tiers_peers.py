"""DCP and safetensors with the same number of bytes in files: what others do where snapd uses a tier in a directory.

Saves end with fsync of what was written: snapd's flush is durable when it says so, and so is the floor beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

TENSORS = 16


class Peers:
    """A state of `nbytes` in float32, and a folder for its files."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        torch.set_num_threads(2)
        folder.mkdir()
        self._dcp, self._file = folder / "dcp", folder / "file.safetensors"
        self._state = {f"t{number}": torch.randn(nbytes // TENSORS // 4) for number in range(TENSORS)}

    def saves(self) -> dict[str, Callable[[], float]]:
        """Name -> seconds of one."""
        return {"DCP save": self.save_dcp, "safetensors save": self.save_safetensors}

    def loads(self) -> dict[str, Callable[[], float]]:
        """Name -> seconds of one, into tensors that are there. After a save."""
        return {"DCP load": self._load_dcp, "safetensors load": self._load_safetensors}

    def save_dcp(self) -> float:
        shutil.rmtree(self._dcp, ignore_errors=True)
        writer = dcp.FileSystemWriter(self._dcp, sync_files=True)  # its default
        began = time.perf_counter()
        dcp.save(self._state, storage_writer=writer, no_dist=True)
        return time.perf_counter() - began

    def save_safetensors(self) -> float:
        self._file.unlink(missing_ok=True)
        began = time.perf_counter()
        save_file(self._state, self._file)
        descriptor = os.open(self._file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def _load_dcp(self) -> float:
        began = time.perf_counter()
        dcp.load(self._state, checkpoint_id=self._dcp, no_dist=True)
        return time.perf_counter() - began

    def _load_safetensors(self) -> float:
        began = time.perf_counter()
        with safe_open(self._file, framework="pt") as file:
            for name, tensor in self._state.items():
                tensor.copy_(file.get_tensor(name))
        return time.perf_counter() - began
