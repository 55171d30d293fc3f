"""Every error that the library raises.

Each error derives from `ActivationError` and from the built-in that a stranger would catch::

    ActivationError
    ├── LayerNotFoundError       LookupError    a selection matches no layer
    ├── DuplicateLayerError      ValueError     one recorded name for two things
    ├── UnhookableLayerError     TypeError      a module that hooks cannot reach
    ├── ArgumentError            ValueError     an argument's value is not usable
    │   └── ArgumentTypeError    TypeError      ... because of its type
    ├── UntappedLayerError       RuntimeError   a layer in a compiled graph that was not instrumented
    ├── LayerNotRunError         RuntimeError   a requested layer did not run in a step
    ├── GradientNotFoundError    RuntimeError   a requested gradient never came
    ├── ValueNotFoundError       TypeError      a layer's value holds no tensor to record
    ├── TensorKindError          TypeError      a tensor that has no plain numbers where these are needed
    ├── PartError                ValueError     a process holds a part of a layer's value
    ├── OverwrittenError         RuntimeError   a `copy=False` value was written to later
    ├── TransformedCallError     RuntimeError   a layer ran under `vmap` / `torch.func`, or was traced
    ├── InferenceReferenceError  RuntimeError   `copy=False` under `inference_mode`
    ├── MaskError                ValueError     a mask does not fit its activation
    ├── SequenceAxisError        ValueError     which axis is the sequence is not known
    ├── PositionError            IndexError     a row is too short for `position(k)`
    ├── PoolingError             ValueError     a row whose span or weights cannot be pooled
    ├── ReducerError             TypeError      a reducer returned something else than a tensor
    ├── CombinationError         ValueError     layers combined as one column that are not alike
    ├── StoredDtypeError         OverflowError  a value is too large for the dtype that is to be stored
    ├── CapacityError            MemoryError    more is kept than `max_bytes`
    ├── StepError                RuntimeError   a step was begun, or left out, where it may not be
    ├── StopEarlyError           RuntimeError   an outer caller needed the output that `stop_early` left out
    ├── ActivationNotFoundError  KeyError       no such entry in activations or a store
    ├── MatchError               ValueError     what is compared does not belong together
    ├── StoreError               OSError        a folder is not a store, or a damaged one
    │   └── OtherRunError        OSError        a store holds another run than the one that is to go on
    ├── OtherProcessError        RuntimeError   another of the processes that share a model failed in a run
    ├── MissingExtraError        ImportError    an optional dependency is not installed
    └── UnsupportedTorchError    RuntimeError   this release of torch lacks what is needed

An error keeps what it is about as attributes. Its text is one sentence that says what is wrong, with the value, and one
that says what to do. Where an argument, a file or a step is not as it must be, the first reads
``<what> must <condition>, got <value>.``
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from activation_extractor._display import close_sentence, examples, shown

__all__ = [
    "ActivationError",
    "ActivationNotFoundError",
    "ArgumentError",
    "ArgumentTypeError",
    "CapacityError",
    "CombinationError",
    "DuplicateLayerError",
    "GradientNotFoundError",
    "InferenceReferenceError",
    "LayerNotFoundError",
    "LayerNotRunError",
    "MaskError",
    "MatchError",
    "MissingExtraError",
    "OtherProcessError",
    "OtherRunError",
    "OverwrittenError",
    "PartError",
    "PoolingError",
    "PositionError",
    "ReducerError",
    "SequenceAxisError",
    "StepError",
    "StopEarlyError",
    "StoreError",
    "StoredDtypeError",
    "TensorKindError",
    "TransformedCallError",
    "UnhookableLayerError",
    "UnsupportedTorchError",
    "UntappedLayerError",
    "ValueNotFoundError",
]

_MOST_DIFFERENCES = 3
_LIKELY_REASONS = (
    "a branch that was not taken, `.forward()` called directly, another thread, an error that the model caught, or a "
    "fused path such as MultiheadAttention's"
)


class ActivationError(Exception):
    """Base of every error of this library; errors survive pickling, as between processes."""

    def __reduce__(self) -> Any:
        state = {name: value if _is_picklable(value) else shown(value) for name, value in self.__dict__.items()}
        return _rebuilt, (type(self), self.args, state)


def _is_picklable(value: object) -> bool:
    """Whether a value that an error keeps reaches another process: a lambda, a lock or a generator does not."""
    try:
        pickle.dumps(value)
    except Exception:  # each kind of object has its own
        return False
    return True


def _rebuilt(kind: type[ActivationError], args: tuple[Any, ...], state: dict[str, Any]) -> ActivationError:
    # Past the class's own constructor; MemoryError's cannot be asked by name for a class with two bases.
    new = Exception.__new__ if issubclass(kind, MemoryError) else kind.__new__
    error = new(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ArgumentError(ActivationError, ValueError):
    """An argument's value is not usable.

    Attributes:
        argument: the argument's name.
        value: what was given.
    """

    def __init__(self, argument: str, condition: str, value: object, advice: str = "") -> None:
        self.argument, self.value = argument, value
        super().__init__(f"{argument} must {condition}, got {shown(value)}.{advice and ' ' + advice}")


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is not of a usable type."""


