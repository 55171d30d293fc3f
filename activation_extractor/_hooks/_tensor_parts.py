"""Which tensors of a forward are parts of tensors that are spread over processes, where nothing on them says so.

A DTensor knows its layout. A style of tensor parallelism that hands out a local tensor drops it: what follows computes
with a part, in a tensor like any other. So while such a model runs, each operation is looked at: what it makes of a
part is a part, until a collective makes a whole of it. The layout is known of a DTensor's own memory, of what a style
hands out, and of what operations on single elements make of these; of other parts it is not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from activation_extractor._hooks._copied_modules import ours
from activation_extractor._hooks._taps import Attached
from activation_extractor._private_torch import forward_hooks, forward_pre_hooks
from activation_extractor.layers._structures import tensors_in

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
_TO_PARTS = ("reduce_scatter", "scatter", "alltoall", "all_to_all", "recv")
_OF_NOTHING = ("wait_tensor", "barrier")
_UNDER_WAY = "AsyncCollectiveTensor"
_SAME_ELEMENTS = ("clone", "_to_copy", "detach", "alias", "native_dropout", "contiguous", "copy_")


class Layout(NamedTuple):
    """Which part of a tensor a process holds.

    Attributes:
        mesh: the processes, a ``DeviceMesh``.
        placements: for each dimension of the mesh, the axis that is cut along it, or that nothing is.
        shape: of the whole; None where that is not known.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether each process holds the whole."""
        return all(it.is_replicate() or not self.mesh.size(axis) > 1 for axis, it in enumerate(self.placements))

    def describe(self) -> str:
        """What a process holds, for people."""
        parts = []
        for axis, placement in enumerate(self.placements):
            size, rank = self.mesh.size(axis), self.mesh.get_local_rank(axis)
            if size > 1 and not placement.is_replicate():
                along = f" along axis {placement.dim}" if hasattr(placement, "dim") else " of the sum"
                parts.append(f"part {rank + 1} of {size}{along}")
        return " and ".join(parts)


Known = Layout | None  # of a part: None where nobody says which one it is
_Geometry = tuple[Any, ...]


def layout_of(tensor: Any) -> Layout | None:
    """The layout of a DTensor; None for any other tensor."""
    if type(tensor) is Tensor or not hasattr(tensor, "device_mesh"):
        return None
    return Layout(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))


def is_one_of_several() -> bool:
    """Whether this process has a group of processes, without which no model is spread over any."""
    return distributed.is_available() and distributed.is_initialized()


def is_spread(model: nn.Module) -> bool:
    """Whether processes share a model so that layers may hold parts of their values.

    Weights that FSDP cuts are whole again when a layer runs: these alone do not count.
    """
    modules = list(model.modules())
    if any(next(_styles(module), None) for module in modules):
        return True
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    whole = {id(weight) for module in modules if isinstance(module, fsdp) for weight in module.parameters()}
    layouts = ((weight, layout_of(weight)) for weight in model.parameters())
    return any(
        layout is not None and not layout.is_whole and (id(weight) not in whole or _cuts(layout) > 1)
        for weight, layout in layouts
    )


class PartTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not say
    """Looks at each operation of a forward, and knows which tensors are parts."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = [it for it in model.parameters() if (layout := layout_of(it)) and not layout.is_whole]
        # By memory: a reference that keeps its identity from being used again, and what is known of tensors in it.
        self._parts: dict[int, tuple[StorageWeakRef, dict[_Geometry, Known]]] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow parts through a forward; what is known of them is kept until the next one."""
        self._parts.clear()
        for weight in self._weights:
            self.note(_local(weight), None)
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note what it made of parts."""
        result = func(*args, **(kwargs or {}))
        with suppress(NotImplementedError):  # of a tensor without memory that can be asked for
            self._follow(func, list(_tensors([args, kwargs or {}])), list(_tensors(result)))
        return result

    def layout(self, tensor: Tensor) -> Layout | bool:
        """The layout of a part, or True where it is not known; False for a tensor that is no part."""
        known = self._parts.get(_memory(tensor).cdata) if self._parts else None
        return known is not None and (known[1].get(_geometry(tensor)) or True)

    def note(self, tensor: Tensor, layout: Known) -> None:
        """The tensor is a part, or a whole where this is its layout."""
        memory = _memory(tensor)
        if layout is not None and layout.is_whole:
            self._parts.pop(memory.cdata, None)
        else:
            self._parts.setdefault(memory.cdata, (memory, {}))[1][_geometry(tensor)] = layout

    def _follow(self, function: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = getattr(function, "_opname", "")
        if getattr(function, "namespace", "") in _COLLECTIVES and not name.startswith(_TO_PARTS):
            for tensor in () if name in _OF_NOTHING else outputs:
                self._parts.pop(_memory(tensor).cdata, None)
            return
        for tensor in outputs:
            if (layout := layout_of(tensor)) is not None:
                self.note(_local(tensor), layout)
        parts = [it for it in inputs if layout_of(it) is None and self.layout(it)] if self._parts else []
        if parts:
            keeps = name in _SAME_ELEMENTS or torch.Tag.pointwise in getattr(function, "tags", ())
            self._follow_parts(parts, outputs, keeps=keeps)

    def _follow_parts(self, parts: list[Tensor], outputs: list[Tensor], *, keeps: bool) -> None:
        """Note what an operation has made of parts: cut in the same way where it `keeps` the elements' places."""
        layouts = {self.layout(part) for part in parts}
        only = next(iter(layouts)) if keeps and len(layouts) == 1 else True
        for tensor in outputs:
            if layout_of(tensor) is None and not self.layout(tensor):
                is_same = isinstance(only, Layout) and all(part.shape == tensor.shape for part in parts)
                self.note(tensor, only if is_same and isinstance(only, Layout) else None)

    def attach(self, modules: Iterable[nn.Module], attached: Attached) -> None:
        """Note what styles of tensor parallelism make of what modules take and return."""
        for module in modules:
            for is_input, layouts in [*_styles(module)]:
                if is_input:
                    attached.add_before(module, self._input_hook(layouts))
                else:
                    attached.add(module, self._output_hook(layouts))

    def _output_hook(self, layouts: tuple[Known, ...]) -> Callable[..., None]:
        @ours
        def note_output(called: nn.Module, args: Any, output: Any) -> None:
            self._note_all(tensors_in(output), layouts)

        return note_output

    def _input_hook(self, layouts: tuple[Known, ...]) -> Callable[..., None]:
        @ours
        def note_input(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            self._note_all(args, layouts)

        return note_input

    def _note_all(self, values: Iterable[Any], layouts: tuple[Known, ...]) -> None:
        for tensor, layout in zip(values, layouts, strict=False):
            if isinstance(tensor, Tensor) and layout is not None and layout_of(tensor) is None:
                known = self.layout(tensor)
                if not isinstance(known, Layout) or known[:2] != layout[:2]:  # else it knows the whole's shape, too
                    self.note(tensor, _on_axes(layout, tensor.dim()))


def _styles(module: nn.Module) -> Iterator[tuple[bool, tuple[Known, ...]]]:
    """What styles of tensor parallelism on a module hand out as local tensors, in order: its inputs, or its outputs.

    torch's styles are hooks, those of transformers take the forward's place; both are functions inside of a function.
    """
    for hook in (*forward_hooks(module).values(), module.__dict__.get("forward")):
        if layouts := _layouts(hook, "output"):
            yield False, layouts
    for hook in forward_pre_hooks(module)[0].values():
        if layouts := _layouts(hook, "input"):
            yield True, layouts


def _layouts(function: Any, side: str) -> tuple[Known, ...] | None:
    """The layouts that a style's function gives the tensors of a side; None where it is no such function."""
    if not inspect.isfunction(function) or not function.__closure__:
        return None
    names = inspect.getclosurevars(function).nonlocals
    mesh = names.get("device_mesh", names.get("mesh"))
    if not hasattr(mesh, "get_local_rank"):
        return None
    placed: Any = _placed(names.get("self"), side) or _of_partial(names.get(f"{side}_fn"))
    is_of_each = isinstance(placed, list)  # one for each tensor, else one for each dimension of the mesh
    each = placed if is_of_each else [placed]
    return tuple(Layout(mesh, _tuple(it)) if it else None for it in each)


def _placed(style: Any, side: str) -> Any:
    """The placements of a style that is an object: a list with those of each tensor, or those of the only one."""
    if not getattr(style, "use_local_output", True):
        return None
    desired = getattr(style, f"desired_{side}_layouts", None)
    if desired is not None:
        return [*desired] if isinstance(desired, tuple | list) else [desired]
    return getattr(style, "output_layouts", None) if side == "output" else None


def _of_partial(function: Any) -> Any:
    """The placements of a style that is a function with placements, and whether it gives local tensors, bound to it."""
    bound = function.args if isinstance(function, partial) else ()
    return bound[0] if len(bound) == 2 and bound[1] is True else None


def _tuple(placements: Any) -> tuple[Any, ...]:
    return tuple(placements) if isinstance(placements, tuple | list) else (placements,)


def _on_axes(layout: Layout, axes: int) -> Layout:
    """The layout with axes that are counted from the end counted from the start."""
    placements = tuple(
        type(it)(it.dim + axes) if type(it).__name__ == "Shard" and it.dim < 0 else it for it in layout.placements
    )
    return Layout(layout.mesh, placements)


def _cuts(layout: Layout) -> int:
    return sum(not it.is_replicate() for it in layout.placements)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of the arguments or the result of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _tensors(member)


def _local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, in its own memory."""
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _inner(tensor: Any) -> Tensor:
    """The tensor itself; of the result of a collective that may be under way, what it becomes."""
    inner: Tensor | None = getattr(tensor, "elem", None) if type(tensor).__name__ == _UNDER_WAY else None
    return tensor if inner is None else inner


def arrived(tensor: Any) -> Tensor:
    """The tensor; what a collective is still to bring is waited for."""
    there: Tensor = tensor.wait() if type(tensor).__name__ == _UNDER_WAY else tensor
    return there


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(_inner(tensor).untyped_storage())  # type: ignore[no-untyped-call]


def _geometry(tensor: Tensor) -> _Geometry:
    tensor = _inner(tensor)
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
