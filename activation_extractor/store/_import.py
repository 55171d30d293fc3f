"""Stores made of hidden states that an inference server wrote, a safetensors file for each request.

vLLM writes such files by its method ``extract_hidden_states`` (``ExampleHiddenStatesConnector``), and speculators moves
them to ``hs_<row>.safetensors``: ``hidden_states``, ``(tokens, layers, hidden)``, and ``token_ids``, ``(tokens,)``.
``<name>.safetensors.lock`` beside a file is locked while it is written. Which layers these are is not in the file.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activation_extractor._arguments import check_path
from activation_extractor._display import dtype_name, examples
from activation_extractor._files import draft, publish
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._store_sinks import SafetensorsSink
from activation_extractor.store._open import open_store
from activation_extractor.store._store import Store

HIDDEN_STATES, TOKEN_IDS = "hidden_states", "token_ids"
FULL, INPUT = "full", "input"  # the reducers of hidden states, and of what else a file has of each token
_ANEW = "Remove it, or have it written anew."
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.uint8, torch.int8)
_SUFFIX, _LOCK, _PACKED = ".safetensors", ".safetensors.lock", ".safetensors.zst"


def import_store(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, layers: Iterable[str | int] | None = None
) -> Store:
    """Make a store of the hidden states that vLLM or speculators wrote, a file for each request.

    Each ``*.safetensors`` file of the folder becomes a row, whose id is the file's name without its suffix; rows are in
    the order of the numbers in these names. The hidden states of each layer are a ragged column of the reducer
    ``full``, ``(tokens, hidden)`` in a row, with every dtype and value as it is. ``token_ids``, and whatever else the
    files have with a first axis of tokens, are columns of the reducer ``input``. A file is read at a time.

    Args:
        folder: where the files are; other files in it are passed over.
        out: a path at which nothing is yet, where the store appears once it is whole.
        layers: what the layers are called, in the order of the files' second axis; numbers are those that vLLM was
            given as ``eagle_aux_hidden_state_layer_ids``: 2 is called ``hidden_states.2``, which is what comes out of
            the second block, as in ``output_hidden_states`` of transformers. By default ``aux.0``, ``aux.1``, and so
            on, by their place in the files.

    Raises:
        ArgumentError: names that are not one for each layer.
        StoreError: a file is damaged, still being written, or has another form than the others; there are none; there
            is something at `out` already, or it cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from activation_extractor import import_store
        >>> folder = tempfile.mkdtemp()
        >>> for row, tokens in enumerate((3, 5)):
        ...     tensors = {"hidden_states": torch.randn(tokens, 2, 8), "token_ids": torch.arange(tokens)}
        ...     save_file(tensors, f"{folder}/hs_{row}.safetensors")
        >>> store = import_store(folder, f"{tempfile.mkdtemp()}/store", layers=[2, 16])
        >>> store["hidden_states.16", "full"], store.ids
        (Column(('hidden_states.16', 'full'), (2, None, 8), float32), ['hs_0', 'hs_1'])
    """
    folder, out = check_path("folder", folder), check_path("out", out)
    names = None if layers is None else _names(layers)
    if os.path.lexists(out):
        raise _taken(out)
    files = _files(folder)
    first = _read(files[0], None)[HIDDEN_STATES]
    names = _one_each(names, first.shape[1])
    with draft(out) as beside:
        sink = SafetensorsSink(beside)
        try:
            sink.begin({"imported": HIDDEN_STATES, "layers": names})
            for index, path in enumerate(files):
                sink.write(_step(index, path, names, _read(path, first)))
        finally:
            sink.close()
        if not publish(beside, out):
            raise _taken(out)
    return open_store(out)


def _taken(out: Path) -> StoreError:
    return StoreError(out, "be a new folder", "one that exists already", "Choose another path, or move it away.")


def _names(layers: Iterable[str | int]) -> list[str]:
    """What layers are called, checked."""
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise ArgumentTypeError("layers", "be several names or numbers", layers, "Put it into a list.")
    listed = list(layers)
    for layer in listed:
        if not isinstance(layer, str | int) or isinstance(layer, bool):
            raise ArgumentTypeError("layers", "be names or numbers", layer)
    names = [layer if isinstance(layer, str) else f"{HIDDEN_STATES}.{layer}" for layer in listed]
    if len(set(names)) < len(names):
        raise ArgumentError("layers", "be different", listed)
    return names


def _one_each(names: list[str] | None, count: int) -> list[str]:
    """The names of so many layers."""
    if names is None:
        return [f"aux.{place}" for place in range(count)]
    if len(names) != count:
        raise ArgumentError("layers", f"name each of the {count} layers in a file", names)
    return names


def _files(folder: Path) -> list[Path]:
    """The files of requests, in the order of their numbers, none of which is still being written."""
    try:
        found = sorted(os.listdir(folder), key=_numbers)
    except OSError as error:
        got = error.strerror or str(error)
        raise StoreError(folder, "be a folder of safetensors files", got, "Give vLLM's shared_storage_path.") from error
    packed = [name for name in found if name.endswith(_PACKED)]
    if packed:
        raise StoreError(folder / packed[0], "be a plain safetensors file", "a compressed one", "Unpack it with zstd.")
    for name in found:
        if name.endswith(_LOCK):
            _check_unlocked(folder / name)
    files = [folder / name for name in found if name.endswith(_SUFFIX)]
    if not files:
        got = f"others, such as {examples(found)}" if found else "an empty folder"
        advice = "Give vLLM's shared_storage_path, or the folder hidden_states of speculators."
        raise StoreError(folder, "hold safetensors files", got, advice)
    return files


def _numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    """What names are sorted by, so that hs_2 comes before hs_10."""
    parts = re.split(r"([0-9]+)", name.split(".")[0])
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)], name


def _check_unlocked(path: Path) -> None:
    """Refuse a file that its writer still holds the lock of."""
    try:
        with open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        target = path.with_suffix("")
        raise StoreError(target, "be complete", "a file that is still being written", "Try again later.") from error
    except OSError:  # gone meanwhile, or of a file system without locks
        return


def _read(path: Path, first: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a file, checked against each other and against the first file's."""
    try:
        path.name.encode()
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("something else than a file")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise StoreError(path, "be a readable safetensors file", got, _ANEW) from error
    missing = next((name for name in (HIDDEN_STATES, TOKEN_IDS) if name not in tensors), None)
    if missing is not None:
        advice = "Give the folder that vLLM's extract_hidden_states or speculators wrote."
        raise StoreError(path, f"hold {missing!r}", examples(sorted(tensors)) or "nothing", advice)
    _check_shapes(path, tensors)
    hidden = tensors[HIDDEN_STATES]
    if first is not None and (hidden.shape[1:], hidden.dtype) != (first.shape[1:], first.dtype):
        found, before = (f"{dtype_name(one.dtype)} {tuple(one.shape[1:])}" for one in (hidden, first))
        raise StoreError(path, "have layers like the files before it", f"{found} after {before}", "Import one run.")
    return tensors


