"""Putting taps on modules and taking them off; copies and pickles of a module carry none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from activation_extractor._hooks._copied_modules import hide_flags, hide_ours, is_ours, show_all
from activation_extractor._hooks._foreign_hooks import may_replace
from activation_extractor._hooks._graph_taps import (
    MORE,
    TAPS,
    WHOLE,
    ModuleTaps,
    before_call,
    behind_call,
    make_ready,
    new_tap,
    waiting,
)
from activation_extractor._hooks._tap_parts import Tap
from activation_extractor._private_torch import REPLICATE, forward_hooks, forward_pre_hooks
from activation_extractor.errors import StepError
from activation_extractor.layers._selections import Target

CALL = ("call", None)
Key = tuple[str, Any]  # the side of a call and the part that is selected, or `CALL`

_FORWARD, _REDUCE = "forward", "__reduce_ex__"
_OURS = (TAPS, WHOLE, MORE, _FORWARD, _REDUCE, REPLICATE)
_lock = threading.Lock()


def taps_of(module: nn.Module) -> ModuleTaps | None:
    """The taps of a module; None where it has none."""
    taps: ModuleTaps | None = module.__dict__.get(TAPS)
    return taps


def call_tap(module: nn.Module) -> Tap | None:
    """The tap of a module's calls; None where they are not watched."""
    taps = taps_of(module)
    return None if taps is None else taps.call


def add_tap(module: nn.Module, key: Key) -> Callable[[], None]:
    """Put a tap on a module, if it has not got it; returns what takes it off, unless it was added more often."""
    with _lock:
        taps = taps_of(module) or _prepare(module)
        taps.uses[key] += 1
        if taps.uses[key] == 1:
            _change(module, taps, key, is_there=True)

    def remove() -> None:
        with _lock:
            taps.uses[key] -= 1
            if not taps.uses[key]:
                _tell_blocks(taps.call if key == CALL else taps.find(*key))
                _change(module, taps, key, is_there=False)
                del taps.uses[key]
            if not taps.uses:
                _restore(module, taps)

    return remove


def check_last(targets: Iterable[Target]) -> None:
    """Make sure that taps see what layers return, or are given, when all other hooks have run.

    Raises:
        StepError: a hook that may replace it was registered behind a tap.
    """
    for target in targets:
        taps = taps_of(target.module)
        handle = None if taps is None else taps.before if target.side == "input" else taps.behind
        hooks = forward_pre_hooks(target.module)[0] if target.side == "input" else forward_hooks(target.module)
        if handle is None or next(reversed(hooks), None) == handle.id:
            continue
        keys = [*hooks]
        later = [hooks.get(key) for key in keys[keys.index(handle.id) + 1 :]] if handle.id in keys else []
        if any(may_replace(hook) for hook in later if hook is not None and not is_ours(hook)):
            got = f"a hook on {target.layer!r} that was registered behind instrument() and may replace it"
            advice = "Call handle.remove(), and instrument() again."
            raise StepError("record what layers are given and return", got, advice)


def _tell_blocks(tap: Tap | None) -> None:
    """Let the blocks that record by a tap know that it goes."""
    for owner in tuple(waiting):
        if tap is not None and (tap.key in owner.taps or tap.key in owner.calls):
            owner.has_lost_taps = True


def _change(module: nn.Module, taps: ModuleTaps, key: Key, *, is_there: bool) -> None:
    side, select = key
    if key == CALL:
        taps.call = new_tap(None) if is_there else None
    elif side == "input":
        others = tuple(tap for tap in taps.inputs if tap.select != select)
        taps.inputs = (*others, new_tap(select)) if is_there else others
    else:
        others = tuple(tap for tap in taps.outputs if tap.select != select)
        taps.outputs = (*others, new_tap(select)) if is_there else others
    whole, members = taps.find("output", None), module.__dict__
    members.pop(WHOLE, None)
    members.pop(MORE, None)
    if whole is not None:
        members[WHOLE] = whole.number
    if taps.call is not None or any(tap is not whole for tap in taps.outputs):
        members[MORE] = True
    _set_hooks(module, taps)


def _set_hooks(module: nn.Module, taps: ModuleTaps) -> None:
    """Register the hooks that the taps need, and remove the others."""
    is_begun = bool(taps.inputs) or taps.call is not None
    is_ended = bool(taps.outputs) or taps.call is not None
    before, flags = forward_pre_hooks(module)
    if is_begun and taps.before is None:
        taps.before = module.register_forward_pre_hook(before_call, with_kwargs=True)
        hide_ours([before])
        hide_flags(flags, before)
    elif not is_begun and taps.before is not None:
        taps.before.remove()
        taps.before = None
        show_all([before], flags)
    if is_ended and taps.behind is None:
        taps.behind = module.register_forward_hook(behind_call)
        hide_ours([forward_hooks(module)])
    elif not is_ended and taps.behind is not None:
        taps.behind.remove()
        taps.behind = None
        show_all([forward_hooks(module)])


def _prepare(module: nn.Module) -> ModuleTaps:
    make_ready()
    members = module.__dict__
    taps = members[TAPS] = ModuleTaps(module)
    taps.own_forward = members.get(_FORWARD)
    taps.forward = members[_FORWARD] = taps.own_forward or MethodType(type(module).forward, module)
    members[_REDUCE] = partial(_reduce_bare, module)
    members[REPLICATE] = partial(_replicate_bare, module)
    return taps


def _restore(module: nn.Module, taps: ModuleTaps) -> None:
    bare = _strip(module.__dict__)
    for name in _OURS:
        module.__dict__.pop(name, None)
    if _FORWARD in bare:
        module.__dict__[_FORWARD] = bare[_FORWARD]


def _strip(members: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without those of its taps."""
    taps = members.get(TAPS)
    if not isinstance(taps, ModuleTaps):
        return members
    bare = {name: value for name, value in members.items() if name not in _OURS}
    forward = members.get(_FORWARD)
    if forward is taps.forward:  # else somebody has set another one since
        forward = taps.own_forward
    return bare if forward is None else {**bare, _FORWARD: forward}


def _reduce_bare(module: nn.Module, protocol: Any) -> Any:
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple):
        return reduced
    return tuple(_strip(part) if isinstance(part, dict) else part for part in reduced)


def _replicate_bare(module: nn.Module) -> nn.Module:
    """A replica for `nn.DataParallel`, whose forward is its own."""
    replica: nn.Module = getattr(type(module), REPLICATE)(module)
    replica.__dict__ = _strip(replica.__dict__)
    return replica
