"""Everything private of torch that this library leans on: an entry for each name, and no other file names one.

What is of its compiler is in `_private_compiler`.


Where a release of torch lacks a name, importing this file still works. A substitute is used where there is one;
otherwise the first use raises `UnsupportedTorchError`, which says the name and the release. Every release of the
README's table has all of these names.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activation_extractor.errors import UnsupportedTorchError

# As torch declares them; they are OrderedDicts, whose instances can have attributes.
Hooks = OrderedDict[int, Callable[..., Any]]
Flags = dict[int, bool]


def private(name: str) -> Any:
    """What torch keeps under a dotted name, or a function that raises where this torch lacks it.

    Example:
        >>> private("_C._current_graph_task_id")()
        -1
    """
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return _Missing(f"torch.{name}")


def of_module(*names: str) -> Any:
    """A function that gets attributes of a module, one or a tuple; it raises where this torch's modules lack one."""
    lacking = [name for name in names if not hasattr(_MODULE, name)]
    return _Missing(f"torch.nn.Module.{lacking[0]}") if lacking else attrgetter(*names)


class _Missing:
    """Takes the place of a function that this torch lacks, and raises when it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: object) -> Any:
        raise UnsupportedTorchError(self._name, torch.__version__)


def present(value: Any) -> Any:
    """The value; UnsupportedTorchError where this torch lacks it."""
    return value() if isinstance(value, _Missing) else value


_MODULE = nn.Module()

# -1 outside of backward: it distinguishes a checkpoint's recomputation from a forward, in 50 ns. No public way.
backward_task: Callable[[], int] = private("_C._current_graph_task_id")

# Whether a transform of torch.func (vmap, grad) is under way, whose values are slices of the batch. No public way.
is_transformed: Callable[[], bool] = private("_C._are_functorch_transforms_active")

# Whether a tensor is such a value. No public way.
is_wrapped: Callable[[Tensor], bool] = private("_C._functorch.is_functorch_wrapped_tensor")

# What traces a model: `jit.trace`; `torch.fx`, by a flag; modes that run operators on placeholders. No public way.
_is_jit_tracing: Callable[[], bool] = private("_C._is_tracing")
_count_modes: Callable[[], int] = private("_C._len_torch_dispatch_stack")
_mode_of: Callable[[Any], Any] = private("_C._get_dispatch_mode")
_mode_keys = private("_C._TorchDispatchModeKey")
_FX = "torch.fx._symbolic_trace"


def active_tracer() -> str | None:
    """What traces the calls that are made now, in place of running them on values; None where nothing does."""
    if _is_jit_tracing():
        return "torch.jit.trace"
    if _count_modes() and any(map(_mode_of, (_mode_keys.FAKE, _mode_keys.PROXY, _mode_keys.FUNCTIONAL))):
        return "torch.export, make_fx or a FakeTensorMode"
    fx = sys.modules.get(_FX)
    is_tracing = getattr(fx, "is_fx_symbolic_tracing", getattr(fx, "is_fx_tracing", bool))  # older releases: the latter
    return "torch.fx.symbolic_trace" if is_tracing() else None


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor is a tracer's and has no values: a FakeTensor or a FunctionalTensor."""
    return type(tensor).__module__.startswith("torch._subclasses.")


# `torch.inference_mode` without its cost in Python; the public one is the substitute.
inference_guard: Any = getattr(torch._C, "_InferenceMode", torch.inference_mode)

# How often a tensor's memory was written to in place, by autograd's own counter. RuntimeError for an inference tensor.
version_of: Callable[[Tensor], int] = (
    attrgetter("_version") if hasattr(Tensor, "_version") else _Missing("torch.Tensor._version")
)

# Indices and values of a sparse COO tensor as it is; the public ways to them refuse one that is not coalesced.
_coo_parts = [
    getattr(Tensor, name) if hasattr(Tensor, name) else _Missing(f"torch.Tensor.{name}")
    for name in ("_indices", "_values")
]


