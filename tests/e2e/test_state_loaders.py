"""Loaders and the global generators: the batches and the draws after a restore are those of the uninterrupted run."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from snapd_client.errors import CaptureError
from snapd_client.state.loaders import rng_neutral
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from tests.support.loopback import Loopback, Snapshot, make_tree, restore

LENGTH, BATCH = 12, 3
BATCHES = LENGTH // BATCH


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        # what workers draw depends on their seeds, which come from the base seed (how far they have drawn since is
        # known to nobody but the data set, which may have a state_dict for it)
        worker = torch.utils.data.get_worker_info()
        return torch.tensor([index, 0 if worker is None else worker.seed % 1_000_003])


class Run:
    """A loop over epochs that draws from every generator at each step and can be captured after any of them."""

    def __init__(self, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.loader = StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, **options)
        self.tree = make_tree({"data": self.loader})
        self.log: list[tuple[Any, ...]] = []

    def epochs(self, count: int, *, start: int = 0) -> Iterator[int]:
        """Yields after every step, and once more (as -1) after the end of each epoch."""
        for epoch in range(start, count):
            for batch in self.loader:
                draws = (torch.rand(2).tolist(), random.random(), float(np.random.rand()))
                self.log.append((batch.tolist(), draws))
                yield len(self.log)
            self.log.append(("end of epoch", epoch))
            yield -1

    def generators(self) -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.fixture(autouse=True)
def _workers_end() -> Iterator[None]:
    """Iterators of one test do not stop their workers in the middle of another."""
    yield
    gc.collect()


def stop_persistent_workers(loader: StatefulDataLoader[Any]) -> None:
    """torchdata waits five seconds for each persistent worker; the tests do not."""
    iterator: Any = loader._iterator
    signal_handling._remove_worker_pids(id(iterator))
    for worker in iterator._workers:
        worker.kill()
        worker.join()
    iterator._worker_pids_set = False


OPTIONS = [
    pytest.param({"num_workers": 0}, id="workers-0"),
    pytest.param({"num_workers": 2}, id="workers-2"),
    pytest.param({"num_workers": 2, "persistent_workers": True}, id="workers-2-persistent"),
]
PLACES = [
    pytest.param(2, id="mid-epoch"),
    pytest.param(BATCHES, id="last-batch"),
    pytest.param(-1, id="epoch-end"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_batches_and_draws_go_on(options: dict[str, Any], place: int) -> None:
    run = Run(1, **options)
    snapshot: Snapshot | None = None
    taken = 0
    for where in run.epochs(3):
        if where == place and snapshot is None:
            snapshot = Loopback(run.tree).capture()
            taken = len(run.log)
    assert snapshot is not None
    expected, end = run.log[taken:], run.generators()

    resumed = Run(2, **options)
    restore(resumed.tree, snapshot)
    start = 1 if place == -1 else 0
    list(resumed.epochs(3, start=start))
    assert resumed.log == expected
    assert resumed.generators() == end
    assert type(resumed.loader) is StatefulDataLoader, "the class for one iterator is still there"
    if options.get("persistent_workers"):
        stop_persistent_workers(run.loader)
        stop_persistent_workers(resumed.loader)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_in_place_while_an_iterator_is_alive(options: dict[str, Any]) -> None:
    run = Run(1, **options)
    steps = run.epochs(2)
    next(steps)
    snapshot = Loopback(run.tree).capture()
    list(steps)
    expected = run.log[1:]
    restore(run.tree, snapshot)
    run.log.clear()
    list(run.epochs(2))
    assert run.log == expected


def test_before_the_first_iterator_nothing_is_drawn_by_the_capture() -> None:
    run = Run(1, num_workers=0)
    before = run.generators()
    snapshot = Loopback(run.tree).capture()
    assert run.generators() == before
    assert run.loader._iterator is None
    list(run.epochs(2))
    resumed = Run(2, num_workers=0)
    list(resumed.epochs(1))  # a loader that was used already
    resumed.log.clear()
    restore(resumed.tree, snapshot)
    list(resumed.epochs(2))
    assert resumed.log == run.log


def test_a_restored_loader_that_was_not_iterated_is_captured_as_it_was_restored() -> None:
    run = Run(1, num_workers=0)
    steps = run.epochs(2)
    next(steps)
    first = Loopback(run.tree).capture()
    list(steps)
    second_world = Run(2, num_workers=0)
    restore(second_world.tree, first)
    second = Loopback(second_world.tree).capture()
    third_world = Run(3, num_workers=0)
    restore(third_world.tree, second)
    list(third_world.epochs(2))
    assert third_world.log == run.log[1:]


def test_a_generator_of_the_loaders_own() -> None:
    def make(seed: int) -> Run:
        return Run(seed, num_workers=0, generator=torch.Generator().manual_seed(seed))

    run = make(1)
    steps = run.epochs(3)
    next(steps)
    snapshot = Loopback(run.tree).capture()
    list(steps)
    resumed = make(2)
    restore(resumed.tree, snapshot)
    list(resumed.epochs(3))
    assert resumed.log == run.log[1:]


def test_rng_neutral_leaves_every_generator_as_it_was() -> None:
    run = Run(1, num_workers=0)
    before = run.generators()
    with rng_neutral():
        iter(run.loader)
        random.random()
        np.random.rand()
        assert run.generators() != before
    assert run.generators() == before


def test_a_plain_loader_is_refused_by_name() -> None:
    tree = make_tree({"data": {"train": DataLoader(Numbers())}})
    with pytest.raises(CaptureError, match=r"data\.train does not know its position.*StatefulDataLoader"):
        tree.walk()


class Positions(Dataset[int]):
    """Draws from a generator of its own that its state_dict holds."""

    def __init__(self) -> None:
        self.generator = random.Random(torch.initial_seed())

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> float:
        return index + self.generator.random()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.setstate(state["generator"])


@pytest.mark.parametrize("place", PLACES)
def test_stateful_sampler_and_data_set(place: int) -> None:
    def make(seed: int) -> Run:
        run = Run(seed)
        data = Positions()
        sampler = StatefulDistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
        run.loader = StatefulDataLoader(data, batch_size=BATCH, sampler=sampler)
        run.tree = make_tree({"data": run.loader})
        return run

    run = make(1)
    snapshot, taken = None, 0
    for where in run.epochs(3):
        if where == place and snapshot is None:
            snapshot, taken = Loopback(run.tree).capture(), len(run.log)
    assert snapshot is not None
    resumed = make(2)
    restore(resumed.tree, snapshot)
    list(resumed.epochs(3, start=1 if place == -1 else 0))
    assert resumed.log == run.log[taken:]
