"""Fingerprints: what the values of a run depend on, in a form that can be stored and compared.

A fingerprint says that two runs would compute the same, so it holds what changes values (weights, layers, reducers,
mask policy) and not what does not (versions, times, places). A callable counts by its qualified name, bytecode,
constants, defaults, closure, and the plain values and functions of its own module that it names.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activation_extractor._format._digests import bytes_where_they_are, parts_of, sampled, tensor_sum

_HAS_DOCSTRING: int | None = getattr(inspect, "CO_HAS_DOCSTRING", None)  # since Python 3.14
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SETTINGS = (*_PLAIN, tuple, torch.dtype)
_INFINITE = (float("inf"), float("-inf"))
_DEEPEST = 20
_DIGESTS = {"weights": "weights", "structure": "structure of the model"}  # what they stand for in a fingerprint
_KINDS = ("entry", "function", "type", "method", "partial", "module", "tensor", "array")  # of what `describe` describes


def describe(value: Any) -> Any:
    """A value as something that JSON holds: equal for equal values, also in another process.

    Tensors and code are represented by digests; an object of an unknown kind by its type and its attributes.
    """
    return _Describer().describe(value)


def weights_digest(model: nn.Module, elsewhere: Callable[[str], Tensor | None] = lambda name: None) -> str:
    """A digest of all parameters and persistent buffers, computed where they live, in hexadecimal.

    It covers names, dtypes, shapes and every bit of every value, and is the same on every device. Weights of which each
    process holds a part are gathered, one after another: it takes the same call in each, and gives the same in each. Of
    weights that placeholders stand for, `elsewhere` finds the values by their names, or None.
    """
    state = dict(_weights(model.state_dict(keep_vars=True)))
    listed = [[name, str(value.dtype), list(value.shape)] for name, value in state.items()]
    sums = [tensor_sum(value) for name in state if (value := _value_of(name, state[name], elsewhere)) is not None]
    return _digest([listed, list(map(int, sums))])


def _weights(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, by name: also those that a quantized layer packs together."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _weights({f"{name}.{index}": member for index, member in enumerate(value)})


def _value_of(name: str, value: Any, elsewhere: Callable[[str], Tensor | None]) -> Tensor | None:
    """A weight; the whole, where a process holds a part; what a placeholder stands for, None if that is not known."""
    if not value.is_meta:
        return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]
    found = elsewhere(name)
    return None if found is None else found.to(value.dtype)


def structure_digest(model: nn.Module) -> str:
    """A digest of what a model is beside its weights: its tree of modules with their settings, and its ``config``.

    Settings are what a module shows in its repr, and its attributes that are plain values.
    """
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    public = {key: value for key, value in settings.items() if key[:1] != "_" and key != "transformers_version"}
    attributes = [_attributes(module) for module in model.modules()]
    return _digest([type(model).__qualname__, repr(model), describe(attributes), public])


def inputs_crc32(arguments: Any, start: int) -> int:
    """A checksum over the arguments of a model's call, continued from `start`.

    Tensors and arrays of up to 1 MiB count whole; of larger ones words at equal distances, 1 MiB altogether.
    """
    if isinstance(arguments, Mapping):
        start = _crc32_of("mapping", len(arguments), start)
        for name, value in arguments.items():
            start = inputs_crc32(value, _crc32_of("name", name, start))
        return start
    if isinstance(arguments, tuple | list):
        start = _crc32_of("sequence", len(arguments), start)
        for value in arguments:
            start = inputs_crc32(value, start)
        return start
    if isinstance(arguments, Tensor) and arguments.is_nested:
        return inputs_crc32(arguments.unbind(), start)
    if isinstance(arguments, Tensor):
        return _tensor_crc32(arguments, start)
    if isinstance(arguments, np.ndarray) and not arguments.dtype.hasobject:
        data = np.ascontiguousarray(arguments).reshape(-1).view(np.uint8)
        return zlib.crc32(sampled(data), _crc32_of("array", (arguments.dtype, *arguments.shape), start))
    return _crc32_of("value", json.dumps(describe(arguments)), start)


def _tensor_crc32(tensor: Tensor, start: int) -> int:
    parts = parts_of(tensor)
    if len(parts) != 1 or parts[0] is not tensor:  # the shape of a jagged tensor holds a number of its own
        return inputs_crc32(parts, _crc32_of("parts of a tensor", type(tensor).__name__, start))
    start = _crc32_of("tensor", (tensor.dtype, *tensor.shape), start)
    return zlib.crc32(sampled(bytes_where_they_are(tensor)).cpu().numpy(), start)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which parts of two fingerprints differ, and how, in words for people: digests are left out."""
    names = dict.fromkeys([*before, *now])
    return [_difference(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


class _Describer:
    """Describes one value; an object is described where it comes first, and then by its number."""

    def __init__(self) -> None:
        self._open: list[int] = []
        self._objects: list[Any] = []

    def describe(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            is_json = not isinstance(value, complex | bytes) and value == value and value not in _INFINITE
            return value if is_json else repr(value)
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
            return sorted(json.dumps(describe(member)) for member in value)  # in no order: each by itself
        if isinstance(value, tuple | list):
            return [self.describe(member) for member in value]
        if isinstance(value, Tensor):
            whole: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
            return {"tensor": [str(value.dtype), list(value.shape), int(tensor_sum(whole))]}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value))
        if isinstance(value, nn.Module):
            return {"module": structure_digest(value), "weights": weights_digest(value)}
        if isinstance(value, CodeType):
            body = hashlib.sha256(value.co_code).hexdigest()
            constants = value.co_consts[_has_docstring(value) :]
            return [value.co_name, body, list(value.co_names), self.describe(constants)]
        return self._object(value)

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        if array.dtype.hasobject:
            return {"array": self.describe(array.tolist())}
        return {"array": [str(array.dtype), list(array.shape), zlib.crc32(np.ascontiguousarray(array).tobytes())]}

    def _object(self, value: Any) -> Any:
        for number, known in enumerate(self._objects):
            if known is value:
                return f"object {number}"
        self._objects.append(value)
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
        state = _state(value)
        described = self.describe(state) if state is not None else _ADDRESS.sub("", repr(value))
        return {"type": type(value).__qualname__, "state": described, "call": self.describe(call)}

    def _function(self, function: FunctionType) -> Any:
        if (function.__module__ or "").partition(".")[0] == __name__.partition(".")[0]:
            return function.__qualname__  # one of this library's: its name says what it does, whatever the version
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells, dict(_named(function))]
        return {"function": function.__qualname__, "code": _digest(self.describe(parts))}


