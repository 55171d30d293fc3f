"""Keeping our hooks out of copies and pickles of a hooked module.

``copy.deepcopy``, ``pickle`` and ``torch.save`` look up ``__reduce_ex__`` on the instance of a module's hook
dictionary. One that hands on the foreign hooks alone makes a copy that carries none of ours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from activation_extractor._private_compiler import refuse_inlining
from activation_extractor._private_torch import Flags, Hooks

_REDUCE = "__reduce_ex__"
_lock = threading.Lock()
_our_code: set[CodeType] = set()
Hook = TypeVar("Hook", bound=Callable[..., Any])


def hide_ours(all_hooks: Iterable[Hooks]) -> None:
    """Leave our hooks out when one of these dictionaries is copied or pickled."""
    with _lock:
        for hooks in all_hooks:
            if _REDUCE not in hooks.__dict__:
                hooks.__dict__[_REDUCE] = partial(_reduce_foreign, hooks, hooks)


def hide_flags(flags: Flags, hooks: Hooks) -> None:
    """Leave the flags of our hooks out when `flags`, those of `hooks`, are copied or pickled."""
    with _lock:
        if _REDUCE not in flags.__dict__:
            flags.__dict__[_REDUCE] = partial(_reduce_foreign, flags, hooks)


def show_all(all_hooks: Iterable[Hooks], flags: Flags | None = None) -> None:
    """Undo `hide_ours` and `hide_flags` for dictionaries that hold none of our hooks any more."""
    with _lock:
        for hooks in all_hooks:
            if hooks and any(map(is_ours, _entries(hooks).values())):
                continue
            hooks.__dict__.pop(_REDUCE, None)
            if flags is not None:
                flags.__dict__.pop(_REDUCE, None)


def ours(hook: Hook) -> Hook:
    """A decorator for the hooks of captures, which must not reach copies of a module."""
    never_copied(hook)
    refuse_inlining(hook, "a block of activation_extractor is open: export the model outside of it")
    return hook


def never_copied(hook: Callable[..., Any]) -> None:
    """Leave a hook of ours out of copies of a module."""
    _our_code.add(hook.__code__)


def is_ours(hook: object) -> bool:
    """Whether a hook, or the function that a bound one is made of, is decorated with `ours`."""
    return getattr(hook, "__code__", None) in _our_code


def _reduce_foreign(entries: dict[int, Any], hooks: Hooks, protocol: Any) -> Any:
    attached = _entries(hooks)
    foreign = ((key, entry) for key, entry in _entries(entries).items() if not is_ours(attached.get(key)))
    return OrderedDict(foreign).__reduce_ex__(protocol)


def _entries(entries: dict[int, Any]) -> dict[int, Any]:
    """The dictionary as it is at one moment: other threads attach and take off hooks meanwhile."""
    return dict([*entries.items()])  # unpacking runs no Python code, so no other thread either
