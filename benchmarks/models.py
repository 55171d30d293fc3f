"""A model whose forward costs what a transformer's does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, seq, width)`` to the same."""
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, seq, head_size)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, seq, width))
        changed: Tensor = x + self.mlp(self.norms[1](x))
        return changed


class Transformer(nn.Module):
    """A decoder with the sizes of a small GPT-2: 12 blocks of width 256."""

    def __init__(self, blocks: int = 12, width: int = 256, heads: int = 4, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, input_ids: Tensor) -> Tensor:
        """``(batch, seq)`` token ids to ``(batch, seq, width)``."""
        x: Tensor = self.embed(input_ids)
        for block in self.h:
            x = block(x)
        return x


def token_batches(batches: int, rows: int = 4, seq: int = 128) -> list[dict[str, Tensor]]:
    """Batches of random tokens without padding, and a number for each row."""
    tokens = torch.randint(0, 1000, (batches, rows, seq), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(batches * rows).reshape(batches, rows)
    return [{"input_ids": one, "id": row_ids} for one, row_ids in zip(tokens, ids, strict=True)]
