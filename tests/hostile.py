"""A store for tests of hostile bytes, ways to change it, and a reader that asks it for everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch

from activation_extractor import Column, Store, open_store
from activation_extractor._format._codecs import NPY, SAFETENSORS, Codec
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import seal
from activation_extractor._format._journal import Journal
from activation_extractor._format._manifest import make_manifest, store_name, write_manifest
from activation_extractor._format._numpy import npy_file
from activation_extractor._format._shards import read_shard, shard_path, size_of, write_shard
from activation_extractor.errors import StoreError
from activation_extractor.store import TextColumn

FINGERPRINT = {"model": "M", "reducers": ["mean"]}
COLUMNS = [
    {"layer": "h", "reducer": "mean", "dtype": "float32", "row_shape": [3], "ragged": False},
    {"layer": "h", "reducer": "full", "dtype": "float32", "row_shape": [2], "ragged": True},
    {"layer": "rare", "reducer": "max", "dtype": "int8", "row_shape": [], "ragged": False},
]
KEEP = [{"name": "label", "dtype": "int64", "row_shape": [], "ragged": False}]
UNITS = ["00000000", "00000001"]
Change = Callable[[Any], Any]


def entries_of(number: int) -> dict[str, list[torch.Tensor]]:
    """What a unit of four rows holds."""
    torch.manual_seed(number)
    return {
        "#ids": [
            torch.frombuffer(
                bytearray(
                    f"{chr(228 + 5 * number)}{number}{chr(98 + 2 * number)}{number}{chr(99 + 2 * number)}".encode()
                ),
                dtype=torch.uint8,
            )
        ],
        "#ids#offsets": [torch.tensor([0, 2, 3, 4, 6])],
        "h:mean": [torch.randn(4, 3)],
        "h:full": [torch.randn(5, 2)],
        "h:full#offsets": [torch.tensor([0, 2, 2, 4, 5])],
        "rare:max": [torch.tensor([1, 2, 3], dtype=torch.int8)],
        "rare:max#rows": [torch.tensor([0, 1, 3])],
        "#keep:label": [torch.arange(4)],
    }


def about_of(number: int) -> dict[str, str]:
    return {"unit": UNITS[number], "rows": "4", "store": store_name(FINGERPRINT)}


def make_store(
    folder: Path, codec: Codec, *, units: int = 2, has_journal: bool = True, ids: str | None = "str"
) -> Path:
    """A valid store of units of four rows."""
    shutil.copytree(_template(codec, units, ids).name, folder)
    if not has_journal:
        shutil.rmtree(folder / "journal")
    return folder


@lru_cache
def _template(codec: Codec, units: int, ids: str | None) -> TemporaryDirectory[str]:
    """One that is made once, and gone with the process."""
    made = TemporaryDirectory()
    folder = Path(made.name)
    for name in ("shards", "journal"):
        (folder / name).mkdir()
    columns, keep = (
        [Field.from_json(column, is_kept=listed is KEEP) for column in listed] for listed in (COLUMNS, KEEP)
    )
    manifest = make_manifest(codec, {"fingerprint": FINGERPRINT, "batches_per_unit": 1}, columns, keep, ids)
    write_manifest(folder, manifest)
    for number in range(units):
        entries = {name: chunks for name, chunks in entries_of(number).items() if ids or not name.startswith("#ids")}
        write_shard(folder, codec, UNITS[number], entries, about_of(number))
        path = shard_path(folder, UNITS[number], codec)
        Journal(folder, "w").add(read_shard(path, codec).record(size_of(path), manifest.entries))
    return made


# -- changing it ------------------------------------------------------------------------------------------------------


def change_manifest(folder: Path, change: Change) -> None:
    """Write what `change` makes of the manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def change_journal(folder: Path, change: Change) -> None:
    """Write what `change` makes of each record of the journal."""
    path = folder / "journal" / "w.jsonl"
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


def replace_shard(
    folder: Path, codec: Codec, entries: Mapping[str, Any], about: Mapping[str, str] | None = None
) -> None:
    """Put a shard with other entries (None: without that one) and notes, well sealed, in the place of the second."""
    path = shard_path(folder, UNITS[1], codec)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = {name: chunks for name, chunks in {**entries_of(1), **entries}.items() if chunks is not None}
    codec.write(path, found, {**about_of(1), **(about or {})})


