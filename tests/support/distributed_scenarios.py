"""Distributed ways to train: the matrix's rows under FSDP2 and DDP on two ranks over gloo."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.optimizer_matrix import MATRIX, Row
from tests.support.scenarios import MatrixRun, Scenario


class DistributedRun(MatrixRun):
    """Each rank draws its own data: the global generators are moved apart by rank once the model stands."""

    def __init__(self, row: Row, seed: int, wrap: Any) -> None:
        super().__init__(row, seed, torch.float32, wrap)
        rank = torch.distributed.get_rank()
        torch.manual_seed(seed * 100 + rank)
        random.seed(seed * 100 + rank)
        np.random.seed(seed * 100 + rank)


class EvaluatedFsdp(DistributedRun):
    """An evaluation pass leaves FSDP2's root unsharded when the snapshot is taken."""

    def step(self, number: int) -> None:
        super().step(number)
        self.world.model.eval()
        with torch.no_grad():
            self.world.model(torch.zeros(4, 8, dtype=torch.long))
        self.world.model.train()


def _fsdp(model: Any) -> nn.Module:
    for layer in (model.up, model.down):
        fully_shard(layer)
    fully_shard(model)
    return model


def _ddp(model: Any) -> nn.Module:
    return DistributedDataParallel(model)


def _make(row: Row, wrap: Any, kind: type[DistributedRun] = DistributedRun) -> Scenario:
    return lambda seed: kind(row, seed, wrap)


_ROWS = [row for row in MATRIX if row.works_distributed]
DISTRIBUTED: dict[str, Scenario] = (
    {f"fsdp2-{row.name}": _make(row, _fsdp) for row in _ROWS}
    | {f"ddp-{row.name}": _make(row, _ddp) for row in _ROWS}
    | {"fsdp2-evaluated": _make(_ROWS[0], _fsdp, EvaluatedFsdp)}
)
