"""The systems that cases compare: a model alone, with hooks by hand, inside of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import Capture, capture
from benchmarks.measure import Run

Store = dict[str, Any]
Hook = Callable[[nn.Module, Any, Any], None]
MakeHook = Callable[[Store, str], Hook]
Mode = Callable[[], AbstractContextManager[Any]]

MODES: dict[str, Mode] = {"inference_mode": torch.inference_mode, "autograd": torch.enable_grad}


@contextmanager
def bare(model: nn.Module, x: Tensor, mode: Mode = torch.inference_mode) -> Iterator[Run]:
    """The model alone."""
    with mode():
        yield partial(model, x)


@contextmanager
def hooked(
    model: nn.Module, x: Tensor, mode: Mode, make_hook: MakeHook, layers: Sequence[str] | None = None
) -> Iterator[Run]:
    """The model with a bare forward hook on each layer, on each child if none are named, as one would by hand."""
    names = [name for name, _ in model.named_children()] if layers is None else layers
    store: Store = {}
    with mode(), ExitStack() as handles:
        for name in names:
            handles.enter_context(model.get_submodule(name).register_forward_hook(make_hook(store, name)))
        yield partial(model, x)


@contextmanager
def captured(model: nn.Module, x: Tensor, mode: Mode, layers: Any = "*", **options: Any) -> Iterator[Run]:
    """The model inside of a block that captures these layers, its children if none are named."""
    with mode(), capture(model, layers, **options):
        yield partial(model, x)


@contextmanager
def prepared(prepare: Callable[[], Run]) -> Iterator[Run]:
    """A run that needs something made first."""
    yield prepare()


@contextmanager
def ready(run: Run, mode: Mode = torch.enable_grad) -> Iterator[Run]:
    """A run that needs nothing."""
    with mode():
        yield run


def enter_and_leave(prepared: Capture, body: Run | None = None) -> None:
    """One block."""
    with prepared:
        if body is not None:
            body()


def attach_and_remove(model: nn.Module, body: Run | None = None) -> None:
    """The hooks of one block, by hand."""
    store: Store = {}
    handles = [module.register_forward_hook(store_clone(store, name)) for name, module in model.named_children()]
    if body is not None:
        body()
    for handle in handles:
        handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The tensor that a hook written for this model would take."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


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


def store_first_clone(store: Store, name: str) -> Hook:
    """Keep a copy of what may be the first of several."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        store[name] = first_tensor(output).clone()

    return hook


def append_first_clone(store: Store, name: str) -> Hook:
    """Keep a copy of each call's."""
    calls = store.setdefault(name, [])

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(first_tensor(output).clone())

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
