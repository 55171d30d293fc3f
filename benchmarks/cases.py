"""What is measured: each function yields cases, and `CASES` lists the functions.

A new group is a new function here, or in a module beside this one that is added to `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import Capture, capture
from benchmarks.measure import Case, Run
from benchmarks.sizes import Size
from benchmarks.storage import STORAGE

Store = dict[str, Tensor]
Hook = Callable[[nn.Module, Any, Tensor], None]
MakeHook = Callable[[Store, str], Hook]
Mode = Callable[[], AbstractContextManager[Any]]


def all_cases(size: Size) -> list[Case]:
    """Every case, in the order in which they are shown."""
    return [case for cases in CASES for case in cases(size)]


def captured_calls(size: Size) -> Iterator[Case]:
    """What a captured call adds to a layer that does next to nothing, beside a hook that keeps the same."""
    model, x = small_layers(size.layers), torch.randn(4, 16)
    for name, mode, copy, make_hook in _CAPTURED:
        yield Case(
            name=f"captured_call.{name}",
            about=f"one captured call, {'copied' if copy else 'by reference'}",
            ours=partial(captured, model, x, mode, copy=copy),
            reference=partial(hooked, model, x, mode, make_hook),
            floor=partial(bare, model, x, mode),
            calls=size.layers,
            loops=size.loops,
            target=1.2 if copy else 1.35,
            goal=1.1 if copy else 1.2,
        )


def pooled_calls(size: Size) -> Iterator[Case]:
    """What pooling in the hook adds, beside the same reduction in a bare hook: 4 x 128 positions of 256 features."""
    # Layers that hand on what they are given: the time of a Linear would drown what is added to it in noise.
    model, x = nn.Sequential(*(nn.Identity() for _ in range(24))), torch.randn(4, 128, 256, requires_grad=True)
    for name, mode in _MODES.items():
        yield Case(
            name=f"pooled_call.{name}",
            about="one captured call, reduced to its mean",
            ours=partial(captured, model, x, mode, reduce="mean"),
            reference=partial(hooked, model, x, mode, store_mean),
            floor=partial(bare, model, x, mode),
            calls=len(model),
            loops=size.loops,
            target=1.15,
            goal=1.15,
        )


def set_ups(size: Size) -> Iterator[Case]:
    """What entering and leaving a block costs a layer, beside attaching and removing bare hooks."""
    for layers in size.set_up_layers:
        model, x = small_layers(layers), torch.randn(4, 16)
        # An empty block is an error by default, since nothing ran in it.
        prepared = capture(model, "*", missing="skip")
        whole = capture(model, "*")
        loops = max(1, size.loops * size.layers // layers)
        yield Case(
            name=f"set_up.{layers}_layers",
            about="entering and leaving an empty block",
            ours=partial(_timed, partial(enter_and_leave, prepared)),
            reference=partial(_timed, partial(attach_and_remove, model)),
            floor=None,
            calls=layers,
            loops=loops,
            target=3.0,
            goal=2.0,
        )
        yield Case(
            name=f"block.{layers}_layers",
            about="a block around one forward",
            ours=partial(_timed, partial(enter_and_leave, whole, partial(model, x)), torch.inference_mode),
            reference=partial(_timed, partial(attach_and_remove, model, partial(model, x)), torch.inference_mode),
            floor=partial(bare, model, x, torch.inference_mode),
            calls=layers,
            loops=loops,
            target=None,
            goal=None,
        )


CASES: list[Callable[[Size], Iterator[Case]]] = [captured_calls, pooled_calls, set_ups, *STORAGE]


# -- models and systems -----------------------------------------------------------------------------------------------


def small_layers(layers: int) -> nn.Sequential:
    """Layers that compute next to nothing, so that what is added to a call is seen."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))


@contextmanager
def bare(model: nn.Module, x: Tensor, mode: Mode) -> Iterator[Run]:
    """The model alone."""
    with mode():
        yield partial(model, x)


@contextmanager
def hooked(model: nn.Module, x: Tensor, mode: Mode, make_hook: MakeHook) -> Iterator[Run]:
    """The model with a bare forward hook on each child, as one would write it by hand."""
    store: Store = {}
    with mode(), ExitStack() as handles:
        for name, module in model.named_children():
            handles.enter_context(module.register_forward_hook(make_hook(store, name)))
        yield partial(model, x)


@contextmanager
def captured(model: nn.Module, x: Tensor, mode: Mode, **options: Any) -> Iterator[Run]:
    """The model inside of a block that captures its children."""
    with mode(), capture(model, "*", **options):
        yield partial(model, x)


@contextmanager
def _timed(run: Run, mode: Mode = torch.enable_grad) -> Iterator[Run]:
    with mode():
        yield run


def enter_and_leave(prepared: Capture, body: Run | None = None) -> None:
    """One block."""
    with prepared:
        if body is not None:
            body()


def attach_and_remove(model: nn.Sequential, body: Run | None = None) -> None:
    """The hooks of one block, by hand."""
    store: Store = {}
    handles = [module.register_forward_hook(store_clone(store, name)) for name, module in model.named_children()]
    if body is not None:
        body()
    for handle in handles:
        handle.remove()


def store_clone(store: Store, name: str) -> Hook:
    """Keep a copy, where no graph is built."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        store[name] = output.clone()

    return hook


def store_detached_clone(store: Store, name: str) -> Hook:
    """Keep a copy, outside of the graph."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        store[name] = output.detach().clone()

    return hook


def store_itself(store: Store, name: str) -> Hook:
    """Keep the output."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        store[name] = output

    return hook


def store_mean(store: Store, name: str) -> Hook:
    """Keep the mean over the sequence."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        store[name] = output.detach().mean(1)

    return hook


_MODES: dict[str, Mode] = {"inference_mode": torch.inference_mode, "autograd": torch.enable_grad}
_CAPTURED: list[tuple[str, Mode, bool, MakeHook]] = [
    ("inference_mode", torch.inference_mode, True, store_clone),
    ("autograd", torch.enable_grad, True, store_detached_clone),
    ("no_copy.no_grad", torch.no_grad, False, store_itself),
    ("no_copy.autograd", torch.enable_grad, False, store_itself),
]
