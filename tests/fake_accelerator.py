"""A device of our own on a machine that has none: "fakedev", whose tensors live in host memory that only it may read.

Tensors on it are of torch's own class, and share storages as on CUDA. What is modelled of time, and so which mistakes
show, is told in `fake_time`. It cannot be taken out of a process again: tests of it run in a child: `run_in_child`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_streams
import fake_time
import pytest
import torch
from fake_streams import Event, Stream
from fake_time import NAME, HostCopy, Log, Memory, finish, lock, recorded
from torch import Tensor
from torch.utils import _device, backend_registration
from torch.utils._pytree import arg_tree_leaves, tree_map

__all__ = ["IN_CHILD", "NAME", "Event", "Log", "Stream", "finish", "install", "pinned", "recorded", "run_in_child"]

IN_CHILD = os.environ.get("FAKE_ACCELERATOR") == "1"  # whether this process is one that the device may be installed in
DEVICE_INDEX = 0

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SIZED_BY_DATA = {aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_consecutive, aten.unique_dim}
_pinning = {"allowed": True}
_libraries: list[torch.library.Library] = []  # what they register lasts as long as they do
_real_empty = torch.empty


def run_in_child(path: str | Path) -> int:
    """Run a file's tests in a process that may have the device; how many passed.

    Raises:
        AssertionError: one failed, or there were none. The text is the child's output.
    """
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no accelerator that is written in Python")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", str(path)]
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"FAKE_ACCELERATOR": "1"},
    )
    passed = re.search(r"(\d+) passed", child.stdout)
    if child.returncode or passed is None:
        raise AssertionError(child.stdout + child.stderr)
    return int(passed[1])


def install() -> None:
    """Make the device known to torch, for the rest of this process. A second call does nothing."""
    if _libraries:
        return
    _device._device_constructors()  # remembers the real `torch.empty`, which `with torch.device(...)` goes by
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_device_module())
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    some.impl("_to_copy", _to_copy, "PrivateUse1")
    some.impl("convolution_overrideable", lambda *args: _run(aten.convolution.default, *args), "PrivateUse1")
    _libraries.extend([everything, some])
    torch.Stream, torch.Event, torch.empty = Stream, Event, _empty
    for function in (fake_streams.current_stream, fake_streams.set_stream, fake_streams.synchronize):
        setattr(torch.accelerator, function.__name__, function)
    torch.__future__.set_swap_module_params_on_conversion(True)  # or `model.to` would untie tied weights


def pinned(allowed: bool) -> None:
    """Whether `torch.empty(..., pin_memory=True)` works; where not it raises, as on a device without such memory."""
    _pinning["allowed"] = allowed


def _device_module() -> Any:
    module = backend_registration._DummyBackendModule()
    module.Stream, module.Event = Stream, Event
    module.current_stream, module.synchronize = fake_streams.current_stream, fake_streams.synchronize
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def _empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    if not pin_memory or not _pinning["allowed"]:
        return _real_empty(*size, **options, pin_memory=pin_memory)
    tensor = _real_empty(*size, **options)
    fake_time.note("pinned_bytes", tensor.nbytes)
    return tensor


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operator that has a tensor of the device, or is to make one, comes here, below autograd."""
    with lock:
        fake_time.note("ops", str(op))
        if op in _OWN:
            return _OWN[op](*args, **kwargs)
        if op.overloadpacket is aten._index_put_impl_:  # `aten.index` has logged this by itself
            args = (args[0], [_brought(index) for index in args[1]], *args[2:])
        mixed = args[:1] if op.overloadpacket is aten.index else args
        _refuse_mixing(op, arg_tree_leaves(*mixed, **kwargs))
        out = _compute(op, args, kwargs)
        if _is_sized_by_data(op, args, kwargs):
            _tell_python()
        return out


def _compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the host's memory, as work of the current stream."""
    stream = fake_streams.current()
    ours = {id(leaf): leaf for leaf in arg_tree_leaves(*args, **kwargs) if _is_on_device(leaf)}
    written = {key: tensor for key, tensor in _written(op, args, kwargs).items() if key in ours}
    stamp = fake_time.now(stream) if op.is_view else fake_time.submit(stream)
    hosts = {
        key: _host(tensor) if op.is_view else _as_seen(tensor, stream, key in written) for key, tensor in ours.items()
    }

    def to_host(leaf: Any) -> Any:
        return "cpu" if isinstance(leaf, torch.device) else hosts.get(id(leaf), leaf)

    out = op(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    for key, tensor in written.items():
        _memory(tensor).write(stamp)
        _follow(tensor, hosts[key], stream)
    owners = {id(hosts[key]): ours[key] for key in ours}
    bases = {_memory(tensor).data._cdata: tensor for tensor in ours.values()}
    out = tree_map(lambda leaf: _on_device(leaf, owners, bases, stream) if isinstance(leaf, Tensor) else leaf, out)
    if not op.is_view:
        made = [_memory(leaf) for leaf in arg_tree_leaves(out, *written.values()) if _is_on_device(leaf)]
        for tensor in ours.values():
            _memory(tensor).readers.add(stamp, fake_time.spoiler(made))
    return out


def _as_seen(tensor: Tensor, stream: int, is_written: bool) -> Tensor:
    """A device tensor's memory as work of a stream finds it; what is to be written to is always that memory."""
    memory = _memory(tensor)
    if fake_time.has_seen(stream, memory.written):
        return _host(tensor)
    if is_written:
        memory.spoil()
        return _host(tensor)
    return fake_time.poisoned(_host(tensor))


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Tensor]:
    """The arguments that an operator writes to."""
    names = {
        arg.name: place for place, arg in enumerate(op._schema.arguments) if arg.alias_info and arg.alias_info.is_write
    }
    given = [args[place] if place < len(args) else kwargs.get(name) for name, place in names.items()]
    return {id(leaf): leaf for leaf in arg_tree_leaves(*given) if isinstance(leaf, Tensor)}


