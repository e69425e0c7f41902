"""The global generators of random numbers: Python's, numpy's, torch's for the CPU and every visible GPU."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..errors import IntegrityError
from .sources import Fields


def capture() -> Fields:
    """All global generators' states as a plain tree. Does not wait for a device."""
    version, words, gauss = random.getstate()
    state: Fields = {
        "python": (version, struct.pack("<625I", *words), gauss),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if "numpy.random" in sys.modules:
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state["numpy"] = (name, np.asarray(keys).tobytes(), int(position), int(has_gauss), float(cached))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            state[f"cuda:{index}"] = torch.cuda.get_rng_state(index).numpy().tobytes()
    return state


def restore(state: dict[str, Any]) -> list[str]:
    """Set all global generators. Returns the names of those that the snapshot has and this process lacks.

    Raises:
        IntegrityError: the state is malformed; nothing was set then.
    """
    try:
        version, words, gauss = state["python"]
        python = (version, struct.unpack("<625I", words), gauss)
        cpu = _byte_tensor(state["torch"])
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise IntegrityError("the generators' states in the snapshot are malformed") from error
    random.setstate(python)
    torch.set_rng_state(cpu)
    if "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    absent = []
    for name, raw in state.items():
        if name.startswith("cuda:"):
            index = int(name.removeprefix("cuda:"))
            if torch.cuda.is_available() and index < torch.cuda.device_count():
                torch.cuda.set_rng_state(_byte_tensor(raw), index)
            else:
                absent.append(name)
    return absent


def part(rank: int) -> None:
    """Begin anew, the same way whenever the generators are as they are, and otherwise on each rank.

    For a rank that has the generators' states of another one, which must not draw the same numbers.
    """
    seed = int.from_bytes(
        hashlib.blake2b(
            torch.get_rng_state().numpy().tobytes(), digest_size=8, salt=rank.to_bytes(8, "little")
        ).digest(),
        "little",
    )
    random.seed(seed)
    torch.manual_seed(seed & (2**63 - 1))
    if "numpy.random" in sys.modules:
        np.random.seed(seed & (2**32 - 1))


def _byte_tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@contextlib.contextmanager
def rng_neutral() -> Iterator[None]:
    """Leave the global generators as they were found, whatever is drawn inside."""
    before = capture()
    try:
        yield
    finally:
        restore(before)
