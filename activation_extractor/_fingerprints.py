"""Fingerprints: what the values of a run depend on, in a form that can be stored and compared.

A fingerprint says that two runs would compute the same, so it holds what changes values (weights, layers, reducers,
mask policy) and not what does not (versions, times, places). A callable counts by its qualified name, bytecode,
constants, defaults, closure, and the plain values and functions of its own module that it names.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 20
_ODD = 0x9E3779B97F4A7C15 - 2**64  # an odd constant without pattern, as a signed 64-bit integer
_ROW_WORDS = 1 << 16
_ROWS_AT_ONCE = 8  # 4 MiB, which a cache may hold
_SAMPLE_BYTES = 1 << 20


def describe(value: Any) -> Any:
    """A value as something that JSON holds: equal for equal values, also in another process.

    Tensors and code are represented by digests; an object of an unknown kind by its type and its attributes.
    """
    return _Describer().describe(value)


def weights_digest(model: nn.Module) -> str:
    """A digest of all parameters and persistent buffers, computed where they live, in hexadecimal.

    It covers names, dtypes, shapes and every bit of every value, and is the same on every device.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    listed = [[name, str(value.dtype), list(value.shape)] for name, value in state.items()]
    sums = [_tensor_sum(value) for value in state.values()]
    return _digest([listed, [int(one) for one in sums]])


def structure_digest(model: nn.Module) -> str:
    """A digest of what a model is beside its weights: its tree of modules with their settings, and its ``config``."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    told = {key: value for key, value in settings.items() if not key.startswith("_") and key != "transformers_version"}
    return _digest([type(model).__qualname__, repr(model), told])


def inputs_crc32(arguments: Any, start: int) -> int:
    """A checksum over what a model is called with, going on from `start`.

    Tensors and arrays of up to 1 MiB count whole; of larger ones words at equal distances, 1 MiB altogether.
    """
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            start = inputs_crc32(value, zlib.crc32(str(name).encode(), start))
        return start
    if isinstance(arguments, tuple | list):
        for value in arguments:
            start = inputs_crc32(value, start)
        return start
    if isinstance(arguments, np.ndarray) and not arguments.dtype.hasobject:
        arguments = torch.from_numpy(np.ascontiguousarray(arguments).reshape(-1).view(np.uint8))
    if isinstance(arguments, Tensor):
        return zlib.crc32(_sample(arguments), zlib.crc32(str((arguments.dtype, *arguments.shape)).encode(), start))
    return zlib.crc32(json.dumps(describe(arguments)).encode(), start)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which parts of two fingerprints differ, and how, as a reader would be told."""
    names = dict.fromkeys([*there, *now])
    return [_difference(name, there.get(name), now.get(name)) for name in names if there.get(name) != now.get(name)]


