"""Hostile shards: a `StoreError` says so; never a crash, a wait, another error, or a file from elsewhere."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import (
    UNITS,
    change_header,
    entries_of,
    faults,
    guarded,
    make_store,
    npy_bytes,
    replace_array,
    replace_shard,
    reshape,
)

from activation_extractor import open_store
from activation_extractor._format._codecs import CODECS, NPY, NPZ, SAFETENSORS, Codec
from activation_extractor._format._shards import shard_path

FIRST = "#ids#offsets"  # five integers, in front of all other entries
HUGE = [2**31, 2**40, 2**62, 2**63 - 1, 2**64, 2**70]


@pytest.fixture(autouse=True)
def is_guarded():
    with guarded():
        yield


@pytest.fixture(params=CODECS.values(), ids=CODECS)
def codec(request) -> Codec:
    return request.param


@pytest.fixture(params=[NPZ, NPY], ids=["npz", "npy"])
def numpys(request) -> Codec:
    return request.param


def make(tmp_path: Path, codec: Codec, *, has_journal: bool = False, ids: str | None = "str") -> tuple[Path, Path]:
    """A valid store, and its second shard."""
    folder = make_store(tmp_path / "out", codec, has_journal=has_journal, ids=ids)
    return folder, shard_path(folder, UNITS[1], codec)


@pytest.mark.parametrize("has_journal", [True, False])
@pytest.mark.parametrize("ids", ["str", None])
def test_a_store_that_nobody_changed_has_no_fault(tmp_path, codec, has_journal, ids):
    folder, _ = make(tmp_path, codec, has_journal=has_journal, ids=ids)
    assert faults(folder) == []
    store = open_store(folder)
    assert store.ids == (["ä", "0", "b", "0c", "é", "1", "d", "1e"] if ids else list(range(8)))
    assert store["rare", "max"].rows.tolist() == [0, 1, 3, 4, 5, 7]
    assert store["h", "full"].lengths().tolist() == [2, 0, 2, 1] * 2


# -- numbers in a header ----------------------------------------------------------------------------------------------

SHAPES = [[-4, 3], [-4, -3], [True, 12], [4.0, 3], [4, 3, 1], [3, 4], [12], [4], [], [4, 4], [0, 3], [4, 0], None, "43"]
SHAPES += [[size, 3] for size in HUGE] + [[4, size] for size in HUGE] + [[2**32, 2**32 + 3], [2**62, 4, 3]]
SHAPES += [[4, 2**62, 0], [2**62, 0], [0, 2**62, 2**62], [2**40, 0], [-1, 0], [2**62, 2**62, 0]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_that_is_none_or_does_not_fit_is_refused(tmp_path, codec, shape):
    folder, path = make(tmp_path, codec, has_journal=isinstance(shape, list) and 3 in shape)
    reshape(path, codec, "h:mean", shape)
    assert faults(folder)


@pytest.mark.parametrize("ids", ["str", None])
@pytest.mark.parametrize("rows", [2**36, 2**62])
def test_rows_without_a_byte_are_not_as_many_as_a_header_likes(tmp_path, codec, rows, ids):
    folder, _ = make(tmp_path, codec, ids=ids)
    replace_shard(folder, codec, {**dict.fromkeys(entries_of(1)), "x:y": [torch.zeros(rows, 0)]}, {"rows": str(rows)})
    assert faults(folder)


@pytest.mark.parametrize("shape", [(0, 2**40, 2**40), (0, 2**62, 4)], ids=str)
def test_no_row_of_an_impossible_size_is_refused_or_read(tmp_path, codec, shape):
    folder, path = make(tmp_path, codec)
    replace_shard(folder, codec, {**dict.fromkeys(entries_of(1)), "x:y": [torch.zeros(0, 3)]}, {"rows": "0"})
    reshape(path, codec, "x:y", list(shape))
    faults(folder)


RANGES = [[-1, 39], [40, 0], [0, 80], [8, 48], [0, 41], [0, 39], [-40, 0], [0, 2**63], [0, 2**70], [2**64, 2**64 + 40]]
RANGES += [[0.0, 40], [0, 40.0], [False, 40], ["0", "40"], [0], [], [0, 40, 40], None, 7]


@pytest.mark.parametrize("offsets", RANGES, ids=str)
def test_a_byte_range_that_overlaps_lies_outside_or_is_none_is_refused(tmp_path, offsets):
    folder, path = make(tmp_path, SAFETENSORS)
    change_header(path, lambda header: {**header, FIRST: {**header[FIRST], "data_offsets": [0, 40]}})
    assert faults(folder) == []  # where it is
    change_header(path, lambda header: {**header, FIRST: {**header[FIRST], "data_offsets": offsets}})
    assert faults(folder)


def test_a_byte_that_another_entry_claims_is_refused(tmp_path):
    folder, path = make(tmp_path, SAFETENSORS)

    def move(header: dict) -> dict:
        (second,) = [one for one in header.values() if one.get("data_offsets", [None])[0] == 40]
        header[FIRST]["data_offsets"], second["data_offsets"] = [0, 39], [39, second["data_offsets"][1]]
        return header

    change_header(path, move)
    assert "a shape that does not fit its bytes" in faults(folder)[0]


def test_two_entries_over_the_same_bytes_are_refused(tmp_path):
    folder, path = make(tmp_path, SAFETENSORS)

    def share(header: dict) -> dict:
        header["__metadata__"]["crc32:x:y"] = header["__metadata__"]["crc32:h:mean"]
        return {**header, "x:y": header["h:mean"]}

    change_header(path, share)
    assert "entries whose bytes overlap or leave a gap" in faults(folder)[0]


@pytest.mark.parametrize("length", [0, 1, 2**16, 99_999_999, 100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    folder, path = make(tmp_path, SAFETENSORS)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert faults(folder)


CHANGES = {
    "no_metadata": lambda header: {name: one for name, one in header.items() if name != "__metadata__"},
    "metadata_list": lambda header: {**header, "__metadata__": []},
    "metadata_null": lambda header: {**header, "__metadata__": None},
    "metadata_number": lambda header: {**header, "__metadata__": {**header["__metadata__"], "rows": 4}},
    "metadata_nested": lambda header: {**header, "__metadata__": {**header["__metadata__"], "more": {"a": "b"}}},
    "no_checksum": lambda header: {**header, "__metadata__": _without(header["__metadata__"], "crc32:h:mean")},
    "checksum_number": lambda header: {**header, "__metadata__": {**header["__metadata__"], "crc32:h:mean": 5}},
    "checksum_text": lambda header: {**header, "__metadata__": {**header["__metadata__"], "crc32:h:mean": "xyz"}},
    "no_entry": lambda header: _without(header, "h:mean"),
    "dtype_unknown": lambda header: {**header, "h:mean": {**header["h:mean"], "dtype": "F4"}},
    "dtype_list": lambda header: {**header, "h:mean": {**header["h:mean"], "dtype": ["F32"]}},
    "dtype_null": lambda header: {**header, "h:mean": {**header["h:mean"], "dtype": None}},
    "dtype_wider": lambda header: {**header, "h:mean": {**header["h:mean"], "dtype": "F64"}},
    "no_shape": lambda header: {**header, "h:mean": _without(header["h:mean"], "shape")},
    "entry_list": lambda header: {**header, "h:mean": [1, 2]},
    "entry_null": lambda header: {**header, "h:mean": None},
    "list": lambda header: [header],
    "null": lambda header: None,
    "text": lambda header: "x" * 100,
}


def _without(members: dict, name: str) -> dict:
    return {key: value for key, value in members.items() if key != name}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_header_that_says_something_else_is_refused(tmp_path, change):
    folder, path = make(tmp_path, SAFETENSORS)
    change_header(path, change)
    assert faults(folder)


def nested(open_: str, close: str, depth: int = 200_000) -> bytes:
    return (open_ * depth + close * depth).encode()


TEXTS = [b"", b" ", b"{", b"[]", b"\xff\xfe", b"{}{}", b'{"a": 1e999999}', b"NaN", b"1" * 9999, b"\0" * 64]
TEXTS += [nested("[", "]"), nested('{"a":', "}"), b"[" * 200_000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text[:10]))
def test_a_header_that_is_no_json_or_too_deep_is_refused(tmp_path, codec, text):
    folder, path = make(tmp_path, codec)
    if codec is SAFETENSORS:
        path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes())
    elif codec is NPY:
        (path / "about.json").write_bytes(text)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = text[:65_535]
    assert faults(folder)


def test_a_name_that_comes_twice_is_refused(tmp_path, codec):
    folder, path = make(tmp_path, codec)
    if codec is NPZ:
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("h:mean.npy", archive.read("h:mean.npy"))
    else:
        file = path / "about.json" if codec is NPY else path
        file.write_bytes(file.read_bytes().replace(b'"rows"', b'"unit"'))
    assert ("an entry twice" if codec is NPZ else "the name 'unit' twice") in faults(folder)[0]


# -- arrays of numpy --------------------------------------------------------------------------------------------------

DATA = torch.randn(4, 3).numpy().tobytes()
ARRAYS = {
    "pickle": npy_bytes(b"\x80\x04N." * 12, (4, 3), "|O"),
    "fortran": npy_bytes(DATA, (4, 3), is_fortran=True),
    "big_endian": npy_bytes(DATA, (4, 3), ">f4"),
    "text": npy_bytes(DATA, (4, 3), "<U1"),
    "bytes": npy_bytes(DATA, (4, 3), "|S4"),
    "void": npy_bytes(DATA, (4, 3), "|V4"),
    "date": npy_bytes(DATA, (2, 3), "<M8[s]"),
    "structured": npy_bytes(DATA, (4, 3), [("a", "<f4")]),
    "nested_pickle": npy_bytes(DATA, (2, 3), [("a", "|O")]),
    "wide": npy_bytes(DATA, (1, 3), "<f16"),
    "subarray": npy_bytes(DATA, (4,), ("<f4", (3,))),
    "no_dtype": npy_bytes(DATA, (4, 3), "bogus"),
    "dtype_none": npy_bytes(DATA, (4, 3), None),
    "short": npy_bytes(DATA[:-1], (4, 3)),
    "long": npy_bytes(DATA + b"x", (4, 3)),
    "no_magic": DATA,
    "empty": b"",
    "only_magic": b"\x93NUMPY\1\0",
    "header_too_long": b"\x93NUMPY\1\0\xff\xff" + b" " * 100,
    "version_2": b"\x93NUMPY\2\0" + npy_bytes(DATA, (4, 3))[8:],
    "code": b"\x93NUMPY\1\0\x40\0" + b"__import__('os').abort()".ljust(63) + b"\n" + DATA,
    "deep": b"\x93NUMPY\1\0\x40\x1f" + b"(" * 4000 + b")" * 3999 + b"\n" + DATA,
}


@pytest.mark.parametrize("raw", ARRAYS.values(), ids=ARRAYS)
def test_an_array_that_the_library_never_writes_is_refused(tmp_path, numpys, raw):
    folder, path = make(tmp_path, numpys)
    replace_array(path, numpys, "h:mean", npy_bytes(DATA, (4, 3)), (4, 3))
    assert faults(folder) == []  # what the library writes is not
    replace_array(path, numpys, "h:mean", raw, (4, 3))
    assert "must be a readable shard" in faults(folder)[0]


def rezip(path: Path, method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew, with its comment, in another method."""
    with zipfile.ZipFile(path) as archive:
        members, comment = {one.filename: archive.read(one) for one in archive.infolist()}, archive.comment
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(tmp_path, method):
    folder, path = make(tmp_path, NPZ)
    rezip(path)
    assert faults(folder) == []
    rezip(path, method)
    assert "a compressed or encrypted entry" in faults(folder)[0]


