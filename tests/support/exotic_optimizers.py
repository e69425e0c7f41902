"""Small optimizers that keep their state the way real ones do: where a state_dict loses it.

Each names the package whose habit it copies. All update the parameters from that state, so a loss shows in the numbers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Params = Iterable[nn.Parameter]


class Base(torch.optim.Optimizer):
    def __init__(self, params: Params, **defaults: Any) -> None:
        super().__init__(params, {"lr": 1e-2, **defaults})

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        raise AssertionError("each optimizer has its own")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.update(p, self.state[p], group), alpha=group["lr"])


class WarmUpFlag(Base):
    """sgd-sai: a flag on the instance decides whether the statistics are taken again."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.has_warmup = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.has_warmup:
            for p in self.param_groups[0]["params"]:
                self.state[p]["gsnr"] = p.grad.norm() / (p.grad.var() + 1e-3)
            self.has_warmup = True
        super().step()

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        return p.grad * state["gsnr"]


class Projector:
    """galore-torch: an object in the state, with tensors and settings."""

    def __init__(self, rank: int) -> None:
        self.rank, self.ortho_matrix, self.turn = rank, None, 0

    def project(self, grad: torch.Tensor) -> torch.Tensor:
        if self.turn % 3 == 0:
            self.ortho_matrix = torch.linalg.svd(grad, full_matrices=False)[2][: self.rank]
        self.turn += 1
        return grad @ self.ortho_matrix.t() @ self.ortho_matrix


class Galore(Base):
    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        if p.ndim != 2:
            return p.grad
        projector = state.setdefault("projector", Projector(4))
        state["average"] = state.get("average", torch.zeros_like(p)) * 0.9 + projector.project(p.grad)
        return state["average"]


class NestedProjector:
    """Natural GaLore: the projector trains its own matrix with an optimizer of its own."""

    def __init__(self, size: int) -> None:
        self.matrix = nn.Parameter(torch.eye(size))
        self.optimizer = torch.optim.AdamW([self.matrix], lr=1e-2)

    @torch.enable_grad()
    def project(self, grad: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        ((grad.detach() @ self.matrix - grad.detach()).square().sum() + self.matrix.square().sum()).backward()
        self.optimizer.step()
        return grad @ self.matrix.detach()


class NaturalGalore(Base):
    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        if p.ndim != 2:
            return p.grad
        return state.setdefault("projector", NestedProjector(p.shape[1])).project(p.grad)


class ProbScheduler:
    """kron-torch: a schedule with a function inside."""

    def __init__(self) -> None:
        self.scale, self.curve = 0.7, lambda x: 1.0 / (1 + x)


class Kron(Base):
    """kron-torch: a private random.Random, counters as tensors, nested tuples of text, a deque, sets and int keys."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, schedule=ProbScheduler())
        self.rng = random.Random(5318008)
        self._prob_step = torch.tensor(0, dtype=torch.int32)
        self._update_counter = torch.tensor(0.0, dtype=torch.float64)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._prob_step += 1
        self._update_counter += self.param_groups[0]["schedule"].scale
        self.doubled = self.rng.random() < 0.5
        super().step()

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        view = state.setdefault(0, {"exprs": ("ab,cd->ad", (("x", "y"),)), "Q": [torch.ones(3), [], None]})
        queue = state.setdefault("grad_queue", deque(maxlen=2))
        queue.append(p.grad.clone())
        betas = state.setdefault("momentum_buffer", {0.0: torch.zeros_like(p), 0.9: torch.zeros_like(p)})
        for beta, buffer in betas.items():
            buffer.mul_(beta).add_(queue[0])
        view["Q"][0] += 1
        state.setdefault("is_initialized", set()).add(len(queue))
        scale = (2.0 if self.doubled else 1.0) * group["schedule"].curve(float(self._update_counter))
        return (betas[0.9] + betas[0.0]) * scale * float(view["Q"][0][0]) * len(state["is_initialized"])


class SharedTables(Base):
    """bitsandbytes: one map for all parameters, the same tensor object; codes of another dtype than the parameter."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.qmap = torch.linspace(-1, 1, 256)

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        if not state:
            state.update(step=0, qmap=self.qmap, codes=torch.full(p.shape, 127, dtype=torch.uint8))
            state["absmax"] = torch.ones((), dtype=torch.float64)
        value = state["qmap"][state["codes"].int()] * state["absmax"].float() * 0.9 + p.grad
        state["absmax"] = value.abs().max().double() + 1e-9
        distance = (value / state["absmax"].float()).unsqueeze(-1) - state["qmap"]
        state["codes"] = distance.abs().argmin(-1).to(torch.uint8)
        state["step"] += 1
        return value


class Magma(torch.optim.Optimizer):
    """pytorch-optimizer's magma: wraps another optimizer and keeps a side table keyed by id(parameter)."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self._magma: dict[int, dict[str, Any]] = {}
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                side = self._magma.setdefault(id(p), {"scale": 1.0, "ema": torch.zeros_like(p)})
                side["ema"].mul_(0.9).add_(p.grad)
                side["scale"] *= 0.97
                p.grad.mul_(side["scale"]).add_(side["ema"], alpha=0.1)
        self.base.step()


class Mkor(Base):
    """MKOR: second-order factors in lists on the optimizer, filled by hooks of the modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())
        self.modules = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.factors: list[torch.Tensor | None] = [None] * len(self.modules)
        for number, module in enumerate(self.modules):
            module.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            seen = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().square().mean(0)
            old = self.factors[number]
            self.factors[number] = seen if old is None else old * 0.9 + seen

        return note

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        for number, module in enumerate(self.modules):
            if module.weight is p:
                return p.grad / (1 + self.factors[number].to(p.dtype))
        return p.grad


class Kfac(Base):
    """KFAC implementations: a table keyed by module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())
        self.seen: dict[nn.Module, torch.Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any) -> None:
        now = inputs[0].detach().float().square().mean()
        self.seen[module] = self.seen.get(module, torch.zeros(())) * 0.9 + now

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        for module, seen in self.seen.items():
            if module.weight is p:
                return p.grad / (1 + seen.to(p.dtype))
        return p.grad


class NonParameterKeys(Base):
    """pytorch-optimizer's spam and emonavi: entries in `state` that belong to no parameter; attributes that count."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.state["total_step"] = 0
        self.state["ema"] = {"short": 0.0, "long": 0.0}
        self.prev_loss: float | None = None
        self.history: list[float] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["total_step"] += 1
        norm = float(self.param_groups[0]["params"][0].grad.norm())
        self.state["ema"]["short"] = 0.5 * self.state["ema"]["short"] + norm
        self.history.append(norm if self.prev_loss is None else norm - self.prev_loss)
        self.prev_loss = norm
        super().step()

    def update(self, p: nn.Parameter, state: dict[Any, Any], group: dict[str, Any]) -> torch.Tensor:
        return (
            p.grad
            * (1 + self.state["ema"]["short"])
            * (1 + 1 / self.state["total_step"])
            * (1 + sum(self.history))
        )


EXOTIC: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "flag on the instance": lambda m: WarmUpFlag(m.parameters()),
    "projector object": lambda m: Galore(m.parameters()),
    "optimizer in the state": lambda m: NaturalGalore(m.parameters()),
    "random, deque, sets": lambda m: Kron(m.parameters()),
    "shared tables": lambda m: SharedTables(m.parameters()),
    "table by id": lambda m: Magma(torch.optim.AdamW(m.parameters(), lr=1e-2)),
    "lists by module": Mkor,
    "tables by module": Kfac,
    "keys without parameter": lambda m: NonParameterKeys(m.parameters()),
}