def _state(value: Any) -> Any:
    """The attributes of an object, and those in slots: what pickling takes by default."""
    if sys.version_info >= (3, 11):
        return object.__getstate__(value)
    names: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # private, and done with
    attributes = getattr(value, "__dict__", None) or None
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return (attributes, slots) if slots else attributes


def _has_docstring(code: CodeType) -> bool:
    """Whether the first constant is the docstring, or the None in its place: it computes nothing."""
    if _HAS_DOCSTRING is not None:
        return bool(code.co_flags & _HAS_DOCSTRING)
    return isinstance((*code.co_consts, 0)[0], str | None) and not code.co_name.startswith("<")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values, but for whether it trains and where it was loaded from.

    There are none of bitsandbytes' modules, which note in a forward how they run, nor of FSDP's wrapper: its ranks.
    """
    kind = type(module)
    if kind.__module__.startswith("bitsandbytes.") or kind.__name__ == "FullyShardedDataParallel":
        return {}
    settings = ((name, value) for name, value in vars(module).items() if isinstance(value, _SETTINGS))
    return {name: value for name, value in settings if name[0] != "_" and name not in ("training", "name_or_path")}


def _named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The plain values and functions of a function's own module that its code names."""
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        is_own_function = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if is_own_function or isinstance(value, (*_SETTINGS, Tensor)):
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


def _crc32_of(kind: str, value: Any, start: int) -> int:
    return zlib.crc32(f"{kind} {value!r};".encode(), start)


def _digest(value: Any) -> str:
    text = _ADDRESS.sub("", json.dumps(value, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _difference(name: str, before: Any, now: Any) -> str:
    if name in _DIGESTS:
        return _DIGESTS[name]
    if (isinstance(before, list) and isinstance(now, list)) or (_is_by_name(before) and _is_by_name(now)):
        removed, added = _without(before, now), _without(now, before)
        changed = [key for key in now if key in before and now[key] != before[key]] if isinstance(now, Mapping) else []
        members = {"without": removed, "with": added, "another": changed}
        parts = [f"{how} {some[0]}{_and_more(len(some) - 1)}" for how, some in members.items() if some]
        return f"{name} ({', '.join(parts) or 'in another order'})"
    if _shown(before) == _shown(now):
        return f"{name} (another {_shown(now)})"
    return f"{name} ({_shown(now)} in place of {_shown(before)})"


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""


def _without(some: Iterable[Any], others: Any) -> list[str]:
    return [str(member[0] if isinstance(member, list) else member) for member in some if member not in others]


def _is_by_name(value: Any) -> bool:
    """Whether a described value is a mapping, in contrast to an object that `describe` made a mapping of."""
    return isinstance(value, Mapping) and not any(kind in value for kind in _KINDS)


def _shown(value: Any) -> str:
    """A described value for people."""
    if value is None or value is False:
        return "none"
    kind = next((kind for kind in _KINDS if kind in value), "") if isinstance(value, Mapping) else ""
    if kind in ("entry", "function", "type"):
        return f"{kind} {value[kind]!r}"
    return kind or ("callable" if value is True else f"{value!r:.60}")
