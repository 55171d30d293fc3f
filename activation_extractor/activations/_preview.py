"""`preview`: what capturing an example would give and take, before any memory is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from activation_extractor import _display
from activation_extractor._hooks import _context
from activation_extractor._hooks._compiled_models import eager_stance
from activation_extractor._hooks._context import Owner
from activation_extractor._hooks._taps import Attached, Detach, detach_all, pick_tensor, tap
from activation_extractor._hooks._tensor_parts import Layout, PartTracker, is_one_of_several, is_spread, layout_of
from activation_extractor._tensors import copied_bytes
from activation_extractor.errors import ValueNotFoundError
from activation_extractor.layers._modules import check_model, evaluating
from activation_extractor.layers._selections import Target, resolve
from activation_extractor.layers._structures import main_tensor

_HEADER = ("name", "type", "parameters", "shape", "dtype", "bytes", "bytes per row", "calls")


def preview(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> Preview:
    """What `capture` would record of an example, layer by layer, without keeping any of it.

    It costs one forward of the model, in ``eval()`` and under ``inference_mode``; training flags are restored. Of each
    value only shape and dtype are recorded. Without an example nothing runs, and only names, types and numbers of
    parameters are shown.

    Args:
        model: the model, wrapped or not.
        layers: any selection that `capture` takes; a gradient has the shape of its layer's output. Layers that are
            combined have a row each.
        *args: the example, as the model is called; it is not moved to the model's device.
        **kwargs: the example's keyword arguments.

    Returns:
        A `Preview`, a sequence of one `LayerPreview` for each recorded name. A layer that did not run, or whose value
        holds no tensor, has one that says so.

    Raises:
        LayerNotFoundError, DuplicateLayerError, UnhookableLayerError: for `layers`.
        ArgumentTypeError: `model` is not a module.
        TransformedCallError: a layer ran under ``vmap`` or the like.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor.activations import preview
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> preview(model, "*", torch.randn(2, 4))
        Preview: 2 layers, 128 B
          name  type    parameters  shape   dtype    bytes  bytes per row  calls
          0     Linear  40          (2, 8)  float32  64     32             1
          1     ReLU    0           (2, 8)  float32  64     32             1
    """
    rows = {}
    for target in (targets := resolve(check_model(model), layers)):
        parameters = sum(parameter.numel() for parameter in target.module.parameters())
        rows[target.name] = LayerPreview(target.name, target.layer, type(target.module).__name__, parameters)
    if args or kwargs:
        rows = {name: replace(row, calls=0) for name, row in rows.items()}
        _run(model, targets, rows, args, kwargs)
    return Preview(list(rows.values()))


@dataclass(frozen=True)
class LayerPreview:
    """What would be recorded of a layer.

    Attributes:
        name: the recorded name.
        layer: the layer's plain name.
        type: the name of the module's class.
        parameters: how many numbers its parameters hold, those of the modules in it included.
        calls: how often it ran, 0 for a layer that did not; None without an example.
        shape: of the value of its last call; None when there is none, or when it is a nested tensor.
        dtype: of the value of its last call; None when there is none.
        nbytes: bytes that a copy of that value takes.
        bytes_per_row: these, divided by the example's rows and rounded up; None when there is no value.
        part: which part of the layer's value it is, where processes hold one each; "" for a whole one.
    """

    name: str
    layer: str
    type: str
    parameters: int
    calls: int | None = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    nbytes: int = 0
    bytes_per_row: int | None = None
    part: str = ""

    @property
    def shape_text(self) -> str:
        """The shape, or why there is none."""
        if self.shape is not None:
            return str(self.shape)
        if self.calls is None:
            return ""
        return "nested" if self.dtype else "no tensor" if self.calls else "did not run"


class Preview(Sequence[LayerPreview]):
    """The rows of a `preview`, in the selection's order; it shows itself as a table."""

    def __init__(self, layers: Sequence[LayerPreview]) -> None:
        self._layers = tuple(layers)

    @overload
    def __getitem__(self, index: int) -> LayerPreview: ...
    @overload
    def __getitem__(self, index: slice) -> Preview: ...
    def __getitem__(self, index: int | slice) -> LayerPreview | Preview:
        """A layer's row, or a preview of several."""
        return Preview(self._layers[index]) if isinstance(index, slice) else self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return _display.table(*self._table(), header=self._header)

    def _repr_html_(self) -> str:
        return _display.html_table(*self._table(), header=self._header)

    @property
    def _header(self) -> tuple[str, ...]:
        return (*_HEADER, "note") if any(layer.part for layer in self) else _HEADER

    @property
    def nbytes(self) -> int:
        """Bytes that capturing this example would keep, each value whole and of a layer's last call."""
        return sum(layer.nbytes for layer in self)

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        return _display.total("Preview", len(self), self.nbytes, noun="layer"), [
            _cells(layer)[: len(self._header)] for layer in self
        ]


