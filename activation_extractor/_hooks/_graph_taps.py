"""Taps: hooks that stay on a model and become part of its compiled graphs, where they wait for a block.

The compiler traces a hook once, and drops those that are added later. What it traces here is an operator without a
result, opaque to it, that asks when it runs whether a block is open which wants the value.

- The operator writes, as far as the compiler knows, to `_ORDER`: so it is neither removed as dead code nor moved across
  another one. An in-place operation behind it cannot change what it is given: the compiler keeps both in order.
- Which tap it is, is a tensor. A number would be a constant of the graph, and each of a model's equal blocks would be
  compiled anew.
- No guard of compiled code looks at hooks: a model of the same class that was compiled before would lend its graph,
  without taps. A guard looks at whether a module has a ``forward`` of its own, so each gets one.
- Copies and pickles of a module carry nothing of it.

Outside of a graph the hooks hand values to blocks without the operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activation_extractor._hooks._compiled_models import outside_compilation
from activation_extractor._hooks._context import CallListener, Owner, open_here
from activation_extractor._hooks._copied_modules import never_copied
from activation_extractor._hooks._tap_parts import Parameters, Tap, as_given, as_returned, as_taken, by_name, given
from activation_extractor._hooks._taps import pick_tensor
from activation_extractor._private_compiler import is_compiled_caller, is_exporting, operator_tags, skip_as_frame
from activation_extractor._private_torch import active_tracer, backward_task, is_transformed
from activation_extractor.errors import TransformedCallError, UntappedLayerError
from activation_extractor.layers._selections import Target
from activation_extractor.layers._signatures import bind, signature_of

# Attributes of a module that has taps. The compiler guards each value that it reads, in every call: so the number of
# the commonest tap, that of a whole output, is read alone, and `MORE` is there only if there are others behind a call.
TAPS = "_activation_extractor_taps"
WHOLE = "_activation_extractor_output"
MORE = "_activation_extractor_more"

_ORDER = torch.empty(0)
_SCHEMAS = {
    "tap": "(Tensor(a!) order, Tensor activation, Tensor number) -> ()",
    "begin": "(Tensor(a!) order, Tensor[] arguments, str[] names, Tensor number) -> ()",
    "end": "(Tensor(a!) order, Tensor number) -> ()",
}

_numbers = count()
_library: Any = torch.library.Library("activation_extractor", "FRAGMENT")  # type: ignore[no-untyped-call]

# The blocks that wait for taps, in whatever context: while it is empty, an operator asks nothing else.
waiting: list[Owner] = []


def stop_waiting(owner: Owner) -> None:
    """Take a block out of `waiting`; a second time nothing happens."""
    with suppress(ValueError):
        waiting.remove(owner)


class ModuleTaps:
    """The taps of one module; the compiler reads the attributes when it traces the module's hooks.

    Attributes:
        inputs, outputs: the taps on either side.
        call: the tap of the module's calls; None where they are not watched.
        parameters: those of its forward.
        uses: how often each tap was added.
        before, behind: our hooks.
        own_forward, forward: the forward that the module had in place of its class's, and that which it got from us.
    """

    def __init__(self, module: nn.Module) -> None:
        self.inputs: tuple[Tap, ...] = ()
        self.outputs: tuple[Tap, ...] = ()
        self.call: Tap | None = None
        self.uses: Counter[Any] = Counter()
        self.before: RemovableHandle | None = None
        self.behind: RemovableHandle | None = None
        self.own_forward: Any = None
        self.forward: Any = None
        self.parameters = Parameters.of(module)

    def find(self, side: str, select: Any) -> Tap | None:
        """The tap that takes this part."""
        taps = self.inputs if side == "input" else self.outputs
        return next((tap for tap in taps if tap.select == select), None)


def new_tap(select: Any) -> Tap:
    """A tap with a number of its own."""
    return Tap(select, number := next(_numbers), torch.tensor(number))


# -- hooks: traced into graphs, and run as they are outside of one -----------------------------------------------------


def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook before the forward of a module with taps."""
    members = module.__dict__
    if TAPS not in members:  # a shallow copy shares hooks
        return
    if not torch.compiler.is_dynamo_compiling():  # `is_compiling` is true too while another thread compiles
        if waiting:
            _outside().begin_hook(members[TAPS], args, kwargs, is_compiled_caller())
    elif not is_exporting():
        _trace_begin(members[TAPS], args, kwargs)


def behind_call(module: nn.Module, args: Any, output: Any) -> None:
    """The hook behind the forward of a module with taps."""
    members = module.__dict__
    if not torch.compiler.is_dynamo_compiling():
        if waiting and TAPS in members:
            _outside().end_hook(members[TAPS], output)
    elif not is_exporting():
        if WHOLE in members:
            _trace_tap(output, None, members[WHOLE])
        if MORE in members:
            _trace_end(members[TAPS], output)


