"""Real text that is on every machine: the Python standard library's own sources, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

CORPUS_BYTES_MAX = 4 << 20


def read_corpus(limit_bytes: int = CORPUS_BYTES_MAX) -> np.ndarray:
    """The first `limit_bytes` of the sources, in the order of their names: the same for every process."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        if size >= limit_bytes:
            break
        parts.append(path.read_bytes())
        size += len(parts[-1])
    if size < limit_bytes // 4:
        raise FileNotFoundError(f"only {size} bytes of Python sources below {folder}")
    return np.frombuffer(b"".join(parts)[:limit_bytes], dtype=np.uint8)


class Windows(Dataset[torch.Tensor]):
    """Windows of `context` + 1 bytes; every rank has its own, none in common with another."""

    def __init__(self, corpus: np.ndarray, *, context: int, rank: int, world_size: int, count: int) -> None:
        self.corpus = corpus
        self.context = context
        available = (len(corpus) - 1) // context
        stride = max(available // (world_size * count), 1)
        self.starts = [(rank + world_size * i) * stride * context for i in range(count)]
        if self.starts[-1] + context + 1 > len(corpus):
            raise ValueError(f"{count} windows for {world_size} ranks do not fit into {len(corpus)} bytes")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = self.starts[index]
        return torch.from_numpy(self.corpus[start : start + self.context + 1].astype(np.int64))
