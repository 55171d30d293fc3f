"""Hooks on one module: is this call ours, which tensor is meant, hand it on.

This is the hot path: a hook runs on every call of its module, by whoever, so it asks the cheapest questions first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activation_extractor._hooks._context import Owner, open_here, unrecorded
from activation_extractor._hooks._copied_modules import hide_flags, hide_ours, is_ours, ours, show_all
from activation_extractor._hooks._foreign_hooks import code_of, may_replace, registers_hooks
from activation_extractor._private_torch import (
    Flags,
    Hooks,
    active_tracer,
    backward_task,
    forward_hooks,
    forward_pre_hooks,
    hook_counter,
    is_placeholder,
    is_transformed,
)
from activation_extractor.errors import TransformedCallError, ValueNotFoundError
from activation_extractor.layers._selections import Target
from activation_extractor.layers._signatures import bind, signature_of
from activation_extractor.layers._structures import select_part, tensors_in, unpacked, why_no_tensor

Record = Callable[[Tensor], None]
Pick = Callable[[Any], Tensor]
Detach = Callable[[], None]
_REGISTER = nn.Module.register_forward_hook


def tap(target: Target, owner: Owner, record: Record, attached: Attached, pick: Pick | None = None) -> None:
    """Attach a hook that hands each recorded tensor of `target`, found by `pick`, to `record`.

    Calls in other contexts than `owner`'s, of copies of the module, and recomputed by checkpointing in backward are
    left out.

    Raises:
        TransformedCallError: from the module's call, under ``vmap`` and the like.
        ValueNotFoundError: from the module's call, when its value holds no tensor.
    """
    pick = pick or partial(pick_tensor, target, owner)
    if target.side == "input":
        attached.add_before(target.module, _input_hook(target, owner, record, pick))
    else:
        attached.add(target.module, _output_hook(target, owner, record, pick))


def tap_gradient(
    target: Target,
    owner: Owner,
    expect: Callable[[bool], Record | None],
    attached: Attached,
    settle: Callable[[Tensor, Record], Record] = lambda tensor, record: record,
) -> Detach:
    """Attach a hook that asks `expect`, in each call of the layer, what records the gradient that backward will bring.

    `expect` is called with whether the call is a recomputation, and returns None where the call does not count.
    `settle` gives what takes a gradient for the tensor that it is of. Returns what takes off the hooks that wait.
    """
    module = target.module
    handles: list[RemovableHandle] = []

    @ours
    def expect_gradient(called: nn.Module, args: Any, output: Any) -> None:
        if called is not module or (owner not in open_here() and owner.misses(target.layer)):
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if hook_counter.next_id != owner.hooks_made:
            owner.reorder(called)
        # Backward runs on other threads, in other contexts: `record` is made here for whom the gradient is.
        tensor, record = pick_tensor(target, owner, output), expect(backward_task() not in owner.backwards)
        if tensor.requires_grad and record is not None:
            handles[:] = [handle for handle in handles if handle.hooks_dict_ref() is not None]
            handles.append(tensor.register_hook(settle(tensor, record)))  # type: ignore[no-untyped-call]
            owner.hooks_made += 1  # a tensor's hook changes no module's order

    attached.add(module, expect_gradient)

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def _output_hook(target: Target, owner: Owner, record: Record, pick: Pick) -> Callable[..., None]:
    module = target.module

    @ours
    def record_output(called: nn.Module, args: Any, output: Any) -> None:
        is_wanted = owner in open_here() and backward_task() in owner.backwards
        if called is not module or (not is_wanted and owner.misses(target.layer)):
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if hook_counter.next_id != owner.hooks_made:
            owner.reorder(called)
        record(pick(output))

    return record_output


def _input_hook(target: Target, owner: Owner, record: Record, pick: Pick) -> Callable[..., None]:
    module, signature = target.module, signature_of(target.module)

    # Registration writes the hook before its kwargs flag: another thread's call may come without kwargs.
    @ours
    def record_input(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        is_wanted = owner in open_here() and backward_task() in owner.backwards
        if called is not module or (not is_wanted and owner.misses(target.layer)):
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if hook_counter.next_id != owner.hooks_made:
            owner.reorder(called)
        record(pick(bind(signature, args, kwargs or {})))

    return record_input


def detach_all(undo: list[Detach]) -> None:
    """Call and drop each, the last one first; an error of one is raised when all of them have been called.

    A KeyboardInterrupt between two lines would leave hooks on, so the one that was interrupted is called again, which
    does no harm, and the others after it. (`contextlib.ExitStack` takes a callback off its list before it calls it: an
    interrupt in between loses it.)
    """
    try:
        while undo:
            undo[-1]()
            undo.pop()
    except KeyboardInterrupt:
        detach_all(undo)
        raise
    except BaseException:
        undo.pop()
        detach_all(undo)
        raise


def pick_tensor(target: Target, owner: Owner, value: Any) -> Tensor:
    """The tensor to record in what the layer takes or returns; it is noted for `owner` of how many it is the first.

    Raises:
        TransformedCallError: it is a tracer's placeholder.
        ValueNotFoundError: there is none.
    """
    if target.select is None and type(value) is Tensor:
        return value
    part = value
    if callable(target.select):
        is_trusted = target.name in owner.picked_of  # it has left all as it was in the block's first call
        part = unrecorded(partial(select_part, value, target.select, is_trusted=is_trusted))
    elif target.select is not None:
        part = select_part(value, target.select)
    tensors = tensors_in(part)
    if not tensors and (tracer := active_tracer()):
        raise TransformedCallError(target.layer, tracer)
    if not tensors:
        layer = f"{target.layer} {type(target.module).__name__}"
        raise ValueNotFoundError(target.layer, value, target.select, *why_no_tensor(value, target.select, part, layer))
    if is_placeholder(tensors[0]):
        raise TransformedCallError(target.layer, active_tracer() or "a FakeTensorMode")
    owner.picked_of[target.name] = len(tensors)
    rows = unpacked(part) if owner.unpacks and target.side != "gradient" else None
    return tensors[0] if rows is None else rows


class Attached:
    """Hooks of ours around forwards, on any number of modules."""

    def __init__(self) -> None:
        self._hooks: list[Hooks] = []
        self._ids: list[int] = []
        self._before: list[tuple[Hooks, Flags, RemovableHandle]] = []
        self._first: dict[int, set[CodeType | None]] = {}  # by hook of ours, the code of the hooks that run before it
        self._aside: dict[int, Callable[..., Any]] = {}

    def add(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Attach a hook behind the forward; `hide` is to be called when all of them are."""
        hooks = forward_hooks(module)
        self._hooks.append(hooks)
        if type(module).register_forward_hook is not _REGISTER:
            self._ids.append(module.register_forward_hook(hook).id)
            return
        hook_id = hook_counter.next_id  # what `register_forward_hook` does, without a handle that takes longer
        hook_counter.next_id = hook_id + 1
        self._ids.append(hook_id)
        hooks[hook_id] = hook

    def add_before(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Attach a hook that is given all arguments before the forward."""
        hooks, flags = forward_pre_hooks(module)
        self._before.append((hooks, flags, module.register_forward_pre_hook(hook, with_kwargs=True)))

    def hide(self) -> None:
        """Keep them out of copies of the modules, and note which hooks are there already."""
        hide_ours(self._hooks)
        if max(map(len, self._hooks), default=0) > 1:
            for hooks, hook_id in zip(self._hooks, self._ids, strict=True):
                self._note_first(hooks, hook_id)
        for hooks, flags, handle in self._before:
            self._note_first(hooks, handle.id)
            hide_ours([hooks])
            hide_flags(flags, hooks)

    def set_aside(self, behind: Sequence[bool], before: Sequence[bool]) -> None:
        """Take off each hook for which this is true, in the order of adding, and attach again those set aside before.

        `behind` is for the hooks behind the forward, `before` for those that are given its arguments.
        """
        first = ((hooks, handle.id) for hooks, _, handle in self._before)
        hooks_and_ids = (*zip(self._hooks, self._ids, strict=True), *first)
        for (hooks, hook_id), is_off in zip(hooks_and_ids, (*behind, *before), strict=True):
            if is_off and hook_id in hooks:
                self._aside[hook_id] = hooks.pop(hook_id)
            elif not is_off and hook_id in self._aside:
                hooks[hook_id] = self._aside.pop(hook_id)

    def detach(self) -> None:
        """Take them off again; a second time nothing happens."""
        for hooks, hook_id in zip(self._hooks, self._ids, strict=False):  # fewer ids, if `add` was interrupted
            hooks.pop(hook_id, None)
        show_all(self._hooks)
        for hooks, flags, handle in self._before:
            handle.remove()
            show_all([hooks], flags)

    def put_last(self) -> set[int]:
        """Move each behind later hooks of others; returns the ids of the dictionaries where these may replace values.

        Hooks that were there before and register themselves anew do so when they run: they have run in this call.
        Hooks of other blocks replace nothing: where threads share a model, each enters and leaves blocks all the time.
        """
        overtaken = set()
        before = ((hooks, handle.id) for hooks, _, handle in self._before)
        for hooks, hook_id in (*zip(self._hooks, self._ids, strict=False), *before):
            keys = [*hooks]  # at one moment: other threads attach and take off hooks meanwhile
            if hook_id not in keys or keys[-1] == hook_id:
                continue
            later = [hooks.get(key) for key in keys[keys.index(hook_id) + 1 :]]
            foreign = [hook for hook in later if hook is not None and not is_ours(hook)]
            if not foreign:
                continue
            first = self._first.get(hook_id, set())
            if any(may_replace(hook) and not (code_of(hook) in first and registers_hooks(hook)) for hook in foreign):
                overtaken.add(id(hooks))
            with suppress(KeyError):
                hooks.move_to_end(hook_id)
            self._note_first(hooks, hook_id)
        return overtaken

    def _note_first(self, hooks: Hooks, hook_id: int) -> None:
        """Note whose hooks run before one of ours: one that registers itself anew in a call has had its say in it."""
        foreign = [hook for hook in [*hooks.values()] if not is_ours(hook)]
        if foreign:
            self._first[hook_id] = set(map(code_of, foreign))