def _trace_begin(taps: ModuleTaps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if taps.call is not None:
        values, names = given(taps.parameters, args, kwargs)
        torch.ops.activation_extractor.begin(_ORDER, values, names, taps.call.number)
    for tap in taps.inputs:
        _trace_tap(by_name(taps.parameters, args, kwargs), tap.select, tap.number)


def _trace_end(taps: ModuleTaps, output: Any) -> None:
    for tap in taps.outputs:
        if tap.select is not None:
            _trace_tap(output, tap.select, tap.number)
    if taps.call is not None:
        torch.ops.activation_extractor.end(_ORDER, taps.call.number)


def _trace_tap(value: Any, select: Any, number: Tensor) -> None:
    taken = as_taken(value, select, number)
    if taken is not None:
        torch.ops.activation_extractor.tap(_ORDER, *taken)


for _hook in (before_call, behind_call):
    never_copied(_hook)


# -- what runs when a graph, or a hook outside of one, gets to a tap ---------------------------------------------------


def _tap(order: Tensor, activation: Tensor, number: Tensor) -> None:
    if waiting:
        _outside().record(activation, number)


def _begin(order: Tensor, arguments: list[Tensor], names: list[str], number: Tensor) -> None:
    if waiting:
        _outside().begin(arguments, names, number)


def _end(order: Tensor, number: Tensor) -> None:
    if waiting:
        _outside().end(int(number))


def _record(activation: Tensor, number: Tensor) -> None:
    known = int(number)
    activation = as_returned(activation, number)
    for owner in tuple(waiting):
        for listener in owner.taps.get(known, ()):
            if _is_ours(owner, listener.target.layer):
                listener.record(activation)


def _begin_in_graph(arguments: list[Tensor], names: list[str], number: Tensor) -> None:
    for owner in tuple(waiting):
        listener = owner.calls.get(int(number))
        if listener is not None and _is_ours(owner):
            _begin_call(owner, listener, *as_given(arguments, names), is_compiled=True)


def _end_call(key: int) -> None:
    for owner in reversed(tuple(waiting)):
        listener = owner.calls.get(key)
        if listener is not None and _is_ours(owner):
            listener.end()


def _begin_call(
    owner: Owner, listener: CallListener, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_compiled: bool
) -> None:
    if is_compiled and listener.is_root and owner.untapped:
        raise UntappedLayerError(owner.untapped)
    listener.begin(args, kwargs)


def _is_ours(owner: Owner, layer: str = "") -> bool:
    """Whether a call is of a block's context, and no checkpoint computes it again."""
    if owner in open_here() and backward_task() in owner.backwards:
        return True
    if layer:
        owner.misses(layer)
    return False


class _Outside(NamedTuple):
    """What hooks and operators call when blocks wait: the compiler takes no frame in it for one to compile."""

    record: Callable[[Tensor, Tensor], None]
    begin: Callable[[list[Tensor], list[str], Tensor], None]
    end: Callable[[int], None]
    begin_hook: Callable[[ModuleTaps, tuple[Any, ...], dict[str, Any], bool], None]
    end_hook: Callable[[ModuleTaps, Any], None]


@cache
def _outside() -> _Outside:
    functions = _record, _begin_in_graph, _end_call, _begin_outside, _end_outside
    return _Outside(*[outside_compilation(function) for function in functions])


def make_ready() -> None:
    """Keep the compiler from compiling our own functions where they are frames of their own; it imports it."""
    skip_as_frame(before_call, behind_call, is_compiled_caller, _tap, _begin, _end)
    _outside()


def _begin_outside(taps: ModuleTaps, args: tuple[Any, ...], kwargs: dict[str, Any], is_compiled: bool) -> None:
    """A call of a module begins outside of a graph; `is_compiled` is whether its forward is a graph."""
    if tracer := active_tracer():
        _refuse(taps.call, tracer)
    for owner in tuple(waiting):
        if taps.call is not None:
            listener = owner.calls.get(taps.call.key)
            if listener is not None and _is_ours(owner):
                _begin_call(owner, listener, args, kwargs, is_compiled=is_compiled)
        for tap in taps.inputs:
            _hand_on(owner, tap, lambda target: bind(signature_of(target.module), args, kwargs))


def _refuse(call: Tap | None, tracer: str) -> None:
    """Refuse to trace a model in a block that is to record it."""
    if call is not None and any(call.key in owner.calls and owner in open_here() for owner in tuple(waiting)):
        raise TransformedCallError("", tracer)


def _end_outside(taps: ModuleTaps, output: Any) -> None:
    """A call of a module ends outside of a graph."""
    for owner in tuple(waiting):
        for tap in taps.outputs:
            _hand_on(owner, tap, lambda _: output)
    if taps.call is not None:
        _end_call(taps.call.key)


def _hand_on(owner: Owner, tap: Tap, value_of: Callable[[Target], Any]) -> None:
    """Let a block record what a layer was given or returned outside of a graph."""
    for listener in owner.taps.get(tap.key, ()):
        target = listener.target
        if not _is_ours(owner, target.layer):
            continue
        if is_transformed():
            raise TransformedCallError(target.layer)
        listener.record(pick_tensor(target, owner, value_of(target)))


def _no_effect(*_: Any) -> None:
    """What a tap does to tensors without values."""


def _unbatched(*_: Any) -> tuple[None, None]:
    """What a tap does under ``vmap``, whose values are slices of a batch: a block finds that the layer did not run."""
    return None, None


for _name, _run in (("tap", _tap), ("begin", _begin), ("end", _end)):
    _library.define(_name + _SCHEMAS[_name], tags=operator_tags())
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    _library.impl(_name, _no_effect, "Meta")
    torch.library.register_vmap(f"activation_extractor::{_name}", _unbatched, lib=_library)