def _on_device(host: Tensor, owners: dict[int, Tensor], bases: dict[int, Tensor], stream: int) -> Tensor:
    """The device's tensor for a result: an argument itself, a view of one, or a new one."""
    if id(host) in owners:
        return owners[id(host)]
    base = bases.get(host.untyped_storage()._cdata)
    if base is None:
        return _new(host, stream)
    if base.dtype is host.dtype:  # a view is an inference tensor if its base is one, whatever the mode
        return aten.as_strided.default.redispatch(_CPU, base, host.size(), host.stride(), host.storage_offset())
    return _place(_blank(host.dtype), base.untyped_storage(), host)


def _new(host: Tensor, stream: int) -> Tensor:
    """A device tensor whose memory is a host tensor's from now on."""
    return _place(_blank(host.dtype), _storage(host.untyped_storage(), stream), host)


def _follow(tensor: Tensor, host: Tensor, stream: int) -> None:
    """Let a device tensor take the shape that its memory was given on the host."""
    if (tensor.size(), tensor.stride()) != (host.size(), host.stride()):
        _place(tensor, _storage(host.untyped_storage(), stream), host)


def _blank(dtype: torch.dtype) -> Tensor:
    return torch._C._acc.create_empty_tensor((0,), dtype)


def _storage(data: torch.UntypedStorage, stream: int) -> torch.UntypedStorage:
    device = torch.device(NAME, DEVICE_INDEX)
    storage = torch._C._construct_storage_from_data_pointer(data.data_ptr(), device, data.nbytes())
    storage.memory = Memory(data, stream)
    return storage


def _place(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    where = (like.storage_offset(), like.size(), like.stride())
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, storage, *where)


def _memory(tensor: Tensor) -> Memory:
    return tensor.untyped_storage().memory


def _host(tensor: Tensor) -> Tensor:
    """A tensor on the host over the same memory."""
    where = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return _real_empty(0, dtype=tensor.dtype, device="cpu").set_(_memory(tensor).data, *where)


def _is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _brought(index: Tensor | None) -> Tensor | None:
    return index if index is None or _is_on_device(index) else index.to(NAME)


def _refuse_mixing(op: Any, leaves: list[Any]) -> None:
    if any(isinstance(leaf, Tensor) and leaf.device.type != NAME and leaf.dim() > 0 for leaf in leaves):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} was given {NAME} and cpu")


def _is_sized_by_data(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host cannot go on before it knows the data, as how much there is to do depends on it."""
    if op.overloadpacket is aten._index_put_impl_:  # one value for all is a `masked_fill` on CUDA, which need not know
        return args[2].numel() > 1 and any(index is not None and index.dtype is torch.bool for index in args[1])
    if op.overloadpacket is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return op.overloadpacket in _SIZED_BY_DATA


def _tell_python() -> None:
    fake_time.note("items", 1)
    fake_time.wait_for_stream(fake_streams.current())


def _empty_on_device(op: Any) -> Any:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        host = op(*args, **kwargs, device="cpu")
        fake_time.poison(host.untyped_storage())
        return _new(host, fake_streams.current())

    return make


def _item(tensor: Tensor) -> Any:
    stream = fake_streams.current()
    value = _as_seen(tensor, stream, is_written=False).item()
    _tell_python()
    return value


def _record_stream(tensor: Tensor, stream: Any) -> None:
    _memory(tensor).kept_for.add(stream.stream_id)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    stream = fake_streams.current()
    if _is_on_device(source) and _is_on_device(target):
        return _compute(aten.copy_.default, (target, source), {})
    kind = "to_device" if _is_on_device(target) else "to_host"
    fake_time.note(kind, (target.nbytes, non_blocking, stream))
    if kind == "to_device":
        _compute(aten.copy_.default, (target, source), {})
    else:
        _begin_copy(source, target, stream)
    if not non_blocking:
        fake_time.wait_for_stream(stream)
    return target


def _begin_copy(source: Tensor, target: Tensor, stream: int) -> None:
    copy = HostCopy(target.detach(), _as_seen(source, stream, is_written=False).clone(), fake_time.submit(stream))
    copy.begin(_memory(source).readers)


def _to_copy(tensor: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    """As torch's own, which needs an allocator of pinned memory for a non-blocking copy to the host."""
    if device is None or device.type != "cpu" or not non_blocking:
        return aten._to_copy.default.redispatch(_CPU, tensor, device=device, non_blocking=non_blocking, **options)
    options = {
        name: value for name, value in options.items() if name in ("dtype", "memory_format") and value is not None
    }
    target = torch.empty_like(_host(tensor), **options)
    if _pinning["allowed"]:
        fake_time.note("pinned_bytes", target.nbytes)
    with lock:
        return _copy_from(tensor, target, non_blocking=True)


_OWN = {
    aten.empty.memory_format: _empty_on_device(aten.empty.memory_format),
    aten.empty_strided.default: _empty_on_device(aten.empty_strided.default),
    aten.set_.source_Storage_storage_offset: lambda tensor, *where: aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, tensor, *where
    ),
    aten.set_.source_Tensor: lambda tensor, source: _place(tensor, source.untyped_storage(), source),
    aten._local_scalar_dense.default: _item,
    aten.record_stream.default: _record_stream,
    aten._copy_from.default: _copy_from,
}
