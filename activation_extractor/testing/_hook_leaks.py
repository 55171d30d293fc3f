"""Hooks that were left on modules: which they are, on what, and where their functions are defined.

Hooks of torch's own (weight norm, pruning, lazy modules, FSDP, ...) are part of the model and left out: those whose
function, or the class of whose callable object, is defined in torch. So is a function of torch that a user registered.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import MethodType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from activation_extractor._display import short_path, shown
from activation_extractor._private_torch import HOOK_KINDS, children_in, hooks_in
from activation_extractor.layers._modules import ModuleTree

_METHODS = {
    f"register_{one}": f"_{one.removeprefix('full_')}s"
    for one in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "backward_hook")
}

_EXAMPLES = 3
_lock = threading.Lock()
_watches: tuple[HookWatch, ...] = ()
_stand_ins: set[Callable[..., Any]] = set()


@dataclass(frozen=True)
class LeftHook:
    """One hook that is attached.

    Attributes:
        layer: the module's plain name in its model; "" for the model itself, and for a hook on every module.
        module_type: the name of the module's class; "" for a hook on every module.
        model_type: the name of the model's class; None where the module is in no other one that is known.
        kind: ``"forward hook"``, ``"backward pre-hook"``, ``"global forward hook"``, ...
        source: the function's qualified name and where it is defined.
    """

    layer: str
    module_type: str
    model_type: str | None
    kind: str
    source: str

    def __str__(self) -> str:
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
        for hook in _hooks_of(module, attribute).values()
        if not _is_torchs(hook)
    ]


def listed(hooks: Sequence[LeftHook]) -> str:
    """Up to three of `hooks`, and how many more there are."""
    rest = len(hooks) - _EXAMPLES
    return ", ".join(map(str, hooks[:_EXAMPLES])) + (f" and {rest} more" if rest > 0 else "")


class HookWatch:
    """Notes the hooks that are registered while it is on, by any thread, to tell in the end which are still attached.

    Modules are not held, but their hooks are until `stop`: garbage collection plays no part in what is found. A module
    that is gone, or whose model is, is told by its class alone. A hook that came with a copy of its module, or that was
    written to torch's dictionaries by hand, was not registered, and is not noted. Watches may overlap, and end in any
    order.
    """

    def __init__(self) -> None:
        self._noted: dict[tuple[int, int], _Noted] = {}
        self._passed_over: set[tuple[str, int]] = set()  # hooks on every module that are not this watch's concern
        self._pauses = 0
        self._at_stop: list[LeftHook] = []

    def start(self) -> None:
        """Begin, with nothing noted; changes nothing when it is on."""
        global _watches
        with _lock:
            if self not in _watches:
                _install()
                self._noted, self._passed_over, self._at_stop = {}, _global_keys(), []
                _watches = (*_watches, self)

    def stop(self) -> None:
        """End, and let go of the hooks; changes nothing when it is off."""
        global _watches
        with _lock:
            if self not in _watches:
                return
            _watches = tuple(one for one in _watches if one is not self)
            if not _watches:
                _uninstall()
        self._at_stop, self._noted = self._attached(), {}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hooks registered in this block, by any thread, are not noted; blocks may be nested."""
        with _lock:
            self._pauses += 1
            before = _global_keys()
        try:
            yield
        finally:
            with _lock:
                self._pauses -= 1
                self._passed_over |= _global_keys() - before

    def left(self) -> list[LeftHook]:
        """The noted hooks that are attached now, or were when it stopped, in the order of their registration."""
        return self._attached() if self in _watches else list(self._at_stop)

    def note(self, module: nn.Module, attribute: str, handle: object) -> None:
        """Take down what a registration returned; once, also when one registration went through another."""
        if not self._pauses and isinstance(handle, RemovableHandle) and (hooks := handle.hooks_dict_ref()) is not None:
            noted = _Noted(handle.id, hooks, attribute, type(module).__name__, weakref.ref(module))
            self._noted.setdefault((id(hooks), noted.key), noted)

    def _attached(self) -> list[LeftHook]:
        noted = [*self._noted.values(), *(_noted_globally(*one) for one in _global_keys() - self._passed_over)]
        noted.sort(key=lambda one: one.key)  # torch counts its handles, so this is the order of registration
        found = [(one, one.hook) for one in noted]
        found = [(one, hook) for one, hook in found if hook is not None and not _is_torchs(hook)]
        parents = _parents() if found else {}
        return [_tell(one, hook, parents) for one, hook in found]


