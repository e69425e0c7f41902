"""A restore plan cut in two, for the host and for devices, moves the same bytes as the whole."""

from __future__ import annotations

import random
from array import array

import numpy as np
import torch
from snapd_client.restore_device import ToDevices, split_ways
from snapd_client.state.pieces import PlanArrays, empty_plan
from snapd_native import CopyPlan

from tests.support.fake_cuda import FakeCuda

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CHUNKS, CHUNK_BYTES, TARGETS, TARGET_BYTES = 6, 512, 9, 256


def plan_of_disorder(seed: int) -> tuple[PlanArrays, list[tuple[int, int]]]:
    """Each target is put together from runs of two chunks."""
    draw = random.Random(seed)
    rows = []
    for target in range(TARGETS):
        cut = draw.randrange(1, TARGET_BYTES)
        for begin, end in ((0, cut), (cut, TARGET_BYTES)):
            chunk = draw.randrange(CHUNKS)
            start = draw.randrange(CHUNK_BYTES - (end - begin))
            rows.append((chunk, start, target, begin, end - begin, 0))
    rows.sort()
    plan = empty_plan()
    for row in rows:
        for column, value in zip(plan, row, strict=True):
            column.append(value)
    chunks = [row[0] for row in rows]
    return plan, [(chunks.index(c) if c in chunks else 0, chunks.count(c)) for c in range(CHUNKS)]


def test_both_ways_together_do_what_one_did() -> None:
    for seed in range(20):
        plan, pieces = plan_of_disorder(seed)
        source = np.random.default_rng(seed).integers(0, 256, CHUNKS * CHUNK_BYTES, dtype=np.uint8)
        expected, found = (np.zeros(TARGETS * TARGET_BYTES, dtype=np.uint8) for _ in range(2))
        bases = array("Q", [source.ctypes.data + chunk * CHUNK_BYTES for chunk in range(CHUNKS)])
        CopyPlan(*plan).run(bases, addresses(expected), 0, len(plan.nbytes))

        targets = addresses(found)
        device_of = {targets[0]: FIRST, targets[4]: SECOND, targets[5]: FIRST}
        ways = split_ways(plan, pieces, targets, device_of)
        host = CopyPlan(*ways.plan)
        to_devices = ToDevices({FIRST, SECOND}, FakeCuda)
        with to_devices:
            for chunk, (first, count) in enumerate(ways.pieces_of_chunk):
                if count:
                    host.run(bases, targets, first, count)
                to_devices.copy(bases[chunk], ways.device_rows.get(chunk, ()))
        assert np.array_equal(found, expected)
        api = to_devices._api
        assert isinstance(api, FakeCuda) and api.copies == 6
        assert {line for line in api.log if "synchronised" in line} == {
            "side 0 is synchronised",
            "side 1 is synchronised",
        }


def test_without_devices_the_plan_stays_what_it_is() -> None:
    plan, pieces = plan_of_disorder(1)
    ways = split_ways(plan, pieces, [0] * TARGETS, {})
    assert ways.plan is plan and ways.pieces_of_chunk is pieces and ways.device_rows == {}


def addresses(memory: np.ndarray) -> array[int]:
    return array("Q", [memory.ctypes.data + target * TARGET_BYTES for target in range(TARGETS)])
