"""What a block costs that is made anew for each request: `with capture(model, layers): ...`, beside the way by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from activation_extractor import capture
from benchmarks.measure import Case, Group, Run
from benchmarks.models import EXPERT_BLOCKS, experts, small_layers
from benchmarks.sizes import Size
from benchmarks.systems import Store, enter_and_leave, ready, store_clone

ALLOWED_US = 100.0  # that a block may take beside, however few layers it has


def fresh_blocks(size: Size) -> Iterator[Case]:
    """Making, entering and leaving a block; what it costs may grow with what is asked for, not with the model."""
    for modules in size.fresh_modules:
        model = experts(modules)
        yield _names(f"12_of_{modules}", model, EXPERT_BLOCKS, size)
        yield _pattern(modules, model, max(1, 1000 * size.loops // modules))
    model = small_layers(size.layers)
    yield _names(f"{size.layers}_of_{size.layers}", model, [name for name, _ in model.named_children()], size)


def _names(count: str, model: nn.Module, names: Sequence[str], size: Size) -> Case:
    return Case(
        name=f"set_up.fresh.names.{count}",
        about="making, entering and leaving a block on exact names, beside looking up, hooking and unhooking each",
        ours=partial(ready, partial(make_and_leave, model, names)),
        reference=partial(ready, partial(hook_and_unhook, model, names)),
        calls=1,
        loops=10 * size.loops,
        target=1.5,
        allowed_us=ALLOWED_US,
    )


def _pattern(modules: int, model: nn.Module, loops: int) -> Case:
    return Case(
        name=f"set_up.fresh.pattern.12_of_{modules}",
        about="what a pattern adds to the same on exact names, beside a list of the model's modules",
        ours=partial(ready, partial(make_and_leave, model, "blocks.*")),
        floor=partial(ready, partial(make_and_leave, model, EXPERT_BLOCKS)),
        reference=partial(ready, lambda: list(model.named_modules())),
        reference_floor=partial(ready, lambda: None),
        calls=1,
        loops=loops,
        target=2.0,
    )


def make_and_leave(model: nn.Module, layers: Any, body: Run | None = None) -> None:
    """One block of its own; an empty one is an error by default, since nothing ran in it."""
    enter_and_leave(capture(model, layers, missing="skip"), body)


def hook_and_unhook(model: nn.Module, names: Sequence[str]) -> None:
    """The same by hand."""
    store: Store = {}
    handles = [model.get_submodule(name).register_forward_hook(store_clone(store, name)) for name in names]
    for handle in handles:
        handle.remove()


FRESH: list[Group] = [("set_up", fresh_blocks)]
