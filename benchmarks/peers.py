"""The libraries that a user would pick instead of ours, each used as its own documentation says.

A peer is imported where it is used, so that this module imports with none of them installed. Nothing is copied here
that a library does not copy itself: what comes back is what its user gets.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

RunOnce = Callable[[Tensor], Mapping[str, Tensor]]
Capturing = Callable[[nn.Module, Sequence[str]], AbstractContextManager[RunOnce]]
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Peer:
    """One way to get at activations.

    Attributes:
        name: what it is called in the results.
        package: what is imported; empty for what is always there.
        distribution: what `importlib.metadata.version` knows it by; empty likewise.
        capturing: takes a model and the dotted names of layers, prepares, and yields a function that runs the model
            once and gives the named activations; leaving undoes everything.
    """

    name: str
    package: str
    distribution: str
    capturing: Capturing

    @property
    def is_installed(self) -> bool:
        """Whether its package can be found; nothing is imported."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def wrong_values(peer: Peer, model: nn.Module, names: Sequence[str], x: Tensor) -> int:
    """How many of the named activations are missing or differ from what a cloning hook gives."""
    with cloning_hook(model, names) as run:
        truth = run(x)
    with peer.capturing(model, names) as run:
        found = run(x)
        return sum(name not in found or not _is_same(found[name], truth[name]) for name in names)


def small_cnn() -> nn.Module:
    """Fifteen times convolution, BatchNorm and a ReLU that overwrites what the BatchNorm gave, in eval mode."""
    return nn.Sequential(*(_unit(8 if index else 3, 8) for index in range(15))).eval()


def batch_norms(model: nn.Module) -> list[str]:
    """The names of the layers whose outputs an in-place activation behind them spoils."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def _is_same(found: Tensor, truth: Tensor) -> bool:
    # Not bit for bit: a library may run the same convolution on a copy of the model.
    return found.shape == truth.shape and torch.allclose(found, truth, rtol=1e-4, atol=1e-5)


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # so that the fifteenth still sees something
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


# -- by hand ----------------------------------------------------------------------------------------------------------


@contextmanager
def bare_hook(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """A hook that keeps the output itself."""
    with _hooks(model, names, lambda output: output) as store:
        yield partial(_run_hooked, model, store, lambda output: output)


@contextmanager
def cloning_hook(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """A hook that keeps a copy, outside of the graph."""
    with _hooks(model, names, lambda output: output.detach().clone()) as store:
        yield partial(_run_hooked, model, store, lambda output: output)


@contextmanager
def seed(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """The hook that this project began with: a numpy array, which on a CPU is the output's own memory."""
    with _hooks(model, names, lambda output: output.detach().cpu().numpy()) as store:
        yield partial(_run_hooked, model, store, torch.from_numpy)


@contextmanager
def _hooks(model: nn.Module, names: Sequence[str], keep: Callable[[Tensor], Kept]) -> Iterator[dict[str, Kept]]:
    store: dict[str, Kept] = {}
    with ExitStack() as handles:
        for name in names:
            handles.enter_context(model.get_submodule(name).register_forward_hook(_storing(store, name, keep)))
        yield store


def _storing(store: dict[str, Kept], name: str, keep: Callable[[Tensor], Kept]) -> Callable[..., None]:
    def store_output(module: nn.Module, args: Any, output: Tensor) -> None:
        store[name] = keep(output)

    return store_output


def _run_hooked(
    model: nn.Module, store: dict[str, Kept], hand_out: Callable[[Kept], Tensor], x: Tensor
) -> dict[str, Tensor]:
    store.clear()
    model(x)
    return {name: hand_out(kept) for name, kept in store.items()}


# -- libraries --------------------------------------------------------------------------------------------------------


