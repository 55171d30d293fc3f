"""What taps cost in compiled graphs: while nobody captures, while a block records, and beside running eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import capture, instrument
from benchmarks.measure import Case, Group, Run, UnavailableError
from benchmarks.models import block_names, gpt2, tokens
from benchmarks.sizes import Size
from benchmarks.systems import prepared
from benchmarks.whole_models import forward, working_backend


class Layers(nn.Module):
    """Layers that compute little, each a `tanh` of a `Linear(16, 16)`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """All of them, one behind the other."""
        for layer in self.h:
            x = layer(x)
        return x


def taps_of_a_transformer(size: Size) -> Iterator[Case]:
    """A compiled transformer with a tap behind each block, beside the same one without."""
    make, names = _models(size, lambda: gpt2(size), block_names(size)), block_names(size)
    x = tokens(size)
    bare = partial(prepared, lambda: _warm(make()[0], x))
    cases: list[tuple[str, str, float | None, Callable[[Any, Any], Run]]] = [
        ("inert", "nobody captures", 1.02, lambda _, model: partial(forward, model, x)),
        ("mean", "a block records means", 1.05, lambda root, model: _in_block(root, model, x, names, reduce="mean")),
        ("whole", "a block records whole values", None, lambda root, model: _in_block(root, model, x, names)),
        ("elsewhere", "a block of another thread waits", 1.02, lambda root, model: _beside(root, model, x, names)),
    ]
    for name, about, target, make_run in cases:
        yield Case(
            name=f"taps.transformer.{name}",
            about=f"a compiled forward with {len(names)} taps, {about}, beside the compiled model alone",
            ours=partial(prepared, partial(_warmed, make, x, make_run)),
            reference=bare,
            calls=1,
            loops=size.forwards,
            target=target,
            most_rounds=51,
        )


def one_tap(size: Size) -> Iterator[Case]:
    """One tap of a hundred in a graph that computes little, in time."""
    layers = 100 if size.layers >= 100 else 10
    names = [f"h.{index}" for index in range(layers)]
    make, x = (
        _models(size, lambda: Layers(layers).to(size.device).eval(), names),
        torch.randn(4, 16, device=size.device),
    )
    bare = partial(prepared, lambda: _warm(make()[0], x))
    yield Case(
        name=f"taps.one_of_{layers}",
        about="a tap in a graph while nobody captures, beside one while a block records whole values",
        ours=partial(prepared, lambda: _warm(make()[2], x)),
        reference=partial(prepared, lambda: _in_block(*make()[1:], x, names)),
        floor=bare,
        calls=layers,
        loops=size.loops,
        most_rounds=101,
    )


TAPS: list[Group] = [("taps", taps_of_a_transformer), ("taps", one_tap)]


# -- systems ----------------------------------------------------------------------------------------------------------


def _models(size: Size, make: Callable[[], nn.Module], names: list[str]) -> Callable[[], tuple[Any, Any, Any]]:
    """What makes, once: a compiled model, its twin with taps, and the twin compiled."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        raise UnavailableError(f"torch {torch.__version__} has no taps")

    @cache
    def models() -> tuple[Any, Any, Any]:
        backend, model = working_backend(size), make()
        twin = copy.deepcopy(model)
        instrument(twin, names)
        return torch.compile(model, backend=backend), twin, torch.compile(twin, backend=backend)

    return models


def _warm(model: Any, x: Tensor) -> Run:
    """A forward of a model that is compiled by now."""
    forward(model, x)
    return partial(forward, model, x)


def _warmed(make: Callable[[], tuple[Any, Any, Any]], x: Tensor, make_run: Callable[[Any, Any], Run]) -> Run:
    _, root, model = make()
    forward(model, x)
    return make_run(root, model)


def _in_block(root: nn.Module, model: Any, x: Tensor, names: list[str], **options: Any) -> Run:
    """A forward within a block of its own."""
    forward(model, x)
    block = capture(root, names, **options)

    def run() -> None:
        with block:
            forward(model, x)

    return run


def _beside(root: nn.Module, model: Any, x: Tensor, names: list[str]) -> Run:
    """A forward, while a block of another context is open, which hears of it and records nothing."""
    block = capture(root, names, missing="skip")

    def run() -> None:
        elsewhere = copy_context()
        elsewhere.run(block.__enter__)
        forward(model, x)
        elsewhere.run(block.__exit__, None, None, None)

    return run
