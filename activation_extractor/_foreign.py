"""Keeping our hooks out of copies and pickles of a hooked module.

``copy.deepcopy``, ``pickle`` and ``torch.save`` look up ``__reduce_ex__`` on the instance of a module's hook
dictionary. One that hands on the foreign hooks alone makes a copy that carries none of ours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

# Typed as torch declares them; they are OrderedDicts, whose instances can have attributes.
Hooks = dict[int, Callable[..., Any]]
Flags = dict[int, bool]


_lock = threading.Lock()


def hide_ours(hooks: Hooks, flags: Flags | None = None) -> None:
    """Leave our hooks out when this dictionary, and the flags that belong to it, are copied or pickled."""
    with _lock:
        if "__reduce_ex__" not in hooks.__dict__:
            hooks.__dict__["__reduce_ex__"] = partial(_reduce_foreign, hooks, hooks)
        if flags is not None and "__reduce_ex__" not in flags.__dict__:
            flags.__dict__["__reduce_ex__"] = partial(_reduce_foreign, flags, hooks)


def show_all(hooks: Hooks, flags: Flags | None = None) -> None:
    """Undo `hide_ours` once the dictionary holds none of our hooks."""
    with _lock:
        if hooks and any(map(is_ours, _entries(hooks).values())):
            return
        hooks.__dict__.pop("__reduce_ex__", None)
        if flags is not None:
            flags.__dict__.pop("__reduce_ex__", None)


def is_ours(hook: Callable[..., Any]) -> bool:
    """Whether a hook was attached by this library's captures."""
    return getattr(hook, "__module__", None) in _OURS


def _reduce_foreign(entries: dict[int, Any], hooks: Hooks, protocol: Any) -> Any:
    attached = _entries(hooks)
    foreign = ((key, entry) for key, entry in _entries(entries).items() if not is_ours(attached.get(key, _nobodys)))
    return OrderedDict(foreign).__reduce_ex__(protocol)


def _entries(entries: dict[int, Any]) -> dict[int, Any]:
    """The dictionary as it is at one moment: other threads attach and take off hooks meanwhile."""
    return dict([*entries.items()])  # unpacking runs no Python code, so no other thread either


def _nobodys() -> None:
    """Stands for the hook of a flag that has none."""


_OURS = frozenset({"activation_extractor._taps", "activation_extractor._plain"})
