"""Loaders: where they are, and how their next iterator is made after a restore.

`StatefulDataLoader.state_dict()` makes an iterator if there is none, which draws from the global generators
and may start workers; so a loader without an iterator is described from outside. Making an iterator draws
again in the resumed process where the uninterrupted run draws nothing: the first one after a restore
therefore leaves the generators as it found them, if an iterator was alive at the capture. At an epoch's end
the uninterrupted run makes a new one too: then the finished iterator is made neutrally and the new one draws
as usual.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from typing import Any

import torch

from . import rng
from .rng import rng_neutral
from .sources import set_torch_generator, torch_generator_fields

__all__ = ["LoaderState", "is_loader", "is_plain_loader", "restore_loader", "rng_neutral"]

_PENDING = "_snapd_pending_start"


def is_loader(value: object) -> bool:
    module = sys.modules.get("torchdata.stateful_dataloader")
    return module is not None and isinstance(value, module.StatefulDataLoader)


def is_plain_loader(value: object) -> bool:
    return isinstance(value, torch.utils.data.DataLoader) and not hasattr(value, "state_dict")


def _generators(loader: Any) -> list[torch.Generator]:
    """Generators of the loader's own: what it and its sampler draw from."""
    found: list[torch.Generator] = []
    for owner in (loader, loader.sampler, loader.batch_sampler):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
    return found


class LoaderState:
    """Asks a loader for its state without disturbing it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def capture(self) -> dict[str, object]:
        loader = self._loader
        iterator = loader._iterator
        state: object = None
        if iterator is not None:
            state, how = iterator.state_dict(), "finished" if iterator._finished else "alive"
        elif loader.next_iter_state is not None:
            # restored, and not iterated since: what was restored is still what comes next
            pending = vars(loader).get(_PENDING)
            state, how = loader.next_iter_state, "alive" if pending is None else pending.how
        else:
            how = "none"
        return {
            "how": how,
            "state": state,
            "generators": [torch_generator_fields(generator) for generator in _generators(loader)],
        }


def restore_loader(loader: Any, saved: dict[str, Any]) -> None:
    """Tell the loader where it was; its next iterator starts there."""
    forget_pending(loader)
    loader.load_state_dict(saved["state"] if saved["state"] is not None else {})
    if saved["state"] is None:
        loader.next_iter_state = None
    for generator, fields in zip(_generators(loader), saved["generators"], strict=False):
        set_torch_generator(generator, fields)
    if saved["state"] is not None:
        _Pending(loader, saved["how"], saved["generators"]).install()


def forget_pending(loader: Any) -> None:
    pending = vars(loader).get(_PENDING)
    if pending is not None:
        pending.remove()


class _Pending:
    """The start of a restored loader's first iterator: a subclass of the loader's class, for this one object,
    once.
    """

    def __init__(self, loader: Any, how: str, generators: list[dict[str, Any]]) -> None:
        self.how = how
        self._loader, self._class, self._generators = loader, type(loader), generators

    def install(self) -> None:
        pending = self

        class Restored(self._class):  # type: ignore[name-defined, misc]
            def __iter__(self) -> Iterator[Any]:
                pending.remove()
                return pending.start()

        Restored.__name__, Restored.__qualname__ = self._class.__name__, self._class.__qualname__
        Restored.__module__ = self._class.__module__
        vars(self._loader)[_PENDING] = self
        self._loader.__class__ = Restored

    def remove(self) -> None:
        vars(self._loader).pop(_PENDING, None)
        self._loader.__class__ = self._class

    def start(self) -> Iterator[Any]:
        loader = self._loader
        is_finished = self.how == "finished"
        before = rng.capture()
        if is_finished and not (loader.persistent_workers and loader.num_workers):
            _replay_end(loader)
        elif is_finished:
            loader._iterator = loader._get_iterator()
        else:
            iter(loader)
        rng.restore(before)
        for generator, fields in zip(_generators(loader), self._generators, strict=False):
            set_torch_generator(generator, fields)
        if is_finished:
            return iter(loader)
        return loader._iterator  # type: ignore[no-any-return]


def _replay_end(loader: Any) -> None:
    """Bring sampler and data set to the end of an epoch without making the finished iterator.

    To make it would start workers only to stop them, which takes seconds, and would leave a sampler that keeps its
    position itself (StatefulDistributedSampler) at the end of the next epoch too.
    """
    stateful = sys.modules["torchdata.stateful_dataloader.stateful"].Stateful
    state, loader.next_iter_state = loader.next_iter_state, None
    main = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
    sampler = loader._index_sampler
    if isinstance(sampler, stateful) and main.get("_index_sampler_state") is not None:
        sampler.load_state_dict(main["_index_sampler_state"])
    positions = iter(sampler)
    if isinstance(positions, stateful) and main.get("_sampler_iter_state") is not None:
        positions.load_state_dict(main["_sampler_iter_state"])
        collections.deque(positions, maxlen=0)
    elif isinstance(sampler, stateful):
        collections.deque(positions, maxlen=0)
    if isinstance(loader.dataset, stateful) and main.get("dataset_state") is not None:
        loader.dataset.load_state_dict(main["dataset_state"])