class _Noted(NamedTuple):
    """A hook that was registered.

    Attributes:
        key: under which it stands in `hooks`.
        hooks: torch's dictionary of a module's hooks of one kind.
        attribute: what that is called.
        module_type: the name of the module's class; "" for a hook on every module.
        module: what gives the module, or None when it is gone.
    """

    key: int
    hooks: dict[int, Any]
    attribute: str
    module_type: str
    module: Callable[[], nn.Module | None]

    @property
    def kind(self) -> str:
        """What it is called by people."""
        return f"{'' if self.module_type else 'global '}{HOOK_KINDS[self.attribute]}"

    @property
    def hook(self) -> Any:
        """The hook; None when it is not attached any more, or the module has another dictionary now."""
        module = self.module()
        hooks = self.hooks if module is None else _hooks_of(module, self.attribute)
        return hooks.get(self.key)


def _noted_globally(attribute: str, key: int) -> _Noted:
    return _Noted(key, _hooks_of(None, attribute), attribute, "", lambda: None)


def _install() -> None:
    methods = {name: vars(nn.Module)[name] for name in _METHODS}
    new = {name: _noting(method, _METHODS[name]) for name, method in methods.items() if method not in _stand_ins}
    for name, stand_in in new.items():
        setattr(nn.Module, name, stand_in)


def _uninstall() -> None:
    # One that another patch was put on top of stays, and does nothing without a watch.
    for name in _METHODS:
        if (method := vars(nn.Module)[name]) in _stand_ins:
            setattr(nn.Module, name, method.__wrapped__)


@cache
def _noting(method: Callable[..., Any], attribute: str) -> Callable[..., Any]:
    @wraps(method)
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = method(self, *args, **kwargs)
        for watch in _watches:
            watch.note(self, attribute, handle)
        return handle

    _stand_ins.add(register)
    return register


def _hooks_of(module: nn.Module | None, attribute: str) -> dict[int, Any]:
    """A module's hooks of one kind; those on every module where it is None."""
    return dict([*hooks_in(module, attribute).items()])


def _global_keys() -> set[tuple[str, int]]:
    return {(attribute, key) for attribute in HOOK_KINDS for key in _hooks_of(None, attribute)}


def _tell(noted: _Noted, hook: Any, parents: dict[int, list[nn.Module]]) -> LeftHook:
    module = noted.module()
    if module is not None:
        largest = max(_outermost(module, parents), key=lambda one: (sum(1 for _ in one.modules()), type(one).__name__))
        with suppress(RecursionError):  # a model that holds itself has no names
            return _on_module(ModuleTree(largest), module, noted.kind, hook)
    return LeftHook("", noted.module_type, None, noted.kind, _source(hook))


def _on_module(tree: ModuleTree, module: nn.Module, kind: str, hook: Any) -> LeftHook:
    layer = tree.names_of(module)[0]
    model_type = type(tree.modules[""]).__name__ if layer else None
    return LeftHook(layer, type(module).__name__, model_type, kind, _source(hook))


def _parents() -> dict[int, list[nn.Module]]:
    parents: dict[int, list[nn.Module]] = {}
    for one in gc.get_objects():
        # The type is asked, since an odd object may answer anything to isinstance, or fail.
        if issubclass(type(one), nn.Module):
            for child in [*children_in(one).values()]:
                parents.setdefault(id(child), []).append(one)
    return parents


def _outermost(module: nn.Module, parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    ancestors, queue = {id(module): module}, [module]
    for one in queue:
        new = [parent for parent in parents.get(id(one), []) if id(parent) not in ancestors]
        ancestors.update((id(parent), parent) for parent in new)
        queue += new
    return [one for one in ancestors.values() if id(one) not in parents] or [module]


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