class LayerNotFoundError(ActivationError, LookupError):
    """A selection matches no layer of the model.

    Attributes:
        selection: what was asked for.
        close_matches: names of layers that look like it.
    """

    def __init__(self, selection: object, close_matches: Sequence[str] = (), advice: str = "") -> None:
        self.selection, self.close_matches = selection, tuple(close_matches)
        advice = (
            close_sentence(close_matches)
            or advice
            or "`[name for name, _ in model.named_modules()]` lists what there is."
        )
        super().__init__(f"No layer matches {shown(selection)}. {advice}")


class DuplicateLayerError(ActivationError, ValueError):
    """One recorded name stands for two things.

    Attributes:
        name: the recorded name.
    """

    def __init__(self, name: str, reason: str, advice: str) -> None:
        self.name = name
        super().__init__(f"A recorded name must stand for one thing, got {name!r} {reason}. {advice}")


class UnhookableLayerError(ActivationError, TypeError):
    """A selected module cannot be reached by a hook.

    Attributes:
        layer: the layer's name.
    """

    def __init__(self, layer: str, reason: str, advice: str) -> None:
        self.layer = layer
        super().__init__(f"Layer {layer!r} must be an ordinary module that runs, got {reason}. {advice}")


class UntappedLayerError(ActivationError, RuntimeError):
    """A requested layer is part of a compiled graph and has no tap there, while others of the model have.

    Attributes:
        layers: their recorded names.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        super().__init__(
            f"The model is compiled and instrumented, but not for {examples(layers)}. "
            "Pass what is captured to instrument() too, with the same side and select=, or undo it with "
            "handle.remove()."
        )


class LayerNotRunError(ActivationError, RuntimeError):
    """Requested layers did not run in a step, or, in a block without a sink, in the last forward of the model.

    Attributes:
        layers: their names.
        reasons: why, for those of which it is known.
    """

    def __init__(self, layers: Sequence[str], reasons: Mapping[str, str] | None = None) -> None:
        self.layers = tuple(layers)
        self.reasons = {layer: (reasons or {})[layer] for layer in layers if layer in (reasons or {})}
        causes = list(dict.fromkeys(self.reasons.get(layer, _LIKELY_REASONS) for layer in layers))
        super().__init__(
            f"Requested layers did not run in the step: {examples(layers)} ({'; '.join(causes)}). "
            "Leave out what does not run, or pass missing='skip'."
        )


class GradientNotFoundError(ActivationError, RuntimeError):
    """Requested gradients never came.

    Attributes:
        layers: their recorded names.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        super().__init__(
            f"Requested gradients did not come before the step ended: {examples(layers)} (no backward, grad mode off, "
            "or an output that the loss does not depend on). "
            "Call backward inside the block, or pass missing='skip'."
        )


class ValueNotFoundError(ActivationError, TypeError):
    """A layer's value holds no tensor to record.

    Attributes:
        layer: the layer's name.
        value_type: the name of the value's type.
    """

    def __init__(self, layer: str, value: object, select: object = None, reason: str = "", advice: str = "") -> None:
        self.layer, self.value_type = layer, type(value).__name__
        where = "" if select is None else f" at select={select!r}"
        reason = reason or f"its value is of type {self.value_type}"
        advice = advice or (
            "Choose the part to record with outputs(..., select=) or inputs(..., select=), or leave the layer out."
        )
        super().__init__(f"Layer {layer!r} has no tensor to record{where}, {reason}. {advice}")


class TensorKindError(ActivationError, TypeError):
    """A tensor has no plain numbers where these are needed, in an array, a file or a reducer.

    Attributes:
        kind: what it is.
        advice: what makes plain numbers of it.
        layer: the layer whose value it is; None where that is not known.
    """

    def __init__(self, kind: str, advice: str, layer: str | None = None, place: str = "here") -> None:
        self.kind, self.advice, self.layer = kind, advice, layer
        what = "A tensor" if layer is None else f"The value of layer {layer!r}"
        super().__init__(f"{what} must hold plain numbers {place}, got {kind}. {advice}")


