"""`instrument`: taps on a model, for capturing inside its compiled graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from activation_extractor._hooks._tapped_modules import CALL, add_tap
from activation_extractor._hooks._taps import detach_all
from activation_extractor._private_compiler import check_taps
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import check_model, unwrap
from activation_extractor.layers._selections import resolve
from activation_extractor.reducers._masks import Masks

if TYPE_CHECKING:
    from typing_extensions import Self


def instrument(model: nn.Module, layers: Any) -> Instrumented:
    """Put taps on layers, so that `capture` records them inside compiled graphs.

    A tap becomes part of the graph and does nothing until a block of `capture` that wants its layer is entered, in
    whatever thread: entering and leaving blocks neither breaks the graph nor compiles it again. While all layers of a
    block have taps, nothing runs eagerly that would not without it, here or in other threads. What is recorded is what
    the graph computes, which may differ from eager kernels within rounding.

    A model that has run compiled before is compiled once more. Parts that are not compiled are recorded as well, and
    blocks may ask for further layers of theirs.

    Args:
        model: the model, compiled or not, wrapped or not; before or after ``torch.compile(model)`` or
            ``model.compile()``, of the whole, of blocks of it, or of a function that calls it.
        layers: any selection that `capture` takes: `outputs` and `inputs`, with ``select=`` too. A callable there is
            traced into the graph. Gradients are not possible.

    Returns:
        A handle: ``handle.remove()`` takes the taps off, as does leaving a with-block of it. Taps that another handle
        has put on too stay.

    Raises:
        LayerNotFoundError, DuplicateLayerError, UnhookableLayerError: for `layers`.
        ArgumentError: `layers` asks for gradients.
        UnsupportedTorchError: this release of torch lacks what taps need.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import capture, instrument
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> handle = instrument(model, ["0", "1"])
        >>> compiled = torch.compile(model, fullgraph=True, backend="eager")
        >>> with torch.no_grad(), capture(model, "1") as acts:
        ...     _ = compiled(torch.randn(3, 4))
        >>> acts["1"].shape
        torch.Size([3, 8])
        >>> handle.remove()
    """
    check_taps()
    root, targets = unwrap(check_model(model)), resolve(model, layers)
    gradient = next((target for target in targets if target.side == "gradient"), None)
    if gradient is not None:
        advice = "A graph's backward calls no hooks: capture gradients of the model before it is compiled."
        raise ArgumentError("layers", "be outputs or inputs", gradient.name, advice)
    keys: list[tuple[nn.Module, Any]] = [(target.module, (target.side, target.select)) for target in targets]
    called = Masks("attention_mask", root).watched(root, targets)
    keys += [(module, CALL) for module in (*(module for module, _ in called.values()), root)]
    undo: list[Callable[[], None]] = []
    try:
        undo += [add_tap(module, key) for module, key in keys]
    except BaseException:
        detach_all(undo)
        raise
    return Instrumented(tuple(target.name for target in targets), undo)


class Instrumented:
    """The taps that one call of `instrument` has put on a model.

    Attributes:
        layers: their recorded names.
    """

    def __init__(self, layers: tuple[str, ...], undo: list[Callable[[], None]]) -> None:
        self.layers = layers
        self._undo, self._lock = undo, threading.Lock()

    def __repr__(self) -> str:
        return f"instrument({len(self.layers)} layers{'' if self._undo else ', removed'})"

    def remove(self) -> None:
        """Take the taps off; a second time nothing happens. The graphs that have them are compiled once more."""
        with self._lock:
            detach_all(self._undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
