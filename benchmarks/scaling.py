"""How the cost of a captured call changes with the number of layers, and of threads that share a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from activation_extractor import capture
from benchmarks.measure import Case, Group, Run, System
from benchmarks.models import small_layers
from benchmarks.sizes import Size
from benchmarks.systems import bare, captured, hooked, store_clone

LAYERS_OF_THREADS, FORWARDS = 20, 5


def layers(size: Size) -> Iterator[Case]:
    """From one layer to a thousand: beside bare hooks, and the most layers beside ten of them."""
    x = torch.randn(4, 16, device=size.device)
    models = {number: small_layers(number, size.device) for number in size.scales}
    for number, model in models.items():
        yield Case(
            name=f"layers.{number}",
            about="one captured call, copied",
            ours=partial(captured, model, x, torch.inference_mode),
            reference=partial(hooked, model, x, torch.inference_mode, store_clone),
            floor=partial(bare, model, x),
            calls=number,
            loops=max(2, size.loops * size.layers // number),
        )
    most, few = size.scales[-1], size.scales[1] if len(size.scales) > 2 else size.scales[0]
    repeats = most // few
    ways: list[tuple[str, float | None, Callable[[nn.Module], System]]] = [
        ("ours", 1.2, lambda model: partial(captured, model, x, torch.inference_mode)),
        ("by_hand", None, lambda model: partial(hooked, model, x, torch.inference_mode, store_clone)),
    ]
    for name, target, system in ways:
        yield Case(
            name=f"layers.{most}_to_{few}.{name}",
            about=f"the cost of a layer among {most}, beside that among {few}",
            ours=system(models[most]),
            reference=partial(repeated, system(models[few]), repeats),
            floor=partial(bare, models[most], x),
            reference_floor=partial(repeated, partial(bare, models[few], x), repeats),
            calls=most,
            loops=2,
            target=target,
        )


def threads(size: Size) -> Iterator[Case]:
    """Threads that share a model, each with a block of its own, beside threads whose values all end up in one dict."""
    model, x = small_layers(LAYERS_OF_THREADS, size.device), torch.randn(4, 16, device=size.device)
    for number in size.threads:
        yield Case(
            name=f"threads.{number}",
            about="one captured call; by hand the values of all threads are mixed",
            ours=partial(in_threads, number, partial(forwards_captured, model, x)),
            reference=partial(hooked_in_threads, number, model, x),
            floor=partial(in_threads, number, partial(forwards, model, x)),
            calls=number * FORWARDS * LAYERS_OF_THREADS,
            loops=2,
            most_rounds=15,
        )


SCALING: list[Group] = [("layers", layers)]
THREADS: list[Group] = [("threads", threads)]


# -- systems ----------------------------------------------------------------------------------------------------------


@contextmanager
def repeated(system: System, times: int) -> Iterator[Run]:
    """A system's run, several times over."""
    with system() as run:

        def run_all() -> None:
            for _ in range(times):
                run()

        yield run_all


@contextmanager
def in_threads(number: int, run: Run) -> Iterator[Run]:
    """A run in each of several threads at once."""
    with ThreadPoolExecutor(number) as pool:

        def run_all() -> None:
            for future in [pool.submit(run) for _ in range(number)]:
                future.result()

        yield run_all


@contextmanager
def hooked_in_threads(number: int, model: nn.Module, x: Tensor) -> Iterator[Run]:
    """Forwards in several threads, with one set of bare hooks."""
    with hooked(model, x, torch.inference_mode, store_clone), in_threads(number, partial(forwards, model, x)) as run:
        yield run


def forwards(model: nn.Module, x: Tensor) -> None:
    """Some forwards."""
    with torch.inference_mode():
        for _ in range(FORWARDS):
            model(x)


def forwards_captured(model: nn.Module, x: Tensor) -> None:
    """Some forwards in a block."""
    with capture(model, "*"):
        forwards(model, x)
