"""Real training states for bench/compression.py: the demo's transformer on real text, at several steps.

    python bench/compression_states.py --out DIR --variant fp32|bf16|int8 [--steps 400]

fp32: AdamW. bf16: parameters and moments. int8: fp32 parameters, AdamW8bit of torchao. DIR/VARIANT/STEP/FIELD.DTYPE has
the bytes of all tensors of a field, one after the other, as they lie in a shard.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # torchao compiles its step, which needs minutes and changes nothing here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import torch
from corpus import Windows, read_corpus
from model import Shape, Transformer

# The last is compared with each of the others: one, ten and two hundred steps before it.
STEPS_BEFORE = (200, 10, 1, 0)


def plain_parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The buffers that a tensor really consists of, each with its attribute's name."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [("", tensor)]
    return [
        (f"{name}{inner and '-' + inner}", part)
        for name in flatten()[0]
        for inner, part in plain_parts(getattr(tensor, name))
    ]


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """FIELD.DTYPE -> the bytes of all tensors of the field."""
    found: dict[str, list[bytes]] = defaultdict(list)

    def add(field: str, tensor: torch.Tensor) -> None:
        for name, part in plain_parts(tensor.detach()):
            dtype = str(part.dtype).removeprefix("torch.")
            data = part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{field}{name and '-' + name}.{dtype}"].append(data)

    for parameter in model.parameters():
        add("parameters", parameter)
        for field, value in optimizer.state[parameter].items():
            if torch.is_tensor(value) and value.numel() > 1:
                add(field, value)
    return {name: b"".join(parts) for name, parts in found.items()}


def make_optimizer(variant: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if variant == "int8":
        import torchao.optim

        optimizer: torch.optim.Optimizer = torchao.optim.AdamW8bit(
            model.parameters(), lr=1e-3, weight_decay=0.1
        )
        return optimizer
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=("fp32", "bf16", "int8"), required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    shape = Shape()
    model = Transformer(shape)
    if args.variant == "bf16":
        model.bfloat16()
    optimizer = make_optimizer(args.variant, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 10, (10 / (n + 1)) ** 0.5)
    )
    windows = Windows(
        read_corpus(), context=shape.context, rank=0, world_size=1, count=args.batch * args.steps
    )
    kept = {args.steps - before for before in STEPS_BEFORE}
    began_s = time.monotonic()
    for step in range(1, args.steps + 1):
        batch = torch.stack([windows[(step - 1) * args.batch + i] for i in range(args.batch)])
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step in kept:
            folder = args.out / args.variant / str(step)
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in state_of(model, optimizer).items():
                (folder / name).write_bytes(data)
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
