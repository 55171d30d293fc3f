"""What one captured call costs, and entering and leaving a block: models whose layers do next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from activation_extractor import capture
from benchmarks.measure import Case, Group
from benchmarks.models import small_layers
from benchmarks.sizes import Size
from benchmarks.systems import (
    MODES,
    MakeHook,
    Mode,
    attach_and_remove,
    bare,
    captured,
    enter_and_leave,
    hooked,
    ready,
    store_clone,
    store_detached_clone,
    store_itself,
    store_mean,
)

_CAPTURED: list[tuple[str, Mode, bool, MakeHook]] = [
    ("inference_mode", torch.inference_mode, True, store_clone),
    ("autograd", torch.enable_grad, True, store_detached_clone),
    ("no_copy.no_grad", torch.no_grad, False, store_itself),
    ("no_copy.autograd", torch.enable_grad, False, store_itself),
]


def captured_calls(size: Size) -> Iterator[Case]:
    """What a captured call adds to a layer that does next to nothing, beside a hook that keeps the same."""
    model, x = small_layers(size.layers, size.device), torch.randn(4, 16, device=size.device)
    for name, mode, copy, make_hook in _CAPTURED:
        yield Case(
            name=f"captured_call.{name}",
            about=f"one captured call, {'copied' if copy else 'by reference'}",
            ours=partial(captured, model, x, mode, copy=copy),
            reference=partial(hooked, model, x, mode, make_hook),
            floor=partial(bare, model, x, mode),
            calls=size.layers,
            loops=size.loops,
            target=1.1 if copy else 1.2,
        )


def pooled_calls(size: Size) -> Iterator[Case]:
    """What pooling in the hook adds, beside the same reduction in a bare hook: 4 x 128 positions of 256 features."""
    # Layers that hand on what they are given: the time of a Linear would drown what is added to it in noise.
    model = nn.Sequential(*(nn.Identity() for _ in range(24)))
    x = torch.randn(4, 128, 256, device=size.device, requires_grad=True)
    for name, mode in MODES.items():
        yield Case(
            name=f"pooled_call.{name}",
            about="one captured call, reduced to its mean",
            ours=partial(captured, model, x, mode, reduce="mean"),
            reference=partial(hooked, model, x, mode, store_mean),
            floor=partial(bare, model, x, mode),
            calls=len(model),
            loops=size.loops,
            target=1.15,
        )


def set_ups(size: Size) -> Iterator[Case]:
    """What entering and leaving a block costs a layer, beside attaching and removing bare hooks."""
    for layers in size.set_up_layers:
        model = small_layers(layers, size.device)
        # An empty block is an error by default, since nothing ran in it.
        empty = capture(model, "*", missing="skip")
        yield Case(
            name=f"set_up.{layers}_layers",
            about="entering and leaving an empty block",
            ours=partial(ready, partial(enter_and_leave, empty)),
            reference=partial(ready, partial(attach_and_remove, model)),
            calls=layers,
            loops=max(1, size.loops * size.layers // layers),
            target=2.0,
        )


def blocks(size: Size) -> Iterator[Case]:
    """What a block around one forward adds to it, beside hooks that are attached for it and removed."""
    for layers in size.set_up_layers:
        model, x = small_layers(layers, size.device), torch.randn(4, 16, device=size.device)
        whole = capture(model, "*")
        yield Case(
            name=f"block.{layers}_layers",
            about="a block around one forward",
            ours=partial(ready, partial(enter_and_leave, whole, partial(model, x)), torch.inference_mode),
            reference=partial(ready, partial(attach_and_remove, model, partial(model, x)), torch.inference_mode),
            floor=partial(bare, model, x),
            calls=layers,
            loops=max(1, size.loops * size.layers // layers),
        )


CALLS: list[Group] = [
    ("captured_call", captured_calls),
    ("pooled_call", pooled_calls),
    ("set_up", set_ups),
    ("block", blocks),
]
