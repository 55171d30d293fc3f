"""When a module's calls begin, with their arguments, and when they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from activation_extractor._hooks._context import Owner, open_here
from activation_extractor._hooks._copied_modules import hide_flags, hide_ours, ours, show_all
from activation_extractor._private_torch import always_called, backward_task, forward_hooks, forward_pre_hooks


def watch_calls(
    module: nn.Module, owner: Owner, begin: Callable[[tuple[Any, ...], dict[str, Any]], None], end: Callable[[], None]
) -> Callable[[], None]:
    """Say when calls of a module in `owner`'s context begin and end, also those that fail; returns what undoes it."""

    @ours
    def begin_call(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if called is module and owner in open_here() and backward_task() in owner.backwards:
            begin(args, kwargs or {})

    @ours
    def end_call(called: nn.Module, args: Any, output: Any) -> None:
        if called is module and owner in open_here() and backward_task() in owner.backwards:
            end()

    handles = [
        module.register_forward_pre_hook(begin_call, with_kwargs=True),
        module.register_forward_hook(end_call, always_call=True),
    ]
    before, before_flags = forward_pre_hooks(module)
    behind, behind_flags = forward_hooks(module), always_called(module)
    hide_ours([before, behind])
    hide_flags(before_flags, before)
    hide_flags(behind_flags, behind)

    def detach() -> None:
        for handle in handles:
            handle.remove()
        show_all([before], before_flags)
        show_all([behind], behind_flags)

    return detach
