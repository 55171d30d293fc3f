"""Where a model runs: where its batches go, also when its weights are elsewhere until they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import unwrap


def check_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not made yet, an ArgumentError."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            got, advice = f"none yet for {name}", "Run one batch through it first, which makes them: model(x)."
            raise ArgumentError("model", "have all of its weights", got, advice)


def move(model: nn.Module, device: Any) -> Any:
    """Move a model to a device, unless that is None; returns where batches go: None leaves them where they are.

    A model whose weights are all offloaded, so that a placeholder on ``meta`` is left of each, is not moved. Its
    batches go where accelerate's hooks run it, or else to `device`.

    Raises:
        ArgumentError: the weights are all on ``meta``, and nothing says where the model runs.
    """
    weights: list[Tensor] = list(model.parameters()) or list(model.buffers())
    is_offloaded = bool(weights) and all(weight.is_meta for weight in weights)
    if device is not None and not is_offloaded:
        model.to(device)
    if not weights:
        return None
    if not weights[0].is_meta:
        return weights[0].device
    where = next(_execution_devices(model), device)
    if where is None:
        where = next((weight.device for weight in weights if not weight.is_meta), None)
    if where is None:
        advice = "Load them, offload them with accelerate, or pass device= where code of yours brings them back."
        raise ArgumentError("model", "have weights to compute with", "placeholders on the meta device", advice)
    return where


def without_gradients(model: nn.Module) -> Any:
    """``inference_mode``; ``no_grad`` where torch cannot use weights under it: sparse ones, and those that are cut."""
    is_usual = all(weight.layout is torch.strided for weight in model.parameters()) and not is_collective(model)
    return torch.inference_mode() if is_usual else torch.no_grad()


def devices(model: nn.Module) -> set[torch.device]:
    """The devices that a model computes on."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    found = {tensor.device for tensor in tensors if not tensor.is_meta}
    return found | {torch.device(device) for device in _execution_devices(model)}


def is_collective(model: nn.Module) -> bool:
    """Whether each forward of the model waits for other processes, which must run it at the same time.

    Its parameters are shards (FSDP, tensor parallel). DistributedDataParallel is none: `extract` runs what is in it.
    """
    return model_ranks(model) is not None


def model_ranks(model: nn.Module) -> tuple[int, ...] | None:
    """The global ranks, in order, that run a forward of the model together; None for a model that runs alone.

    Parameters that FSDP left whole after a forward are sharded again.
    """
    is_found, ranks = False, set[int]()
    for module in model.modules():
        if isinstance(module, _distributed("fsdp", "FSDPModule")):
            module.reshard()
            is_found = True
        if isinstance(module, _distributed("fsdp", "FullyShardedDataParallel")):
            ranks.update(distributed.get_process_group_ranks(module.process_group))
    for weight in (*model.parameters(), *model.buffers()):
        if isinstance(weight, _distributed("tensor", "DTensor")):
            ranks.update(weight.device_mesh.mesh.flatten().tolist())
    return tuple(sorted(ranks)) if ranks or is_found else None


def model_group(model: nn.Module, ranks: tuple[int, ...]) -> Any:
    """The process group of the ranks that share a model; None for that of all processes.

    Raises:
        ArgumentError: it has none.
    """
    if len(ranks) == distributed.get_world_size():
        return None
    for module in model.modules():
        if isinstance(module, _distributed("fsdp", "FullyShardedDataParallel")):
            return module.process_group
    for weight in model.parameters():
        if isinstance(weight, _distributed("tensor", "DTensor")) and weight.device_mesh.ndim == 1:
            return weight.device_mesh.get_group()
    advice = "Pass share=None, with a folder for each process, and the same batches to those that share a model."
    raise ArgumentError("model", "be shared by all processes, or along one axis of a mesh", f"ranks {ranks}", advice)


def with_weights(model: nn.Module) -> nn.Module:
    """The module that knows all weights of the plain model: itself, or the FullyShardedDataParallel around it."""
    plain = unwrap(model)
    wrappers = (it for it in model.modules() if isinstance(it, _distributed("fsdp", "FullyShardedDataParallel")))
    return next((wrapper for wrapper in wrappers if unwrap(wrapper) is plain), plain)


def in_this_process(model: nn.Module) -> nn.Module:
    """What runs alone of a model: of a DistributedDataParallel what is in it, which gives the same values.

    Its own forwards send buffers to other processes, which may have no batch left, or not run it at all.
    """
    inner: Any = model
    while (wrapped := getattr(inner, "_orig_mod", None)) is not None:
        inner = wrapped
    is_alone = isinstance(inner, nn.parallel.DistributedDataParallel) and inner.mixed_precision is None
    alone: nn.Module = inner.module if is_alone else model
    return alone


def _distributed(module: str, name: str) -> Any:
    """A class of ``torch.distributed``; where nobody has imported its module, which takes long, no class."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def stored_elsewhere(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Finds a weight of a model, by its name, that accelerate has offloaded; None for one that nobody has."""
    maps = {}
    for name, module in model.named_modules():
        for hook in _accelerate_hooks(module):
            if (weights := getattr(hook, "weights_map", None)) is not None:
                maps[f"{name}." if name else ""] = weights

    def find(name: str) -> Tensor | None:
        for prefix, weights in maps.items():
            if name.startswith(prefix):
                try:
                    found: Tensor = weights[name.removeprefix(prefix)]
                except KeyError:  # it is of another module in this one
                    continue
                return found
        return None

    return find


def _execution_devices(model: nn.Module) -> Iterator[Any]:
    """The devices to which accelerate's hooks bring weights and inputs."""
    for module in model.modules():
        for hook in _accelerate_hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                yield device


def _accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