def coo_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse COO tensor, coalesced or not."""
    return _coo_parts[0](tensor), _coo_parts[1](tensor)


# What `nn.Module.__call__` runs in place of its own `_call_impl`, if an instance has it; `Module.compile` sets it, and
# copies and pickles leave it out. Hooks could not replace it: a forward that raises skips them, and no hook stops one.
CALL = "_compiled_call_impl"
_calls = of_module("_call_impl", CALL)


def own_call(module: nn.Module) -> Callable[..., Any]:
    """What a module runs when it is called, hooks included, unless `CALL` is set."""
    call: Callable[..., Any] = _calls(module)[0]
    return call


# Its `next_id`, the number of the next hook, grows with every one that is registered on anything: it is read in 30 ns.
# A hook that takes the number itself needs no handle, which is what takes longest in registering.
hook_counter = RemovableHandle
if not hasattr(RemovableHandle, "next_id"):
    hook_counter = _Missing("torch.utils.hooks.RemovableHandle.next_id")  # type: ignore[misc, assignment]

# The module's own dictionary of forward hooks: removing a hook by its id costs a third of a handle's `remove`.
forward_hooks: Callable[[nn.Module], Hooks] = of_module("_forward_hooks")

# Its dictionary of hooks that run before the forward, and the flags of those that take keyword arguments.
forward_pre_hooks: Callable[[nn.Module], tuple[Hooks, Flags]] = of_module(
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"
)
# The flags of forward hooks that run although the forward fails.
always_called: Callable[[nn.Module], Flags] = of_module("_forward_hooks_always_called")

_all_forward_hooks = of_module("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_children = of_module("_modules")
_forward_unimplemented = private("nn.modules.module._forward_unimplemented")

# What is in a module's dictionaries of hooks, by their names.
HOOK_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


# The methods that register hooks, and the dictionaries to which they add.
REGISTERING = {
    "register_forward_pre_hook": "_forward_pre_hooks",
    "register_forward_hook": "_forward_hooks",
    "register_full_backward_pre_hook": "_backward_pre_hooks",
    "register_full_backward_hook": "_backward_hooks",
    "register_backward_hook": "_backward_hooks",
}


def hooks_in(module: nn.Module | None, name: str) -> Hooks:
    """A module's dictionary of this name, or torch's own for hooks on every module where the module is None."""
    if not hasattr(_MODULE, name):
        raise UnsupportedTorchError(f"torch.nn.Module.{name}", torch.__version__)
    if module is None:
        hooks: Hooks = present(private(f"nn.modules.module._global{name}"))
        return hooks
    found: Any = getattr(module, name, OrderedDict())  # a module whose constructor has not run has none
    return found  # type: ignore[no-any-return]


def clear_forward_hooks(module: nn.Module) -> None:
    """Remove every forward hook, by whomever it was registered."""
    for hooks in _all_forward_hooks(module):
        hooks.clear()


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's children by name, a tied one under each of its names, which `named_children` does not give."""
    children = _children(module)
    return children if isinstance(children, dict) else dict(module.named_children())  # a TorchScript module's is none


def children_in(module: nn.Module) -> dict[str, nn.Module | None]:
    """What `children_of` gives, without running any code of the module's class; none where there is no dictionary."""
    children = vars(module).get("_modules")
    return children if isinstance(children, dict) else {}


def has_forward(module: nn.Module) -> bool:
    """Whether the module's class has a forward: one without has a function of this name, which raises."""
    unimplemented: str = present(_forward_unimplemented).__name__
    return getattr(module.forward, "__name__", "") != unimplemented


# What `nn.DataParallel` calls to make the replicas of a module.
REPLICATE = "_replicate_for_data_parallel"


_PIPELINE = "torch.distributed.pipelining.stage"
_RUNS_A_PART, _PART = "forward_one_chunk", "fwd_chunk_id"
_MOST_OF_A_STAGE = 60  # between a stage of a pipeline and its module, wrapped as it may be


def uses_pipelines() -> bool:
    """Whether this process has imported pipelines, without which no model is a stage of one."""
    return _PIPELINE in sys.modules


def microbatch() -> tuple[int, int] | bool:
    """For a call that a pipeline's stage makes: the identity of the stage, and the number of the microbatch.

    True for a call by which a stage looks what its module returns, on numbers of no meaning; False for any other call.
    No public way: a stage leaves no mark on its module.
    """
    frame: FrameType | None = sys._getframe(1)
    looks = False
    for _ in range(_MOST_OF_A_STAGE):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == _PIPELINE:
            if frame.f_code.co_name == _RUNS_A_PART:
                return id(frame.f_locals.get("self")), int(frame.f_locals.get(_PART, 0))
            looks = True
        frame = frame.f_back
    return looks