class PartError(ActivationError, ValueError):
    """Of a layer's value each process holds a part, and nobody says what becomes of it, or it is not known which part.

    Attributes:
        layer: the layer's name.
        part: what this process holds; "" where it is not known how the value is cut.
    """

    def __init__(self, layer: str, part: str) -> None:
        self.layer, self.part = layer, part
        got = part or "a part of something that is spread over processes, cut in a way that is not known"
        advice = "Pass sharded='gather', in each process, for the whole, or sharded='local' for this process's part."
        if not part:
            advice = (
                "Pass sharded='local' for this process's part, or capture a layer before it, or behind it, that is "
                "parallel itself."
            )
        super().__init__(f"The value of layer {layer!r} must be whole in this process, got {got}. {advice}")


class OverwrittenError(ActivationError, RuntimeError):
    """A value kept with ``copy=False`` was written to after its layer returned it.

    Attributes:
        layer: the layer's name.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        super().__init__(
            f"The value of layer {layer!r}, kept with copy=False, was written to after the layer returned it. "
            "Leave copy=False out to keep it as the layer returned it."
        )


class InferenceReferenceError(ActivationError, RuntimeError):
    """``copy=False`` was used under ``torch.inference_mode``."""

    def __init__(self) -> None:
        super().__init__(
            "copy=False cannot be used under torch.inference_mode: its tensors have no version counters, so writing to "
            "them later would not be seen. Use torch.no_grad, or leave copy=False out."
        )


class TransformedCallError(ActivationError, RuntimeError):
    """A layer ran under a transform of ``torch.func``, or the model was traced.

    Attributes:
        layer: the layer's name; "" for the whole model.
    """

    def __init__(self, layer: str, tracer: str | None = None) -> None:
        self.layer = layer
        what = f"Layer {layer!r}" if layer else "The model"
        where = "vmap or another transform of torch.func, where a value is a slice of the batch"
        advice = "Capture a plain call of the model instead."
        if tracer is not None:
            where = f"{tracer}, which traces it and has no values to record"
            advice = "Trace it outside of the block."
        super().__init__(f"{what} ran inside {where}. {advice}")


class MaskError(ActivationError, ValueError):
    """A mask does not fit the activation that it belongs to.

    Attributes:
        layer: the layer's name, or None when the mask itself is at fault.
    """

    def __init__(self, condition: str, value: str, advice: str, layer: str | None = None) -> None:
        self.layer = layer
        what = "The mask" if layer is None else f"The mask for layer {layer!r}"
        super().__init__(f"{what} must {condition}, got {value}. {advice}")


class SequenceAxisError(ActivationError, ValueError):
    """It is not known which axis of an activation is the sequence.

    Attributes:
        layer: the layer's name.
        shape: the activation's shape.
    """

    def __init__(self, layer: str, shape: Sequence[int], condition: str, advice: str) -> None:
        self.layer, self.shape = layer, tuple(shape)
        super().__init__(f"The activation of layer {layer!r} must {condition}, got shape {self.shape}. {advice}")


class PositionError(ActivationError, IndexError):
    """A row has fewer real positions than ``position(k)`` needs.

    Attributes:
        row: the row's index in the batch.
    """

    def __init__(self, position: int, row: int, real: int) -> None:
        self.row = row
        super().__init__(
            f"Row {row} has {real} real positions, too few for position({position}). "
            "Leave short rows out, or use 'first' or 'last'."
        )


class PoolingError(ActivationError, ValueError):
    """A row cannot be pooled as it is asked for: its span does not lie in it, or its weights are none.

    Attributes:
        row: the row's index in the batch.
    """

    def __init__(self, what: str, condition: str, got: str, row: int, advice: str) -> None:
        self.row = row
        super().__init__(f"{what} must {condition}, got {got} in row {row}. {advice}")


class ReducerError(ActivationError, TypeError):
    """A reducer returned something else than a tensor with a row for each row of its input.

    Attributes:
        reducer: the reducer's name.
        layer: the layer's name.
    """

    def __init__(self, reducer: str, layer: str, got: str) -> None:
        self.reducer, self.layer = reducer, layer
        super().__init__(
            f"Reducer {reducer!r} must return a tensor with a row for each sample, got {got} for layer {layer!r}. "
            "A reducer is a callable (activation, mask) -> tensor."
        )


class StoredDtypeError(ActivationError, OverflowError):
    """A finite value of an activation is too large for the dtype in which it is to be stored.

    Attributes:
        layer: the layer's name.
        reducer: the reducer's name.
        row: the row, by its number in its step, and by its id if it has one.
        dtype: the dtype's name.
    """

    def __init__(self, layer: str, reducer: str, row: str, value: float, dtype: str, largest: float) -> None:
        self.layer, self.reducer, self.row, self.dtype = layer, reducer, row, dtype
        super().__init__(
            f"What is stored of layer {layer!r} with {reducer!r} must fit {dtype}, whose largest number is "
            f"{largest:.6g}, got {value:.6g} in {row}. Store it in a dtype of a wider range, or leave dtype= out."
        )


class CombinationError(ActivationError, ValueError):
    """Layers cannot be combined as one column: they differ in what has to be the same.

    Attributes:
        name: the recorded name of the column.
    """

    def __init__(self, name: str, condition: str, got: str) -> None:
        self.name = name
        super().__init__(
            f"The layers combined as {name!r} must {condition}, got {got}. "
            "Combine layers that are alike, or record each by itself."
        )


class CapacityError(ActivationError, MemoryError):
    """More is kept than ``max_bytes`` allows.

    Attributes:
        max_bytes: the cap.
        kept_bytes: what would be kept.
        layer: the layer whose value did not fit.
    """

    def __init__(self, max_bytes: int, kept_bytes: int, layer: str) -> None:
        self.max_bytes, self.kept_bytes, self.layer = max_bytes, kept_bytes, layer
        super().__init__(
            f"With layer {layer!r} the block would keep {kept_bytes} bytes, more than max_bytes={max_bytes}. "
            "Reduce in the block, capture fewer layers, write to a sink, or raise max_bytes."
        )


class StepError(ActivationError, RuntimeError):
    """A step was begun, or left out, where it may not be, or does not hold what it should."""

    def __init__(self, condition: str, got: str, advice: str) -> None:
        super().__init__(f"A step must {condition}, got {got}. {advice}")


class StopEarlyError(ActivationError, RuntimeError):
    """An outer caller needed the output that ``stop_early`` left out."""

    def __init__(self) -> None:
        super().__init__(
            "With stop_early the model returns None, and an outer caller (generate, a pipeline, a loss) needed its "
            "output. Call the model directly and do not use what it returns, or leave stop_early out."
        )


class ActivationNotFoundError(ActivationError, KeyError):
    """No such entry in activations or a store.

    Attributes:
        key: what was asked for.
    """

    def __init__(self, key: object, text: str) -> None:
        self.key, self._text = key, text
        super().__init__(key)

    def __str__(self) -> str:  # KeyError would show the repr of its text
        return self._text


class MatchError(ActivationError, ValueError):
    """The two sides of a comparison do not belong together."""

    def __init__(self, condition: str, got: str, advice: str) -> None:
        super().__init__(f"What is compared must {condition}, got {got}. {advice}")


class StoreError(ActivationError, OSError):
    """A folder cannot be written as a store, is not one, or is a damaged one.

    Attributes:
        path: the folder or file.
    """

    def __init__(self, path: object, condition: str, got: str, advice: str) -> None:
        self.path = path
        super().__init__(f"{str(path)!r} must {condition}, got {got}. {advice}")


class OtherRunError(StoreError):
    """A store holds another run, or rows of other data, than what is to go on with it; the store is untouched.

    Attributes:
        differences: what differs.
    """

    def __init__(self, path: object, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        shown = ", ".join(differences[:_MOST_DIFFERENCES])
        rest = len(differences) - _MOST_DIFFERENCES
        self.path = path
        more = f" and {rest} more" if rest > 0 else ""
        super(StoreError, self).__init__(
            f"{str(path)!r} holds another run: it differs in {shown}{more}. "
            "Use what it was begun with, or a new folder."
        )


class OtherProcessError(ActivationError, RuntimeError):
    """Another process failed, of those that share a model and run a data set together.

    Attributes:
        rank: its rank.
        reason: its error.
    """

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(f"A run of several processes must go well in each of them, got in rank {rank} {reason}")


class MissingExtraError(ActivationError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        extra: the extra that holds it.
    """

    def __init__(self, what: str, extra: str, missing: str, advice: str | None = None) -> None:
        self.extra = extra
        advice = advice or f"Install it with: pip install 'activation_extractor[{extra}]'"
        super().__init__(f"{what} needs {missing}, which is not installed. {advice}")


class UnsupportedTorchError(ActivationError, RuntimeError):
    """This release of torch lacks something private that the library needs.

    Attributes:
        name: what it lacks.
        version: the release.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, str(version)
        super().__init__(
            f"torch {self.version} lacks {name!r}, which is needed here. "
            "Use a release of the README's table of versions, and report this one."
        )


def add_note(error: BaseException, note: str) -> None:
    """Add a line to what is shown with an error; Python 3.10 keeps it in ``__notes__``, and does not show it itself."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        vars(error).setdefault("__notes__", []).append(note)
