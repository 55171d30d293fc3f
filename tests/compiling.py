"""Models that are compiled with taps on them, and what they compute without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from activation_extractor import Activations, capture

quiet = pytest.mark.filterwarnings(  # of torch's own code while it compiles
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor",
    "ignore:'pin_memory' argument",
)
needs_taps = pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no taps")
every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
both_backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])


class Block(nn.Module):
    """A residual block whose ReLU writes to what the layer before it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.relu(self.a(x)))


class Stack(nn.Module):
    """Blocks and a head; the mask is not used, and says which positions are real."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return self.head(x)


def make(blocks: int = 3, kind: type[nn.Module] = Stack) -> Any:
    """A model with the same weights each time, in eval mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    return (kind(blocks) if kind is Stack or issubclass(kind, Stack) else kind()).eval()


def compiled(model: Any, backend: str, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The model compiled without graph breaks, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def eagerly(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> Activations:
    """What a block records of a copy of the model, which has no taps and is not compiled."""
    options = {name: kwargs.pop(name) for name in ("reduce", "calls", "mask") if name in kwargs}
    twin = copy.deepcopy(model)
    with torch.no_grad(), capture(twin, layers, **options) as acts:
        twin(*args, **kwargs)
    return acts


def assert_same(acts: Activations, expected: Activations, tolerance: float = 1e-5) -> None:
    """The same keys and, within rounding, the same values."""
    assert set(acts) == set(expected)
    for key in expected:
        torch.testing.assert_close(acts[key], expected[key], rtol=tolerance, atol=tolerance)
