"""What a block of an instrumented model records by taps."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from torch import nn

from activation_extractor._hooks._compiled_models import is_compiled_around
from activation_extractor._hooks._context import CallListener, Listener
from activation_extractor._hooks._graph_taps import stop_waiting, waiting
from activation_extractor._hooks._tap_parts import Tap
from activation_extractor._hooks._tapped_modules import call_tap, check_last, taps_of
from activation_extractor._hooks._taps import Detach
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._graph_forwards import GraphForwards
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorders import Shared, recorder
from activation_extractor.activations._steps import Steps
from activation_extractor.errors import ArgumentError, StepError, UntappedLayerError
from activation_extractor.layers._places import Places
from activation_extractor.layers._selections import Target

_ADVICE = "Its layers run inside of compiled graphs: leave the option out, or undo instrument() with handle.remove()."


class BlockTaps:
    """The taps of one block, by the names of its targets, and the calls of modules that the masks come from.

    `call` is the tap of the model's own calls; `is_spread` says whether the model is spread over processes.

    Attributes:
        undo: what ends the recording; each does nothing a second time.

    Raises:
        ArgumentError: an option is of no use inside of a graph.
    """

    def __init__(self, call: Tap, shared: Shared, steps: Steps, *, is_spread: bool) -> None:
        _check_options(shared.options, is_spread=is_spread)
        self._state, self._has_sink = shared.state, shared.options.has_sink
        self._listeners: dict[int, list[Listener]] = {}
        self._names: set[str] = set()
        self._unwatched: list[str] = []
        for target in self._state.targets:
            if (tap := _tap_of(target)) is not None:
                self._names.add(target.name)
                self._listeners.setdefault(tap.key, []).append(Listener(target, recorder(target, shared)))
        forwards = GraphForwards(self._state, steps, shared.masks, has_sink=self._has_sink)
        self._calls = {call.key: CallListener(forwards.begin, forwards.end, is_root=True)}
        self.undo: list[Detach] = [forwards.fail, lambda: stop_waiting(shared.state)]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def watch(
        self,
        layer: str,
        module: nn.Module,
        begin: Callable[[tuple[Any, ...], dict[str, Any]], None],
        end: Callable[[], None],
    ) -> bool:
        """Say when calls of a module begin and end; returns False where it has no tap for that."""
        call = call_tap(module)
        if call is None:
            self._unwatched.append(layer)
            return False
        self._calls[call.key] = CallListener(begin, end, is_root=False)
        return True

    def begin(self, root: nn.Module) -> None:
        """Begin to record.

        Raises:
            UntappedLayerError: a layer without a tap is known to run compiled.
            StepError: hooks of others may replace what taps record, see `check_last`.
        """
        state = self._state
        untapped = {target.name: target.layer for target in state.targets if target.name not in self}
        untapped |= {f"the calls of {layer}": layer for layer in self._unwatched}
        compiled = [name for name, layer in untapped.items() if is_compiled_around(root, layer)]
        if compiled:
            raise UntappedLayerError(compiled)
        check_last(state.targets)
        state.places = Places(root, {target.layer for target in state.targets})
        state.taps, state.calls, state.untapped = self._listeners, self._calls, tuple(untapped)
        waiting.append(state)

    def set_aside(self, layers: Container[str]) -> list[Target]:
        """Record none of these layers, and again those that were set aside before; returns targets without taps."""
        kept: Mapping[int, list[Listener]] = {
            key: [listener for listener in listeners if listener.target.layer not in layers]
            for key, listeners in self._listeners.items()
        }
        self._state.taps = kept
        return [target for target in self._state.targets if target.name not in self]


def _tap_of(target: Target) -> Tap | None:
    taps = None if target.side == "gradient" else taps_of(target.module)
    return None if taps is None else taps.find(target.side, target.select)


def _check_options(options: Options, *, is_spread: bool) -> None:
    for name, value, wanted in (
        ("copy", options.copy, True),
        ("detach", options.detach, True),
        ("stop_early", options.stop_early, False),
    ):
        if value is not wanted:
            raise ArgumentError(name, f"stay {wanted} for an instrumented model", value, _ADVICE)
    if is_spread:
        condition, got = "not be instrumented where processes hold parts of it", "one that is"
        raise ArgumentError("model", condition, got, "Undo instrument() with handle.remove().")


def check_kept(state: ForwardState) -> None:
    """Make sure that the taps of a block that ends were there all the time; raises a StepError."""
    if state.has_lost_taps:
        condition, got = "be recorded by taps that stay until its block ends", "handle.remove() inside of the block"
        raise StepError(condition, got, "Remove the taps of instrument() behind the block.")
