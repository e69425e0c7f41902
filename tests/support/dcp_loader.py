"""Loads an export with torch alone, on as many ranks as there are: `torchrun dcp_loader.py CHECKPOINT REFERENCES`.

The model is export_trainer.py's; the whole tensors are compared with what two ranks had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.leaving import leave_together


def main(checkpoint: Path, references: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(99)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 48))
    model[2].bias.requires_grad_(False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, amsgrad=True)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    parts = [torch.load(references / f"reference-{rank}.pt", weights_only=True) for rank in range(2)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, fields in optimizer.state.items():
        found.update({f"optimizer.state.model.{names[parameter]}.{f}": t for f, t in fields.items()})
    differing = []
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        pieces = [part[name] for part in parts]
        is_sharded = isinstance(tensor, DTensor)
        expected = torch.cat(pieces) if is_sharded else pieces[0]
        if not torch.equal(whole, expected):
            differing.append(name)
    if dist.get_rank() == 0:
        rates = [group["lr"] for group in optimizer.param_groups]
        print(json.dumps({"count": len(found), "differing": differing, "lr": rates}), flush=True)
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
