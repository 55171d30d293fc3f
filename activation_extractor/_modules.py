"""The modules of a model under their plain names, free of the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from activation_extractor.errors import ArgumentTypeError, UnhookableLayerError

# Attributes under which torch.compile, FSDP and activation checkpointing keep the module that they wrap.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def wrapped_segment(module: nn.Module) -> str | None:
    """The attribute under which `module` keeps the module that it wraps; None for an ordinary module."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    return next((name for name, _ in _children(module) if name in WRAPPER_SEGMENTS), None)


def unwrap(module: nn.Module) -> nn.Module:
    """The plain module inside any number of wrappers."""
    while (segment := wrapped_segment(module)) is not None:
        module = module.get_submodule(segment)
    return module


def check_model(model: object) -> nn.Module:
    """`model` itself when hooks can be attached to it, else an error that says why not."""
    if not isinstance(model, nn.Module):
        condition = "be a torch.nn.Module or a function that returns one"
        raise ArgumentTypeError("model", condition, model, "Load the model first.")
    for name, module in model.named_modules():
        if isinstance(module, DataParallel) and len(module.device_ids) > 1:
            advice = "Capture its `.module` on one device, or use DistributedDataParallel with a capture per process."
            raise UnhookableLayerError(name, f"DataParallel over {len(module.device_ids)} devices", advice)
    return model


def check_hookable(name: str, module: nn.Module) -> None:
    """Refuse a module that never calls hooks."""
    if isinstance(module, ScriptModule):
        raise UnhookableLayerError(name, "a TorchScript module, which refuses hooks", "Capture the Python model.")
    if not runs(module):
        advice = f"Select what is in it: {name + '.*'!r}." if name else "Select its layers."
        raise UnhookableLayerError(name, f"a {type(module).__name__}, which has no forward of its own", advice)


def runs(module: nn.Module) -> bool:
    """Whether the module has a forward of its own (a ModuleList has none, so its hooks never fire)."""
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


class ModuleTree:
    """The modules of one model, by plain name.

    Attributes:
        root: the plain model.
        modules: plain name to plain module, in the model's order; a tied module stands under each of its names.
        plain_names: full name, wrappers' segments included, to plain name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = unwrap(model)
        self.modules: dict[str, nn.Module] = {}
        self.plain_names: dict[str, str] = {}
        self._names: dict[int, list[str]] = {}
        for full_name, name, module in _walk(model, "", ""):
            self.plain_names[full_name] = name
            self.modules[name] = module  # the inner module comes later and takes the wrapper's name
            names = self._names.setdefault(id(module), [])
            if name not in names:
                names.append(name)

    def names_of(self, module: nn.Module) -> list[str]:
        """Every plain name of `module`; empty when it is not part of the model."""
        return self._names.get(id(module), [])


def _walk(module: nn.Module, full_name: str, name: str) -> Iterator[tuple[str, str, nn.Module]]:
    yield full_name, name, module
    wrapped = wrapped_segment(module)
    for segment, child in _children(module):
        if child is not None:
            child_name = name if segment == wrapped else _join(name, segment)
            yield from _walk(child, _join(full_name, segment), child_name)


def _children(module: nn.Module) -> Iterable[tuple[str, nn.Module | None]]:
    # named_children() leaves out the second name of a tied child; a TorchScript module's _modules is no dictionary.
    return module.named_children() if isinstance(module, ScriptModule) else module._modules.items()


def _join(name: str, segment: str) -> str:
    return f"{name}.{segment}" if name else segment