# Where a member of the central directory tells its flags, sizes and place, and what is put there.
MEMBER = [(8, 1), (10, 8), (20, 0), (20, 2**16), (24, 0), (24, 5), (24, 2**31), (42, 0), (42, 1), (42, 77), (42, 2**31)]


@pytest.mark.parametrize(("place", "value"), MEMBER, ids=str)
def test_a_directory_of_an_archive_that_lies_is_refused(tmp_path, place, value):
    folder, path = make(tmp_path, NPZ)
    rezip(path)  # without the wide sizes
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\1\2")
    struct.pack_into("<H" if place < 20 else "<I", data, start + place, value)
    path.write_bytes(data)
    assert faults(folder)


def test_an_array_inside_another_one_is_refused(tmp_path):
    folder, path = make(tmp_path, NPZ)
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("h:mean.npy")
    inner = struct.pack("<4s22xHH", b"PK\3\4", len("h:mean.npy"), 0) + b"h:mean.npy" + raw
    inner += bytes(-len(inner) % 4)
    shape = (4, len(inner) // 4)
    replace_array(path, NPZ, "x:y", npy_bytes(inner, shape, "|u1"), shape, torch.uint8)
    assert faults(folder) == []
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"h:mean.npy") - 4, data.index(inner))
    path.write_bytes(data)
    assert "entries whose bytes overlap" in faults(folder)[0]


@pytest.mark.parametrize(
    ("place", "value"), [(6, 1), (12, 1), (12, 2**31), (16, 0), (16, 2**31), (10, 2**16 - 1), (8, 0)]
)
def test_an_end_of_an_archive_that_lies_is_refused(tmp_path, place, value):
    folder, path = make(tmp_path, NPZ)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H" if place < 12 else "<I", data, data.rindex(b"PK\5\6") + place, value)
    path.write_bytes(data)
    assert isinstance(faults(folder), list)  # some of it nobody reads
