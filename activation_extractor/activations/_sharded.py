"""What becomes of values of which each process holds a part: DTensors, and what tensor parallelism hands out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from activation_extractor._hooks._context import Owner
from activation_extractor._hooks._forwards import RunForward
from activation_extractor._hooks._taps import Attached, Pick, Record, pick_tensor
from activation_extractor._hooks._tensor_parts import Layout, PartTracker, arrived, is_one_of_several, layout_of
from activation_extractor.activations._options import Options
from activation_extractor.errors import PartError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._reducers import owns_result


class Sharding:
    """Makes whole values of parts, or hands out parts and says so, or refuses them: what ``sharded=`` says.

    Attributes:
        hooks: what is attached to follow parts.
    """

    def __init__(self, root: nn.Module, options: Options, owner: Owner, *, is_spread: bool) -> None:
        self._owner, self._sharded = owner, options.sharded
        self._tracker = PartTracker(root) if is_spread else None
        self.hooks = Attached()
        # A reducer of the user's may do with a DTensor what it likes.
        reducers = options.reducers.values()
        self._needs_numbers = options.has_sink or any(owns_result(it) and it is not full for it in reducers)

    @classmethod
    def of(cls, root: nn.Module, options: Options, owner: Owner, is_spread: Callable[[], bool]) -> Sharding | None:
        """What a block needs; None where each process holds whole values."""
        if not is_one_of_several():
            return None
        if options.sharded is None and not is_spread():
            return None
        return cls(root, options, owner, is_spread=is_spread())

    def attach(self, root: nn.Module) -> None:
        """Attach the hooks that follow parts through the model, before those that record."""
        if self._tracker is not None:
            self._tracker.attach(root.modules(), self.hooks)
            self.hooks.hide()

    def around(self, run: RunForward) -> RunForward:
        """What runs a forward as `run` does, and follows parts in it."""
        tracker = self._tracker
        if tracker is None:
            return run

        def tracked(call: Any, /, *args: Any, **kwargs: Any) -> Any:
            with tracker.following():
                return call(*args, **kwargs)

        return lambda call, /, *args, **kwargs: run(partial(tracked, call), *args, **kwargs)

    def pick(self, target: Target) -> Pick:
        """What finds the tensor to record in what a layer takes or returns, and settles what becomes of a part.

        It raises a PartError for a part of which nobody says what becomes of it.
        """

        def pick_settled(value: Any) -> Tensor:
            tensor = pick_tensor(target, self._owner, value)
            return self._settled(target, tensor, self._layout(tensor))

        return pick_settled

    def settle_gradient(self, target: Target, tensor: Tensor, record: Record) -> Record:
        """What records the gradient of a tensor, which is cut as the tensor is; PartError as for the tensor."""
        layout = self._layout(tensor)
        if self._is_refused(layout) and layout_of(tensor) is None:
            raise PartError(target.layer, _described(layout))
        return lambda gradient: record(self._settled(target, gradient, layout_of(gradient) or layout))

    def _layout(self, tensor: Tensor) -> Layout | bool:
        """The layout of a part, True where it is not known; False for what is no part."""
        return layout_of(tensor) or (self._tracker is not None and self._tracker.layout(tensor))

    def _is_refused(self, layout: Layout | bool) -> bool:
        if layout is False or (isinstance(layout, Layout) and layout.is_whole) or self._sharded == "local":
            return False
        return self._sharded is None or layout is True

    def _settled(self, target: Target, tensor: Any, layout: Layout | bool) -> Tensor:
        is_distributed = layout_of(tensor) is not None
        is_whole = isinstance(layout, Layout) and layout.is_whole
        if is_distributed and self._sharded is None and (is_whole or not self._needs_numbers):
            settled: Tensor = tensor.to_local() if self._needs_numbers else tensor
            return arrived(settled)
        if self._is_refused(layout):
            raise PartError(target.layer, _described(layout))
        if isinstance(layout, Layout) and (is_whole or self._sharded == "gather"):
            return arrived(_gathered(target.layer, tensor, layout))
        if layout:
            self._owner.parts[target.name] = _described(layout) or "a part"
        return arrived(tensor.to_local() if is_distributed else tensor)


def _described(layout: Layout | bool) -> str:
    return layout.describe() if isinstance(layout, Layout) else ""


def _gathered(layer: str, tensor: Any, layout: Layout) -> Tensor:
    """The whole, from the parts of all processes, each of which calls this."""
    if layout_of(tensor) is None:
        if layout.is_whole:
            return tensor  # type: ignore[no-any-return]
        from torch.distributed.tensor import DTensor

        tensor = arrived(tensor)
        shape = layout.shape or _shape_of_whole(layer, tensor, layout)
        cut: Any = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
        tensor = DTensor.from_local(tensor, layout.mesh, layout.placements, run_check=False, **cut)
    whole: Tensor = tensor.full_tensor()
    return whole


def _shape_of_whole(layer: str, tensor: Tensor, layout: Layout) -> tuple[int, ...]:
    """The shape of the whole, by the sizes of all parts; PartError where these are not such as torch makes."""
    shape = list(tensor.shape)
    for axis, placement in enumerate(layout.placements):
        if placement.is_shard():
            sizes: list[Any] = [None] * layout.mesh.size(axis)
            distributed.all_gather_object(sizes, shape[placement.dim], group=layout.mesh.get_group(axis))
            shape[placement.dim] = sum(sizes)
            of_torch = list(map(len, torch.arange(sum(sizes)).chunk(len(sizes))))
            if sizes != of_torch + [0] * (len(sizes) - len(of_torch)):
                raise PartError(layer, "")
    return tuple(shape)