@contextmanager
def nnsight(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """`tracer.cache`, which is for many layers at once; on a copy, since wrapping replaces each layer's `forward`."""
    from nnsight import NNsight

    wrapped = NNsight(copy.deepcopy(model))
    paths = {name: wrapped.get(name).path for name in names}
    wanted = list(paths.values())

    def run(x: Tensor) -> dict[str, Tensor]:
        with wrapped.trace(x) as tracer:
            cache = tracer.cache(modules=wanted)
        return {name: cache[path].output for name, path in paths.items()}

    yield run


@contextmanager
def transformer_lens(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """A hook point behind each layer of a copy, and `run_with_cache`."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Hooked(HookedRootModule):  # type: ignore[misc]  # it is Any where the package is not installed
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.setup()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    points = {name: HookPoint() for name in names}
    hooked = Hooked(_with_points(copy.deepcopy(model), points))

    def run(x: Tensor) -> dict[str, Tensor]:
        _, cache = hooked.run_with_cache(x)
        return {name: cache[point.name] for name, point in points.items()}

    yield run


def _with_points(model: nn.Module, points: Mapping[str, nn.Module]) -> nn.Module:
    # The deepest first: names below a layer that was wrapped are no longer where they were.
    for name in sorted(points, key=lambda name: name.count("."), reverse=True):
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), points[name]))
    return model


@contextmanager
def torchlens(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """A trace of the whole forward, then the modules' outputs; on leaving, torch's own functions are put back."""
    import torchlens as tl
    from torchlens.backends.torch.wrappers import unwrap_torch, wrap_torch

    def run(x: Tensor) -> dict[str, Tensor]:
        log = tl.trace(model, x)
        return {name: log.modules[name].out for name in names}

    wrap_torch()  # or else the first forward would pay for it
    try:
        yield run
    finally:
        unwrap_torch()


@contextmanager
def captum(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """`LayerActivation` of a list of layers."""
    from captum.attr import LayerActivation

    activation = LayerActivation(model, [model.get_submodule(name) for name in names])

    def run(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, activation.attribute(x), strict=True))

    yield run


@contextmanager
def torchextractor(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """`Extractor` around a copy, since it writes into the modules and takes its hooks off when it is collected."""
    from torchextractor import Extractor

    extractor = Extractor(copy.deepcopy(model), list(names))

    def run(x: Tensor) -> Mapping[str, Tensor]:
        _, features = extractor(x)
        found: Mapping[str, Tensor] = features
        return found

    yield run


@contextmanager
def pyvene(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """A `CollectIntervention` for each layer; on a copy, since gradients are turned off in the model."""
    import pyvene as pv
    from transformers import PretrainedConfig

    copied = copy.deepcopy(model)
    copied.config = PretrainedConfig()  # asked for, though nothing is read from it
    collects = [{"component": f"{name}.output", "intervention": pv.CollectIntervention()} for name in names]
    intervenable = pv.IntervenableModel(collects, model=copied)
    argument = next(iter(inspect.signature(model.forward).parameters))

    def run(x: Tensor) -> dict[str, Tensor]:
        (_, collected), _ = intervenable({argument: x})
        return dict(zip(names, collected, strict=True))

    yield run


@contextmanager
def baukit(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """`TraceDict`, whose block may hold many forwards; the package is on GitHub alone."""
    from baukit import TraceDict

    with TraceDict(model, list(names)) as traces:

        def run(x: Tensor) -> dict[str, Tensor]:
            model(x)
            return {name: traces[name].output for name in names}

        yield run


@contextmanager
def surgeon(model: nn.Module, names: Sequence[str]) -> Iterator[RunOnce]:
    """`Inspect`, the class for outputs of layers; it puts hooks on and off around each forward."""
    from surgeon_pytorch import Inspect

    inspected = Inspect(model, layer={name: name for name in names})

    def run(x: Tensor) -> Mapping[str, Tensor]:
        _, outputs = inspected(x)
        found: Mapping[str, Tensor] = outputs
        return found

    yield run


PEERS: list[Peer] = [
    Peer("bare_hook", "", "", bare_hook),
    Peer("cloning_hook", "", "", cloning_hook),
    Peer("seed", "", "", seed),
    Peer("baukit", "baukit", "baukit", baukit),
    Peer("captum", "captum", "captum", captum),
    Peer("nnsight", "nnsight", "nnsight", nnsight),
    Peer("pyvene", "pyvene", "pyvene", pyvene),
    Peer("surgeon-pytorch", "surgeon_pytorch", "surgeon-pytorch", surgeon),
    Peer("torchextractor", "torchextractor", "torchextractor", torchextractor),
    Peer("torchlens", "torchlens", "torchlens", torchlens),
    Peer("transformer-lens", "transformer_lens", "transformer-lens", transformer_lens),
]
