"""What capturing adds to models that people run: a transformer, a convolutional network, a compiled model, decoding."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from activation_extractor import capture
from benchmarks.measure import Case, Group, Run
from benchmarks.models import block_names, gpt2, tokens
from benchmarks.peers import batch_norms, small_cnn
from benchmarks.sizes import Size
from benchmarks.systems import (
    Store,
    append_first_clone,
    bare,
    captured,
    hooked,
    prepared,
    ready,
    store_clone,
    store_first_clone,
)


def transformers_blocks(size: Size) -> Iterator[Case]:
    """The output of every block; the output of every module that has no modules inside."""
    model, x = gpt2(size), tokens(size)
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    everything = [name for name in leaves if not name.endswith("attn_dropout")]  # which a fused attention leaves out
    for name, layers in (("blocks", block_names(size)), ("all_leaves", everything)):
        yield Case(
            name=f"transformer.{name}",
            about=f"one of {len(layers)} captured calls, copied: 4 x 128 positions, width 256",
            ours=partial(captured, model, x, torch.inference_mode, layers),
            reference=partial(hooked, model, x, torch.inference_mode, store_first_clone, layers),
            floor=partial(bare, model, x),
            calls=len(layers),
            loops=size.forwards,
            most_rounds=51,
        )


def early_stop(size: Size) -> Iterator[Case]:
    """A forward that ends behind the third of 12 blocks, beside a whole one."""
    model, x = gpt2(size), tokens(size)
    last = f"h.{size.blocks // 4 - 1}"
    yield Case(
        name="early_stop.third_of_12",
        about="a forward cut short behind a quarter of its blocks, beside a whole one",
        ours=partial(captured, model, x, torch.inference_mode, last, stop_early=True),
        reference=partial(bare, model, x),
        calls=1,
        loops=size.forwards,
        target=0.27,
        most_rounds=51,
    )


def batch_norms_of_a_cnn(size: Size) -> Iterator[Case]:
    """The BatchNorms of a network whose ReLUs overwrite their outputs, beside hooks that clone."""
    model, x = small_cnn().to(size.device), torch.randn(2, 3, 32, 32, device=size.device)
    names = batch_norms(model)
    yield Case(
        name="cnn.batch_norms",
        about=f"one of {len(names)} captured calls, copied before an in-place ReLU",
        ours=partial(captured, model, x, torch.inference_mode, names),
        reference=partial(hooked, model, x, torch.inference_mode, store_clone, names),
        floor=partial(bare, model, x),
        calls=len(names),
        loops=size.loops,
    )


def decoding(size: Size) -> Iterator[Case]:
    """Every block in every decoding step, beside hooks that append clones to lists."""
    model, prompt = gpt2(size, width=64, has_head=True), tokens(size)[:1, :8]
    names = block_names(size, "transformer.h")
    generate = partial(generate_greedily, model, prompt, size.new_tokens)
    yield Case(
        name="generate.all_calls",
        about="one captured call of a decoding step, calls='all'",
        ours=partial(ready, partial(generate_captured, generate, model, names)),
        reference=partial(ready, partial(generate_hooked, generate, model, names)),
        floor=partial(ready, generate),
        calls=size.blocks * size.new_tokens,
        loops=1,
        most_rounds=51,
    )


def compiled(size: Size) -> Iterator[Case]:
    """A compiled model in a block, which makes it run eagerly, beside the eager model with hooks that clone."""
    backend, eager, x = working_backend(size), gpt2(size), tokens(size)
    names = block_names(size)
    model = cache(lambda: torch.compile(eager, backend=backend))  # once, and not before it is wanted
    yield Case(
        name="compiled.captured",
        about=f"a forward of a model compiled with {backend}, its blocks captured, beside eager with hooks",
        ours=partial(prepared, lambda: entered(model(), x, names)),
        reference=partial(hooked, eager, x, torch.inference_mode, store_first_clone, names),
        calls=1,
        loops=size.forwards,
        most_rounds=15,
    )
    yield Case(
        name="compiled.given_up",
        about="the same, beside the compiled model alone: what running eagerly costs",
        ours=partial(prepared, lambda: entered(model(), x, names)),
        reference=partial(prepared, lambda: partial(forward, model(), x)),
        calls=1,
        loops=size.forwards,
        most_rounds=15,
    )


WHOLE_MODELS: list[Group] = [
    ("transformer", transformers_blocks),
    ("early_stop", early_stop),
    ("cnn", batch_norms_of_a_cnn),
    ("generate", decoding),
    ("compiled", compiled),
]


# -- systems ----------------------------------------------------------------------------------------------------------


def generate_greedily(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding with a cache."""
    mask = torch.ones_like(prompt)
    generated: Tensor = model.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    return generated


def generate_captured(generate: Run, model: Any, names: list[str]) -> None:
    """Within a block."""
    with capture(model, names, calls="all"):
        generate()


def generate_hooked(generate: Run, model: Any, names: list[str]) -> None:
    """With hooks by hand."""
    store: Store = {}
    handles = [model.get_submodule(name).register_forward_hook(append_first_clone(store, name)) for name in names]
    generate()
    for handle in handles:
        handle.remove()


def working_backend(size: Size) -> str:
    """The backend that compiles, found by a trial: Inductor needs a C++ compiler, and Triton on a GPU."""
    if size.backend != "inductor":
        return size.backend
    try:
        torch.compile(lambda x: x.sin() + 1, backend=size.backend)(torch.ones(64, device=size.device))
    except Exception as error:
        print(f"torch.compile builds nothing here with {size.backend}: {type(error).__name__}", file=sys.stderr)
        return "aot_eager"
    return size.backend


def forward(model: Any, x: Tensor) -> None:
    """A forward."""
    with torch.inference_mode():
        model(x)


def entered(model: Any, x: Tensor, names: list[str]) -> Run:
    """A forward within a block of its own, on a model that is compiled by now."""
    forward(model, x)
    warnings.filterwarnings("ignore", ".* is compiled, and runs eagerly")

    def run() -> None:
        with capture(model, names):
            forward(model, x)

    return run
