"""What the tests of left hooks share: the ways to register a hook, one hook, and a check that no watch stays on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from activation_extractor.testing._hook_leaks import HookWatch, LeftHook

HERE = Path(__file__).parent
METHODS = {
    "register_forward_pre_hook": "forward pre-hook",
    "register_forward_hook": "forward hook",
    "register_full_backward_pre_hook": "backward pre-hook",
    "register_full_backward_hook": "backward hook",
    "register_backward_hook": "backward hook",
}
ORIGINALS = {name: vars(nn.Module)[name] for name in METHODS}
OPTIONS = [
    ("register_forward_hook", {"prepend": True}),
    ("register_forward_hook", {"with_kwargs": True}),
    ("register_forward_hook", {"always_call": True}),
    ("register_forward_pre_hook", {"prepend": True, "with_kwargs": True}),
    ("register_full_backward_hook", {"prepend": True}),
    ("register_full_backward_pre_hook", {"prepend": True}),
]
GLOBAL = {
    torch_module.register_module_forward_pre_hook: "global forward pre-hook",
    torch_module.register_module_forward_hook: "global forward hook",
    torch_module.register_module_full_backward_pre_hook: "global backward pre-hook",
    torch_module.register_module_full_backward_hook: "global backward hook",
}


def record(*values: Any) -> None:
    """A hook of any kind."""


def line_of(function: Callable[..., Any]) -> int:
    return inspect.getsourcelines(function)[1]


SOURCE = f"'record' at hook_leaks.py:{line_of(record)}"  # as seen from the tests' folder


def where(hooks: list[LeftHook]) -> list[tuple[str, str]]:
    return [(hook.layer, hook.kind) for hook in hooks]


@contextmanager
def watching() -> Iterator[HookWatch]:
    """A watch that is on; in the end torch must be as it was."""
    before = _global_hooks()
    watch = HookWatch()
    yield watch
    watch.stop()
    assert are_original()
    assert _global_hooks() == before


def are_original() -> bool:
    return all(vars(nn.Module)[name] is method for name, method in ORIGINALS.items())


def are_watched() -> bool:
    return all(vars(nn.Module)[name] is not method for name, method in ORIGINALS.items())


def _global_hooks() -> list[dict[int, Any]]:
    kinds = ["forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"]
    return [dict(getattr(torch_module, f"_global_{kind}")) for kind in kinds]
