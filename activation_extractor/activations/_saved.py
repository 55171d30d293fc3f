"""Files that `Activations.save` wrote, read again."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from activation_extractor._format._entry_names import Key, entry_name, unescape
from activation_extractor._format._numpy import write_npz
from activation_extractor._format._safetensors import read_header, write_safetensors
from activation_extractor.errors import ArgumentError, StoreError

ORDER = "order"  # in the metadata: the entries' names as JSON, in the order in which their layers ran
_CALL = re.compile(r"#\d+$")
_READ_SINCE = {"C64": "0.7", "F8_E4M3FNUZ": "0.8", "F8_E5M2FNUZ": "0.8"}  # by the safetensors library


def saved_entry(key: Key, call: int | None = None) -> str:
    """The name of an entry: ``layer`` or ``layer:reducer``, and ``#k`` behind it for the k-th of several calls."""
    return entry_name(*key) + ("" if call is None else f"#{call}")


def saved_key(entry: str) -> Key:
    """What an entry is of; the call is part of the name, as in a store.

    Raises:
        ValueError: no such entry.
    """
    ending = _CALL.search(entry)
    call = ending[0] if ending else ""
    layer, *reducer = map(unescape, entry.removesuffix(call).split(":", 1))
    key = layer, reducer[0] if reducer else None
    if saved_entry(key) + call != entry:
        raise ValueError(f"an entry {entry!r}, which is no layer's")
    return layer + call, key[1]


def write_saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write entries, in the order in which their layers ran, to a file that appears whole or not at all.

    Raises:
        ArgumentError: a suffix that is neither ``.safetensors`` nor ``.npz``, or a dtype that the format lacks.
        StoreError: the file cannot be written.
    """
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {ORDER: json.dumps(list(tensors))})
    elif path.suffix == ".npz":
        write_npz(path, tensors)
    else:
        raise ArgumentError("path", "end in .safetensors or .npz", str(path))


class SavedActivations(Mapping[Key, Tensor]):
    """The values of a file, in the order in which their layers ran; each is read when it is asked for.

    Args:
        path: ``.safetensors`` or ``.npz``.

    Raises:
        ArgumentError: another suffix.
        StoreError: there is no such file, or it holds no activations that can be read.
    """

    def __init__(self, path: Path) -> None:
        openers: dict[str, Callable[[Path], tuple[list[str], Callable[[str], Tensor]]]]
        openers = {".safetensors": _open_safetensors, ".npz": _open_npz}
        if path.suffix not in openers:
            raise ArgumentError("path", f"end in {' or '.join(openers)}, or be a store", str(path))
        self._path = path
        try:
            entries, self._read = openers[path.suffix](path)
            self._entries = {saved_key(entry): entry for entry in entries}
        except Exception as error:  # numpy may raise anything over a damaged or hostile file
            raise self._unreadable(error) from error

    def __getitem__(self, key: Key) -> Tensor:
        """The value of a key, new memory each time.

        Raises:
            StoreError: the file is damaged.
        """
        entry = self._entries[key]
        try:
            return self._read(entry)
        except Exception as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _unreadable(self, error: Exception) -> StoreError:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        advice = "Give it a file that Activations.save wrote, or the folder of a store."
        if needed := _needed_release(self._path):
            got = f"{got} from safetensors {safetensors.__version__}"
            advice = f"It holds a dtype that safetensors reads since {needed}: pip install 'safetensors>={needed}'"
        return StoreError(self._path, "be a file of activations that can be read", got, advice)


def _open_safetensors(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    file: Any = safe_open(path, framework="pt")
    entries, order = list(file.keys()), _order(file.metadata())
    # Clones, since a mapped file that is cut short elsewhere crashes whoever touches the lost part.
    return order if sorted(order) == sorted(entries) else entries, lambda entry: file.get_tensor(entry).clone()


def _needed_release(path: Path) -> str | None:
    """The release of safetensors that a file of ours needs, if the installed one is too old for its dtypes."""
    try:
        dtypes = {entry.get("dtype") for entry in read_header(path)[0].values()}
    except Exception:  # a parser may raise anything over a damaged or hostile file; its error is raised elsewhere
        return None
    needed = max((release for dtype, release in _READ_SINCE.items() if dtype in dtypes), default=None)
    return needed if needed and _release(needed) > _release(safetensors.__version__) else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _order(metadata: Mapping[str, str] | None) -> list[str]:
    """The order that is in a file's metadata; none where another program wrote it."""
    try:
        order = json.loads((metadata or {}).get(ORDER, "[]"))
    except (ValueError, RecursionError):
        return []
    return order if isinstance(order, list) and all(isinstance(entry, str) for entry in order) else []


def _open_npz(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    # Opened once: an archive's directory takes as long to read as it has entries.
    file = open(path, "rb")  # noqa: SIM115 - it is closed with the function that reads from it
    try:
        archive = np.load(file, allow_pickle=False)
        entries = list(archive.files)
    except BaseException:
        file.close()
        raise

    def read(entry: str) -> Tensor:
        return torch.from_numpy(archive[entry])

    weakref.finalize(read, file.close)
    return entries, read
