"""Small models that the tests share, and what is seen on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class BatchNormNet(nn.Module):
    """A convolution, a norm whose output the ReLU behind it overwrites, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(images)))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A residual block, as in a transformer without attention."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.mlp = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class BlockStack(nn.Module):
    """Embedding and blocks ``h.0`` ... ``h.3``; takes an attention mask as language models do, and ignores it."""

    def __init__(self, blocks: int = 4, features: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, features)
        self.h = nn.ModuleList(Block(features) for _ in range(blocks))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.h:
            x = block(x)
        return x


class Repeating(nn.Module):
    """Runs one layer three times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(self.layer(x)))


def output_of(layer: nn.Module, call: Callable[[], object]) -> torch.Tensor:
    """What a layer returns, by a bare hook: releases of transformers differ in what they take for its hidden state."""
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    call()
    handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def count_hooks(model: nn.Module) -> int:
    """All hooks of all kinds on all modules, and stand-ins for a module's call."""
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    kinds += ["_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"]
    hooks = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return hooks + sum("_compiled_call_impl" in module.__dict__ for module in model.modules())