def _check_shapes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not of the same tokens."""
    hidden, ids = tensors[HIDDEN_STATES], tensors[TOKEN_IDS]
    if hidden.dim() != 3 or 0 in hidden.shape[1:]:
        raise StoreError(path, "have hidden states (tokens, layers, hidden)", str(tuple(hidden.shape)), _ANEW)
    if ids.dim() != 1 or ids.dtype not in _INTEGERS:
        got = f"{dtype_name(ids.dtype)} {tuple(ids.shape)}"
        raise StoreError(path, "have token ids that are integers, (tokens,)", got, _ANEW)
    for name, tensor in tensors.items():
        if not tensor.dim() or len(tensor) != len(hidden):
            got = f"{tuple(tensor.shape)} in {name!r} beside {tuple(hidden.shape)}"
            raise StoreError(path, "have as many tokens in each of its tensors", got, _ANEW)


def _step(index: int, path: Path, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Step:
    """A file as a step of one row, in memory of its own."""
    hidden, others = tensors[HIDDEN_STATES], sorted(tensors.keys() - {HIDDEN_STATES})
    values = {(name, FULL): hidden[:, place] for place, name in enumerate(names)}
    values |= {(name, INPUT): tensors[name] for name in others}
    lengths = torch.tensor([len(hidden)])
    rows = {key: Ragged(value.clone(memory_format=torch.contiguous_format), lengths) for key, value in values.items()}
    return Step(index, 1, rows, [path.name.removesuffix(_SUFFIX)])
