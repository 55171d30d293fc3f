"""`capture`: the with-block and the decorator."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from torch import nn

from activation_extractor._format._fingerprints import describe
from activation_extractor._hooks._compiled_models import untraced
from activation_extractor._hooks._context import open_here
from activation_extractor._hooks._tensor_parts import is_spread
from activation_extractor.activations._activations import Activations
from activation_extractor.activations._open_block import OpenBlock, Plan
from activation_extractor.activations._options import Missing, Options, Sharded
from activation_extractor.activations._recorded_values import Calls
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StepError
from activation_extractor.layers._modules import check_model, unwrap
from activation_extractor.layers._selections import Target, resolve
from activation_extractor.reducers._layouts import Layouts
from activation_extractor.reducers._masks import BatchMask, Masks
from activation_extractor.reducers._sequence_axis import SequenceAxes
from activation_extractor.sinks import Sink
from activation_extractor.sinks._store_sinks import open_sink

Model = nn.Module | Callable[..., nn.Module]


@untraced
def capture(
    model: Model,
    layers: Any,
    *,
    reduce: Any = None,
    sink: Sink | str | os.PathLike[str] | None = None,
    mask: Any = "attention_mask",
    sequence_axis: SequenceAxes = None,
    calls: Calls = "last",
    stop_early: bool = False,
    detach: bool = True,
    copy: bool = True,
    to: Any = None,
    max_bytes: int | None = None,
    missing: Missing = "error",
    sharded: Sharded | None = None,
) -> Capture:
    """Record what layers of a model compute: as a with-block, or as a decorator.

    Layers are resolved and everything is checked here. Hooks are attached when the block is entered and are gone when
    it is left, however it is left. The model computes the same bits with and without; its mode and grad mode are the
    user's. Only calls from the context (thread, task) that entered the block are recorded. While any block is open,
    compiled models run eagerly in the whole process.

    Without a sink a block keeps what the last forward of the model computed, and warns on leaving of forwards whose
    values were replaced unread. Calls of layers outside of the model's own forward do not replace what a forward gave;
    they count where no forward runs the layer.

    Args:
        model: the model, wrapped (compiled, DDP, FSDP) or not; for the decorator also a function that returns it and
            may take the decorated function's first argument, as in ``capture(lambda self: self.model, ...)``.
        layers: a dotted name; a pattern (``*`` and ``?`` within a dotted segment, ``**`` across segments, ``[0-3]``,
            ``[8-11]``); a compiled regex that matches the whole name; a module; a module type; a predicate
            ``(name, module) -> bool``; an iterable of these; a dict ``{new name: selection}``, in which `combined`
            makes one column of several layers. `outputs`, `inputs` and `gradients` say which side of the call is
            wanted; a bare selection means outputs. Everything but a name and a module leaves out the root, whose name
            is ``""``, and modules without a forward.
        reduce: what to keep of an activation, a name (``full``, ``mean``, ``first``, ``last``, ``max``), a callable
            ``(activation, mask) -> tensor``, several of these, or a dict of names; by default ``full``. See
            `activation_extractor.reducers`. Reduction happens in the hook, on the activation's device; a callable is
            given copies that it may write to.
        sink: where steps go, a `Sink` or a folder for a new store; without one the block is one step and its results
            stay in memory.
        mask: which positions are real, for reducers and stores: the name of an argument of the model's own call; a
            tensor ``(batch, seq)``; a dict from layer patterns to these; a callable
            ``(layer, activation, mask) -> mask``; `without_tokens`, which leaves special tokens out; or None when
            nothing is padding. By default the mask of the call: a decoder, keys and values of cross-attention, and
            towers have their own; torch's padding masks, in which True is padding, count too. In a cached decoding step
            the last columns of a longer mask are taken.
        sequence_axis: which axis, or axes, of an activation is the sequence; or a dict from layer patterns to these, or
            to None where each row is one position: ``{"conv*": (2, 3), "fc": None}``. By default it is where the
            layer's module is documented to have it (``batch_first``, ``Conv1d`` and their kin), else the second of
            three axes; an error for another number, or beside modules of another layout, when a reducer needs to know.
        calls: what becomes of a layer that runs several times in a step: ``"last"`` keeps the last value and warns once
            when that happens within one forward, ``"all"`` keeps a list, ``"join"`` concatenates along the sequence
            axis and reduces the whole.
        stop_early: leave out the rest of each forward once everything wanted has run; the model's call returns None.
        detach: keep values outside the autograd graph.
        copy: keep a copy of each value, safe from later in-place writes. False keeps a reference: free, and reading
            raises if it was overwritten; writes that torch does not count (through ``.data`` or a numpy view) are not
            seen. References hold the graph of the latest forward until they are read or the block ends.
        to: a device to move what is kept to.
        max_bytes: raise when more memory than this is kept, counted by storage.
        missing: raise (``"error"``) or go on (``"skip"``) when a requested layer did not run in a step.
        sharded: what becomes of a value of which each process holds a part, as with tensor parallelism: ``"gather"``
            makes the whole of it, before it is reduced, which takes a block with the same layers in each process;
            ``"local"`` records this process's part. By default a DTensor is handed out as it is, and what would take a
            part for the whole is an error.

    Returns:
        A `Capture`, reusable and nestable.

    Raises:
        LayerNotFoundError, DuplicateLayerError, UnhookableLayerError: for `layers`.
        ArgumentError: for every other argument.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import capture
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
        >>> with capture(model, "*") as acts:
        ...     _ = model(torch.randn(2, 4))
        >>> acts
        Activations: 2 tensors, 128 B
          layer  shape   dtype    device
          0      (2, 8)  float32  cpu
          1      (2, 8)  float32  cpu
    """
    options = Options(
        reduce=reduce,
        mask=mask,
        sequence_axis=sequence_axis,
        calls=calls,
        stop_early=stop_early,
        detach=detach,
        copy=copy,
        to=to,
        max_bytes=max_bytes,
        missing=missing,
        sharded=sharded,
        has_sink=sink is not None,
    )
    return Capture(model, layers, options, sink)


class Capture:
    """What `capture` returns: enter it as a with-block, or put it on a function as a decorator.

    It can be entered again and again, inside itself and by several threads at once; each entry has results of its own.
    """

    _is_ending = staticmethod(sys.is_finalizing)  # a global name may be gone by then

    def __init__(self, model: Model, layers: Any, options: Options, sink: Any) -> None:
        self._model, self._options = model, options
        self._layers = list(layers) if isinstance(layers, Iterator) else layers  # it may be resolved more than once
        self._root: nn.Module | None = None
        if isinstance(model, nn.Module) or not callable(model):
            self._plan = self._resolve(check_model(model))
            self._root = self._plan.root
        self._sink = open_sink(sink)  # last, so that a mistake above touches no folder
        self._known_metadata: dict[str, Any] | None = None
        self._entered: list[OpenBlock] = []
        self._was_entered = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        if self._root is None:
            return f"capture(<model given later>, {self._layers!r})"
        targets, reducers = self._plan.targets, list(self._options.reducers)
        return f"capture({type(self._root).__name__}, {len(targets)} targets, reduce={reducers})"

    @untraced
    def __enter__(self) -> Activations:
        if self._root is None:
            advice = "Use it as a decorator, or pass the module."
            raise ArgumentTypeError("model", "be a module in a with-block", self._model, advice)
        block = self._record(self._plan).__enter__()
        with self._lock:
            self._entered.append(block)
        return Activations(block)

    @untraced
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_ending():  # the interpreter closes a generator: modules are half gone, and the model with them
            return
        with self._lock:
            # The latest of this context, or of any when the block began in another one.
            candidates = [block for block in self._entered if block.state in open_here()] or self._entered
            if not candidates:
                advice = "Use capture in a with-statement."
                raise StepError("end with the block it began in", "one exit too many", advice)
            self._entered.remove(block := candidates[-1])
        block.__exit__(kind, error, traceback)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a block around each call.

        A function with a parameter ``acts`` is given the block's `Activations` there, and callers need not pass it;
        any other function needs a sink.

        Raises:
            ArgumentTypeError: a generator function, whose body does not run in the call, or no function.
            ArgumentError: a function that neither takes ``acts`` nor has a sink to fill.
        """
        if not callable(function) or isinstance(function, type | nn.Module):
            raise ArgumentTypeError("what is decorated", "be a function", function)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            advice = "Use the with-block inside of it."
            raise ArgumentTypeError("what is decorated", "not be a generator function", function, advice)
        signature = inspect.signature(function)
        wants_acts = "acts" in signature.parameters
        if not wants_acts and self._sink is None:
            condition = "have a parameter named 'acts', or the capture a sink"
            raise ArgumentError("what is decorated", condition, function)
        parameters = [parameter for name, parameter in signature.parameters.items() if name != "acts"]
        wrapper = self._wrapped(function, wants_acts)
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapper

    def _wrapped(self, function: Callable[..., Any], wants_acts: bool) -> Callable[..., Any]:
        def with_acts(block: OpenBlock, kwargs: dict[str, Any]) -> dict[str, Any]:
            return {"acts": Activations(block), **kwargs} if wants_acts else kwargs

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def capture_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._block_for(args) as block:
                    return await function(*args, **with_acts(block, kwargs))

            return capture_coroutine

        @untraced
        @functools.wraps(function)
        def capture_call(*args: Any, **kwargs: Any) -> Any:
            with self._block_for(args) as block:
                return function(*args, **with_acts(block, kwargs))

        return capture_call

    @untraced
    def _block_for(self, args: tuple[Any, ...]) -> OpenBlock:
        """A block on the model, which may depend on the decorated function's arguments."""
        if self._root is not None:
            return self._record(self._plan)
        takes_argument = bool(inspect.signature(self._model).parameters)
        return self._record(self._resolve(check_model(self._model(*args[:takes_argument]))))

    def _resolve(self, model: nn.Module) -> Plan:
        root, targets, options = unwrap(model), resolve(model, self._layers), self._options
        masks = Masks(options.mask, root, is_asked=options.needs_masks)  # its checks belong to the door
        is_combined = any(target.part_of for target in targets)
        asks = options.needs_layouts or options.sequence_axis or is_combined
        by_layer = Layouts(options.sequence_axis, root) if asks else None
        layouts = {target.name: by_layer.of(target) for target in targets} if by_layer else {}
        if options.stop_early and any(target.side == "gradient" for target in targets):
            advice = "Backward needs the whole forward."
            raise ArgumentError("stop_early", "be False when gradients are recorded", True, advice)
        plain = tuple(target.side == "output" and target.select is target.part_of is None for target in targets)
        spread = functools.cache(functools.partial(is_spread, root))
        return Plan(root, targets, masks, layouts, masks.watched(root, targets), is_combined, plain, spread)

    def _record(self, plan: Plan) -> OpenBlock:
        if self._sink is not None:
            self._sink.begin(self._metadata(plan.root, plan.targets))
        block = OpenBlock(plan, self._options, self._sink)
        if self._was_entered:  # modules that were replaced between two entries have been counted by nobody
            block.state.places_seen = -1
        self._was_entered = self._root is not None  # else layers are resolved for each entry
        return block

    def _metadata(self, root: nn.Module, targets: tuple[Target, ...]) -> dict[str, Any]:
        """What a sink stores about the run: what the values depend on, beside the weights and the data."""
        if self._known_metadata is None or root is not self._root:
            options = self._options
            mask = {"entry": options.mask.name} if isinstance(options.mask, BatchMask) else options.mask
            self._known_metadata = {
                "model": type(root).__qualname__,
                "layers": [[_described_name(it), it.layer, it.side, describe(it.select)] for it in targets],
                "reducers": describe(options.reducers),
                "mask": describe(mask),
                "sequence_axis": describe(options.sequence_axis),
                "calls": options.calls,
                **({"sharded": "local"} if options.sharded == "local" else {}),
            }
        return self._known_metadata


def _described_name(target: Target) -> str:
    return target.name if target.part_of is None else f"{target.part_of.how} in {target.name}"