class _Describer:
    """Describes one value; objects that contain themselves are described once."""

    def __init__(self) -> None:
        self._open: list[int] = []

    def describe(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value if not isinstance(value, complex | bytes) else repr(value)
        if id(value) in self._open or len(self._open) > _DEEPEST:
            return "..."
        self._open.append(id(value))
        try:
            return self._describe(value)
        finally:
            self._open.pop()

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.describe(member) for key, member in value.items()}
        if isinstance(value, AbstractSet):
            return sorted(json.dumps(self.describe(member)) for member in value)
        if isinstance(value, tuple | list):
            return [self.describe(member) for member in value]
        if isinstance(value, Tensor):
            return {"tensor": [str(value.dtype), list(value.shape), int(_tensor_sum(value))]}
        if isinstance(value, np.ndarray | np.generic):
            return {"array": [str(value.dtype), list(value.shape), zlib.crc32(np.ascontiguousarray(value).tobytes())]}
        if isinstance(value, nn.Module):
            return {"module": structure_digest(value), "weights": weights_digest(value)}
        if isinstance(value, CodeType):
            return self._code(value)
        return self._callable(value)

    def _callable(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return {"partial": self.describe(value.func), "with": self.describe([value.args, value.keywords])}
        if isinstance(value, MethodType):
            return {"method": self.describe(value.__func__), "of": self.describe(value.__self__)}
        if isinstance(value, FunctionType):
            return self._function(value)
        name = getattr(value, "__qualname__", None)
        if name is not None:  # a class, or a function that is not written in Python
            return f"{getattr(value, '__module__', '')}.{name}"
        call = inspect.getattr_static(type(value), "__call__", None)
        state = vars(value) if hasattr(value, "__dict__") else _ADDRESS.sub("", repr(value))
        return {"type": type(value).__qualname__, "state": self.describe(state), "call": self.describe(call)}

    def _function(self, function: FunctionType) -> Any:
        if (function.__module__ or "").partition(".")[0] == __name__.partition(".")[0]:
            return function.__qualname__  # one of this library's: its name says what it does, whatever the version
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells, dict(_named(function))]
        return {"function": function.__qualname__, "code": _digest(self.describe(parts))}

    def _code(self, code: CodeType) -> Any:
        constants = code.co_consts[1:] if code.co_consts and isinstance(code.co_consts[0], str) else code.co_consts
        body = hashlib.sha256(code.co_code).hexdigest()
        return [code.co_name, body, list(code.co_names), self.describe(constants)]


def _named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The plain values and functions of a function's own module that its code names."""
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, int | float | str | Tensor) or (
            isinstance(value, FunctionType) and value.__module__ == function.__module__
        ):
            yield name, value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _tensor_sum(tensor: Tensor) -> Tensor:
    """A 64-bit sum that changes with any one word, and with the order of words.

    Each word times an odd number of its place in a row of words, summed modulo 2**64; the rows' sums are summed in the
    same way. The order in which a device adds does not matter.
    """
    words, rest = _words(tensor)
    multipliers = _multipliers(words.device)
    total = _row_sum(rest.to(torch.int64) + 1, multipliers)
    while len(words) > _ROW_WORDS:
        whole = len(words) // _ROW_WORDS * _ROW_WORDS
        rows = words[:whole].view(-1, _ROW_WORDS)
        sums = [(part * multipliers).sum(1) for part in torch.split(rows, _ROWS_AT_ONCE)]
        words = torch.cat([*sums, _row_sum(words[whole:], multipliers)[None]])
    return total + _row_sum(words, multipliers)


@functools.lru_cache
def _multipliers(device: torch.device) -> Tensor:
    return (torch.arange(_ROW_WORDS, device=device) * _ODD) | 1


def _row_sum(words: Tensor, multipliers: Tensor) -> Tensor:
    return (words * multipliers[: len(words)]).sum()


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a tensor's values as 64-bit words, and the bytes behind the last whole word."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a shard of a distributed tensor
        tensor = tensor.to_local()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    data = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    return data[:whole].view(torch.int64), data[whole:]


def _sample(tensor: Tensor) -> Any:
    words, rest = _words(tensor)
    step = max(1, 8 * len(words) // _SAMPLE_BYTES)
    return b"".join(part.contiguous().cpu().view(torch.uint8).numpy().tobytes() for part in (words[::step], rest))


def _digest(value: Any) -> str:
    text = _ADDRESS.sub("", json.dumps(value, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _difference(name: str, there: Any, now: Any) -> str:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        keys = [key for key in dict.fromkeys([*there, *now]) if there.get(key) != now.get(key)]
        return f"{name} ({', '.join(map(str, keys[:3]))})"
    if isinstance(there, list) and isinstance(now, list):
        lacking, added = _without(there, now), _without(now, there)
        told = [f"without {lacking[0]}"] * bool(lacking) + [f"with {added[0]}"] * bool(added)
        return f"{name} ({', '.join(told) or 'in another order'})"
    return f"{name} ({now!r:.60} in place of {there!r:.60})"


def _without(some: Iterable[Any], others: list[Any]) -> list[str]:
    return [str(one[0] if isinstance(one, list) else one) for one in some if one not in others]
