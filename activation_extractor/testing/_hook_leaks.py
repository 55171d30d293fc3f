"""Hooks that were left on modules: which they are, on what, and where their functions are defined.

Hooks of torch's own (weight norm, pruning, lazy modules, FSDP, ...) are part of the model and left out: those whose
function, or the class of whose callable object, is defined in torch. So is a function of torch that a user registered.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from math import inf
from types import MethodType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from activation_extractor._display import short_path, shown
from activation_extractor._private_torch import HOOK_KINDS, REGISTERING, children_in, hooks_in
from activation_extractor.layers._modules import ModuleTree


@dataclass(frozen=True, repr=False)
class LeftHook:
    """One hook that is attached.

    Attributes:
        layer: the module's plain name in its model; "" for the model itself, and for a hook on every module.
        module_type: the name of the module's class; "" for a hook on every module.
        model_type: the name of the model's class; None where the module is in no other one that is known.
        kind: ``"forward hook"``, ``"backward pre-hook"``, ``"global forward hook"``, ...
        source: the function's qualified name and where it is defined.

    Its repr is a text for people.
    """

    layer: str
    module_type: str
    model_type: str | None
    kind: str
    source: str

    def __repr__(self) -> str:
        model = f" of {self.model_type}" if self.model_type else ""
        where = f" on layer {self.layer!r} ({self.module_type}){model}" if self.layer else f" on a {self.module_type}"
        return f"a {self.kind}{where if self.module_type else ''}: {self.source}"


def hooks_on(model: nn.Module) -> list[LeftHook]:
    """The hooks on the model's modules, wrappers included, in the model's order; none that are on every module."""
    tree = ModuleTree(model)
    return [
        _on_module(tree, module, kind, hook)
        for module in model.modules()
        for attribute, kind in HOOK_KINDS.items()
        for hook in hooks_in(module, attribute).values()
        if not _is_torchs(hook)
    ]


class HookWatch:
    """Finds the hooks that are registered while it is on, by any thread, and are still attached.

    It is on from its making to `stop`. Until then methods of its own stand in the place of those of `nn.Module` that
    register hooks. Comparing the hooks of all live modules before and after each test needs no such methods, but walks
    over the heap, of 40 ms each with transformers imported and of 70 ms with a BERT beside it.

    It holds no modules, but their hooks: garbage collection plays no part in what is found. A module that is gone, or
    whose model is, is named by its class alone. A hook that came with a copy of its module, or that was written to
    torch's dictionaries by hand, was not registered and is not found. Of two watches the later one must stop first.
    """

    def __init__(self) -> None:
        self._first_id = RemovableHandle.next_id  # torch counts its handles
        self._pauses: list[list[float]] = []  # of each, its first id and the first id after it
        self._registered: list[_Registered] = []
        self._methods = {name: self._watched(name, attribute) for name, attribute in REGISTERING.items()}
        for name, method in self._methods.items():
            setattr(nn.Module, name, method)

    def stop(self) -> list[LeftHook]:
        """Put torch's methods back and let go of the hooks; returns `left`, and nothing the second time."""
        for name, method in self._methods.items():
            if vars(nn.Module)[name] is method:  # else another patch is on top of it: ours does nothing from now on
                setattr(nn.Module, name, method.__wrapped__)
        left, self._first_id, self._registered = self.left(), sys.maxsize, []
        return left

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hooks registered in this block, by any thread, are not found; blocks may be nested."""
        ids: list[float] = [RemovableHandle.next_id, inf]
        self._pauses.append(ids)
        try:
            yield
        finally:
            ids[1] = RemovableHandle.next_id

    def left(self) -> list[LeftHook]:
        """The hooks that are attached now, in the order of their registration."""
        on_every_module = [
            _Registered(key, hooks, attribute, "", lambda: None)
            for attribute in HOOK_KINDS
            for hooks in [hooks_in(None, attribute)]
            for key in list(hooks)
        ]
        attached = []
        for registered in sorted([*self._registered, *on_every_module], key=lambda registered: registered.key):
            key, hook = registered.key, registered.hook
            is_new = key >= self._first_id and not any(first <= key < end for first, end in self._pauses)
            if is_new and hook is not None and not _is_torchs(hook):
                attached.append((registered, hook))
        parents = _parents() if attached else {}
        return [_left(registered, hook, parents) for registered, hook in attached]

    def _watched(self, name: str, attribute: str) -> Any:
        method = vars(nn.Module)[name]

        @wraps(method)
        def register(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            handle = method(module, *args, **kwargs)
            hooks = handle.hooks_dict_ref() if isinstance(handle, RemovableHandle) else None
            if hooks is not None and handle.id >= self._first_id:
                registered = _Registered(handle.id, hooks, attribute, type(module).__name__, weakref.ref(module))
                self._registered.append(registered)
            return handle

        return register


class _Registered(NamedTuple):
    """A hook that was registered.

    Attributes:
        key: under which it stands in `hooks`; the id of its handle.
        hooks: torch's dictionary of a module's hooks of one kind.
        attribute: what that is called.
        module_type: the name of the module's class; "" for a hook on every module.
        module: returns the module, or None when it is gone.
    """

    key: int
    hooks: dict[int, Any]
    attribute: str
    module_type: str
    module: Callable[[], nn.Module | None]

    @property
    def hook(self) -> Any:
        """The hook; None when it is not attached any more, or the module has another dictionary now."""
        module = self.module()
        return (self.hooks if module is None else hooks_in(module, self.attribute)).get(self.key)


def _left(registered: _Registered, hook: Any, parents: dict[int, list[nn.Module]]) -> LeftHook:
    module, kind = registered.module(), HOOK_KINDS[registered.attribute]
    if module is not None:
        return _on_module(ModuleTree(_largest_model(module, parents)), module, kind, hook)
    kind = kind if registered.module_type else f"global {kind}"
    return LeftHook("", registered.module_type, None, kind, _source(hook))


def _on_module(tree: ModuleTree, module: nn.Module, kind: str, hook: Any) -> LeftHook:
    layer = tree.names_of(module)[0]
    model_type = type(tree.modules[""]).__name__ if layer else None
    return LeftHook(layer, type(module).__name__, model_type, kind, _source(hook))


def _parents() -> dict[int, list[nn.Module]]:
    """The live modules that hold each module, by its id."""
    parents: dict[int, list[nn.Module]] = {}
    for value in gc.get_objects():
        # The type is asked, since an odd object may answer anything to isinstance, or fail.
        if issubclass(type(value), nn.Module):
            for child in list(children_in(value).values()):
                parents.setdefault(id(child), []).append(value)
    return parents


def _largest_model(module: nn.Module, parents: dict[int, list[nn.Module]]) -> nn.Module:
    """Of the models that hold `module` the one with the most modules; itself where none does."""
    ancestors, queue = {id(module)}, [module]
    for child in queue:
        new = [parent for parent in parents.get(id(child), []) if id(parent) not in ancestors]
        ancestors.update(map(id, new))
        queue += new
    models = [ancestor for ancestor in queue if id(ancestor) not in parents]
    return max(models or [module], key=lambda model: (sum(1 for _ in model.modules()), type(model).__name__))


def _is_torchs(hook: Any) -> bool:
    return str(getattr(_unwrapped(hook), "__module__", None)).split(".")[0] == "torch"


def _unwrapped(hook: Any) -> Any:
    """What is inside partials, bound methods and what `functools.wraps` marks."""
    while True:
        if isinstance(hook, partial):
            hook = hook.func
        elif isinstance(hook, MethodType):
            hook = hook.__func__
        elif "__wrapped__" in getattr(hook, "__dict__", {}):
            hook = hook.__wrapped__
        else:
            return hook


def _source(hook: Any) -> str:
    function = inner = _unwrapped(hook)
    if not hasattr(inner, "__code__"):
        function = _unwrapped(inner.forward if isinstance(inner, nn.Module) else type(inner).__call__)
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(inner.__qualname__) if hasattr(inner, "__qualname__") else shown(inner)
    return f"{function.__qualname__!r} at {short_path(code.co_filename)}:{code.co_firstlineno}"
