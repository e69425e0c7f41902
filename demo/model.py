"""A decoder-only transformer over bytes: small enough for two cores, real enough to be worth saving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model; the defaults give 10.8 million parameters."""

    vocabulary: int = 256  # bytes
    width: int = 384
    layers: int = 6
    heads: int = 6
    context: int = 128
    dropout: float = 0.1


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with dropout on both branches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.norm_attention = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.project = nn.Linear(shape.width, shape.width)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(mixed, self.dropout, self.training)
        fed = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + F.dropout(fed, self.dropout, self.training)


class Transformer(nn.Module):
    """Next-byte prediction; the output head is tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.bytes = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of `targets`, both of shape (batch, length) with length <= context."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.bytes(tokens) + self.positions(place), self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.bytes.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
