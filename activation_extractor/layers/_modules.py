"""The modules of a model under their plain names, free of the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from activation_extractor._private_torch import children_of, has_forward
from activation_extractor.errors import ArgumentTypeError, UnhookableLayerError

# Attributes under which torch.compile, FSDP and activation checkpointing keep the module that they wrap.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PLACES = WRAPPER_SEGMENTS | {"module"}
_MOST_NAMES = 100

Visited = list[tuple[str, str, nn.Module]]  # full name, plain name and module, wrappers before what they wrap


def unwrap(module: nn.Module) -> nn.Module:
    """The plain module inside any number of wrappers."""
    while (segment := _wrapped_segment(module, children_of(module))) is not None:
        module = module.get_submodule(segment)
    return module


def check_model(model: object) -> nn.Module:
    """`model` itself.

    Raises:
        ArgumentTypeError: it is no module.
        UnhookableLayerError: it is a DataParallel over several devices.
    """
    if not isinstance(model, nn.Module):
        condition = "be a torch.nn.Module or a function that returns one"
        raise ArgumentTypeError("model", condition, model, "Load the model first.")
    ModuleTree(model).find("")  # raises for a wrapper that calls replicas
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()``; afterwards each module's training flag as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        try:
            model.eval()
        except RecursionError:  # from torch, where a child holds its parent
            for module, _ in flags:
                module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def check_hookable(name: str, module: nn.Module) -> None:
    """Refuse a module that never calls hooks.

    Raises:
        UnhookableLayerError: it is one of TorchScript, or has no forward.
    """
    if isinstance(module, ScriptModule):
        raise UnhookableLayerError(name, "a TorchScript module, which refuses hooks", "Capture the Python model.")
    if not has_forward(module):
        advice = f"Select what is in it: {name + '.*'!r}." if name else "Select its layers."
        if not children_of(module):
            advice = "Leave it out: it holds no layer. Of an exported program capture the model that it was made of."
        raise UnhookableLayerError(name, f"a {type(module).__name__}, which has no forward of its own", advice)


class ModuleTree:
    """The modules of one model, by plain name.

    `find` goes down to a layer; everything else visits the whole model, once, when it is first asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def find(self, name: str) -> tuple[str, nn.Module] | None:
        """The plain name and the plain module of a layer, or None.

        Args:
            name: its plain name, or one with segments of wrappers, whether the model has these wrappers or not.

        Raises:
            UnhookableLayerError: it lies in a DataParallel over several devices, which calls replicas of it.
        """
        segments = name.split(".") if name else []
        if (module := self._at(self._model, segments)) is not None:
            return name, module
        for plain in (self._plain(segments), [segment for segment in segments if segment not in WRAPPER_SEGMENTS]):
            if plain not in (None, segments) and (module := self._at(self._model, plain)) is not None:
                return ".".join(plain), module
        # A child's own name may hold a dot: then its name is found only among all names.
        return (name, self.modules[name]) if name in self.modules else None

    def check(self, names: Iterable[str]) -> None:
        """Raise for the first of these layers that `find` refuses."""
        if self._has_replicas:
            for name in names:
                self.find(name)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Plain name to plain module, in the model's order; a tied module stands under each of its names.

        But for two names, which only `find` knows: those that lead back to a module that they lead through, and those
        that lead through a module which `_MOST_NAMES` earlier names lead through. Where modules are shared on every
        level, the number of all names is exponential in their depth.
        """
        # The inner module comes later and takes the wrapper's name.
        return {name: module for _, name, module in self._visited}

    @cached_property
    def full_names(self) -> dict[str, str]:
        """Full name, wrappers' segments included, to plain name."""
        return {full_name: name for full_name, name, _ in self._visited}

    def names_of(self, module: nn.Module) -> list[str]:
        """Every plain name of `module`; empty when it is not part of the model."""
        return list(self._names.get(id(module), ()))

    @cached_property
    def _names(self) -> dict[int, dict[str, None]]:
        names: dict[int, dict[str, None]] = {}
        for _, name, module in self._visited:
            names.setdefault(id(module), {})[name] = None
        return names

    @cached_property
    def _visited(self) -> Visited:
        model = self._model
        return _visit(model, children_of(model), "", "", [("", "", model)], {}, {id(model)})

    @cached_property
    def _has_replicas(self) -> bool:
        return any(issubclass(it, DataParallel) for it in {type(module) for _, _, module in self._visited})

    def _at(self, module: nn.Module, plain: Sequence[str]) -> nn.Module | None:
        """What `modules` has under the name of `module` and these further segments."""
        while (wrapped := _wrapped_segment(module, children := children_of(module))) is None:
            if not plain:
                return module
            if (child := children.get(plain[0])) is None:
                return None
            module, plain = child, plain[1:]
        # Further children of a wrapper share the names of what it wraps: `modules` has the later one.
        for segment in [it for it in reversed(children) if it == wrapped or it in plain[:1]]:
            child = children[segment]
            layer = None if child is None else self._at(child, plain if segment == wrapped else plain[1:])
            if layer is not None:
                self._refuse_replicas(module)
                return layer
        return None if plain else module

    def _plain(self, full: Sequence[str]) -> list[str] | None:
        """The segments of a full name that are no wrapper's; None when there is no such module."""
        module: nn.Module | None = self._model
        plain = []
        for segment in full:
            if module is None:
                return None
            children = children_of(module)
            if segment != _wrapped_segment(module, children):
                plain.append(segment)
            module = children.get(segment)
        return None if module is None else plain

    def _refuse_replicas(self, module: nn.Module) -> None:
        if isinstance(module, DataParallel) and len(module.device_ids) > 1:
            name = next(full_name for full_name, _, candidate in self._visited if candidate is module)
            advice = "Capture its `.module` on one device, or use DistributedDataParallel with a capture per process."
            raise UnhookableLayerError(name, f"DataParallel over {len(module.device_ids)} devices", advice)


def _visit(
    module: nn.Module,
    children: dict[str, nn.Module | None],
    full_name: str,
    name: str,
    visited: Visited,
    visits: dict[int, int],
    around: set[int],
) -> Visited:
    """`visited`, with the modules below `module` added to it.

    By id, `visits` has how often each module was gone into, and `around` those that the name leads through. Neither is
    asked for a module without children, as most are.
    """
    wrapped = _wrapped_segment(module, children)
    full_prefix, prefix = f"{full_name}." if full_name else "", f"{name}." if name else ""
    is_plain = wrapped is None and full_name == name  # then one string is both names
    for segment, child in children.items():
        if child is None:
            continue
        plain_child = name if segment == wrapped else prefix + segment
        full_child = plain_child if is_plain else full_prefix + segment
        if not (below := children_of(child)):
            visited.append((full_child, plain_child, child))
        elif (key := id(child)) not in around:  # a child that holds its parent is left out
            visited.append((full_child, plain_child, child))
            if (times := visits.get(key, 0)) < _MOST_NAMES:
                visits[key] = times + 1
                around.add(key)
                _visit(child, below, full_child, plain_child, visited, visits, around)
                around.discard(key)
    return visited


def _wrapped_segment(module: nn.Module, children: dict[str, nn.Module | None]) -> str | None:
    """The attribute under which `module` keeps the module that it wraps; None for an ordinary module."""
    if children.keys().isdisjoint(_PLACES):
        return None
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    return next((segment for segment in children if segment in WRAPPER_SEGMENTS), None)