def _cells(layer: LayerPreview) -> tuple[str, ...]:
    dtype = _display.dtype_name(layer.dtype)
    numbers = (layer.nbytes, layer.bytes_per_row) if layer.dtype else (None, None)
    counts = ["" if number is None else f"{number:,}" for number in (*numbers, layer.calls)]
    return layer.name, layer.type, f"{layer.parameters:,}", layer.shape_text, dtype, *counts, layer.part


def _run(model: nn.Module, targets: Sequence[Target], rows: dict[str, LayerPreview], args: Any, kwargs: Any) -> None:
    """Run the example, and write to each layer's row how often it ran and what its last value was like."""
    first = main_tensor((args, kwargs))
    samples = 0 if first is None or first.is_nested or not first.dim() else len(first)
    owner, attached, marks = Owner(), Attached(), Attached()
    tracker = PartTracker(model) if is_one_of_several() and is_spread(model) else None
    undo: list[Detach] = [
        attached.detach,
        marks.detach,
        lambda: _context.leave(owner),
        lambda: eager_stance.leave(owner),
    ]
    try:
        if tracker is not None:
            tracker.attach(model.modules(), marks)
        for target in targets:
            _tap(target, owner, rows, samples, attached, tracker)
        attached.hide()
        owner.put_last = attached.put_last
        eager_stance.enter(owner)
        _context.enter(owner)
        # What processes share may not run under inference_mode: FSDP's weights do not.
        quiet: Any = torch.no_grad() if is_one_of_several() else torch.inference_mode()
        with evaluating(model), quiet, nullcontext() if tracker is None else tracker.following():
            model(*args, **kwargs)
    finally:
        detach_all(undo)


def _tap(
    target: Target,
    owner: Owner,
    rows: dict[str, LayerPreview],
    samples: int,
    attached: Attached,
    tracker: PartTracker | None,
) -> None:
    """Attach what a recording would, for a gradient what its layer's output would get; a value may hold no tensor."""
    nothing = torch.empty(0)

    def pick_or_nothing(value: Any) -> Tensor:
        try:
            return pick_tensor(target, owner, value)
        except ValueNotFoundError:
            return nothing

    def record(value: Tensor) -> None:
        row = rows[target.name]
        row = replace(row, calls=(row.calls or 0) + 1, shape=None, dtype=None, nbytes=0, bytes_per_row=None)
        if value is not nothing:
            nbytes, shape = copied_bytes(value), None if value.is_nested else tuple(value.shape)
            bytes_per_row = -(-nbytes // samples) if samples else None
            row = replace(row, shape=shape, dtype=value.dtype, nbytes=nbytes, bytes_per_row=bytes_per_row)
            layout = layout_of(value) or (tracker is not None and tracker.layout(value))
            row = replace(row, part=layout.describe() if isinstance(layout, Layout) else "a part" * layout)
        rows[target.name] = row

    tap(target, owner, record, attached, pick_or_nothing)