def change_header(path: Path, change: Change) -> None:
    """Write what `change` makes of a safetensors shard's header, sealed again as far as that can be."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + size]))
    with suppress(Exception):  # what cannot be sealed goes without
        names = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8, "I8": torch.int8}
        noted = header["__metadata__"]
        about = {key: value for key, value in noted.items() if not key.startswith("crc32:")}
        tensors = [(name, one) for name, one in header.items() if name != "__metadata__"]
        listed = [(name, names[one["dtype"]], one["shape"], int(noted[f"crc32:{name}"], 16)) for name, one in tensors]
        noted["seal"] = seal(about, listed)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def npy_bytes(data: bytes, shape: Any, descr: Any = "<f4", *, is_fortran: bool = False) -> bytes:
    """An npy file whose header says whatever is given."""
    text = repr({"descr": descr, "fortran_order": is_fortran, "shape": shape}).encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def replace_array(path: Path, codec: Codec, entry: str, raw: bytes, shape: Any, dtype: Any = torch.float32) -> None:
    """Put another npy file in the place of an entry's, and seal the shard again as one of this shape and dtype."""
    contents = codec.read(path)
    listed = {name: (one.dtype, one.shape, one.crc32) for name, one in contents.extents.items()}
    listed[entry] = (dtype, shape, zlib.crc32(raw))
    about = {**contents.metadata, "seal": seal(contents.metadata, ((name, *one) for name, one in listed.items()))}
    if codec is NPY:
        (path / npy_file(list(listed).index(entry), entry)).write_bytes(raw)
        crcs = {name: crc for name, (_, _, crc) in listed.items()}
        (path / "about.json").write_text(json.dumps({"about": about, "crc32": crcs}))
        return
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, f"{entry}.npy": raw}.items():
            archive.writestr(name, data)
        archive.comment = json.dumps(about).encode()


def reshape(path: Path, codec: Codec, entry: str, shape: Any) -> None:
    """Let an entry claim another shape, sealed again; its bytes stay."""
    if codec is SAFETENSORS:
        change_header(path, lambda header: {**header, entry: {**header[entry], "shape": shape}})
        return
    extent = codec.read(path).extents[entry]
    data = extent.path.read_bytes()[extent.start : extent.stop]
    claimed = tuple(shape) if isinstance(shape, list) else shape
    replace_array(path, codec, entry, npy_bytes(data, claimed), shape or ())


# -- asking for everything --------------------------------------------------------------------------------------------


def faults(folder: Path) -> list[str]:
    """What a store that is asked for everything refuses or reports; any error but `StoreError` comes through."""
    found: list[str] = []
    try:
        store = open_store(folder)
    except StoreError as error:
        return [str(error)]
    for question in _questions(store):
        try:
            found += question()
        except StoreError as error:
            found.append(str(error))
    return found


def _questions(store: Store) -> Iterator[Callable[[], list[str]]]:
    yield lambda: [str(one) for one in store.verify()]
    yield lambda: _head(store)
    yield lambda: _ids(store)
    yield lambda: [one for column in store.keep.values() for one in _read(column)]
    for key in list(store):
        yield lambda key=key: _read(store[key])
        yield lambda key=key: _rows(store, key)


def _head(store: Store) -> list[str]:
    values = repr(store), store.nbytes, len(store), store.names, store.reducers, store.rows
    return [] if all(value is not None for value in values) else ["nothing"]


def _ids(store: Store) -> list[str]:
    ids = store.ids
    if len(ids) != store.rows:
        return [f"{len(ids)} ids of {store.rows} rows"]
    return [] if store.rows_of(ids) == list(range(store.rows)) else ["ids that come twice"]


def _rows(store: Store, key: Any) -> list[str]:
    if len(store[key]) != store.rows:
        return []
    dataset = store.dataset(key, keep=[])
    return [] if not len(dataset) or len(dataset[0]) == 1 else ["a tuple of another length"]


def _read(column: Column | TextColumn) -> list[str]:
    if isinstance(column, TextColumn):
        return [] if len(list(column)) == len(column) == len(column[:]) else ["a text too few or too many"]
    count = len(column)
    if column.rows.tolist() != sorted(set(column.rows.tolist())) or len(column.rows) != count:
        return ["rows that do not rise"]
    repr(column), column.shape, column.mapped(), next(iter(column), None), column[:2], column[::-2], column[[]]
    if count:
        column[0], column[-1], column[[count - 1, 0]], column[count // 2]
    if not column.is_ragged:
        column.numpy()
        return [] if len(column.torch()) == count else ["a row too few or too many"]
    lengths, flat = column.lengths(), column.flat()
    return (
        [] if [len(row) for row in column[:]] == lengths.tolist() and len(flat) == lengths.sum() else ["lost positions"]
    )


@contextmanager
def guarded() -> Iterator[None]:
    """Let a lie about a size be refused by the system rather than kill the machine, and a wait be an error."""
    resource = pytest.importorskip("resource", reason="limits on memory need POSIX")
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 2**40
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(AssertionError("it waits")))
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    signal.alarm(30)
    try:
        with mock.patch("os.fsync"):  # nothing here has to survive a power cut
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
