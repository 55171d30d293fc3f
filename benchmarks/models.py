"""The models and inputs that cases run."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import require
from benchmarks.sizes import Size

VOCABULARY = 1000
EXPERT_BLOCKS = [f"blocks.{index}" for index in range(12)]


def small_layers(layers: int, device: torch.device | str = "cpu") -> nn.Sequential:
    """Layers that compute next to nothing, so that what is added to a call is seen."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(device)


def experts(modules: int) -> nn.Sequential:
    """Twelve blocks of experts that compute nothing; of modules in all, 14 more than a multiple of 36."""
    each = (modules - 14) // 36
    blocks = (nn.Sequential(*(nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(each))) for _ in range(12))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))


def gpt2(size: Size, *, width: int = 256, has_head: bool = False) -> Any:
    """A GPT-2 with random weights, 12 blocks unless the size says otherwise."""
    require("transformers")
    import transformers

    config = transformers.GPT2Config(
        n_layer=size.blocks,
        n_embd=width,
        n_head=4,
        n_positions=256,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=has_head,
    )
    kind = transformers.GPT2LMHeadModel if has_head else transformers.GPT2Model
    return kind(config).eval().to(size.device)


def block_names(size: Size, stack: str = "h") -> list[str]:
    """The names of its blocks."""
    return [f"{stack}.{index}" for index in range(size.blocks)]


def tokens(size: Size) -> Tensor:
    """One batch of 4 x 128 random tokens, where models run."""
    return token_batches(1)[0]["input_ids"].to(size.device)


def token_batches(batches: int, rows: int = 4, seq: int = 128, vocabulary: int = VOCABULARY) -> list[dict[str, Tensor]]:
    """Batches of random tokens without padding, and a number for each row, on the CPU as a loader gives them."""
    tokens = torch.randint(0, vocabulary, (batches, rows, seq), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(batches * rows).reshape(batches, rows)
    return [{"input_ids": one, "id": row_ids} for one, row_ids in zip(tokens, ids, strict=True)]
