"""safetensors files, read back with safetensors itself."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import SAFETENSORS, that_safetensors_reads
from safetensors import safe_open
from safetensors.torch import load_file

from activation_extractor._files import TruncatedError
from activation_extractor._format._safetensors import (
    read_safetensors_shard,
    stream_safetensors,
    write_safetensors,
    write_safetensors_shard,
)
from activation_extractor.errors import ArgumentError

DTYPES = that_safetensors_reads(
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    ]
)


def sample(dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    return torch.arange(rows * 5).reshape(rows, 5).to(dtype)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def header_of(path: Path) -> tuple[int, dict]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return 8 + size, json.loads(data[8 : 8 + size])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_back_by_safetensors_bit_for_bit(tmp_path, dtype):
    written = sample(dtype)
    write_safetensors(tmp_path / "a.safetensors", {"x": written})
    read = load_file(tmp_path / "a.safetensors")["x"]
    assert read.dtype == dtype
    assert read.shape == written.shape
    assert as_bytes(read) == as_bytes(written)


def test_tensors_of_different_widths_lie_in_one_file_side_by_side(tmp_path):
    written = {str(dtype): sample(dtype, rows=1 + index) for index, dtype in enumerate(DTYPES)}
    write_safetensors(tmp_path / "a.safetensors", written)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == written.keys()
    assert all(as_bytes(read[name]) == as_bytes(tensor) for name, tensor in written.items())
    _, header = header_of(tmp_path / "a.safetensors")
    for name, tensor in written.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,), (2, 3, 4, 5)])
def test_every_shape_is_read_back_zero_rows_and_scalars_too(tmp_path, shape):
    written = torch.randn(shape)
    write_safetensors(tmp_path / "a.safetensors", {"x": written, "y": torch.arange(3)})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["x"], written)
    assert torch.equal(read["y"], torch.arange(3))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0).reshape(4, 6)[::2, 1:4],
        torch.arange(6.0).expand(3, 6),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        pytest.param(
            torch.tensor([1 + 2j, 3 - 1j]).conj(),
            marks=pytest.mark.skipif(SAFETENSORS < (0, 7), reason="safetensors reads complex numbers since 0.7"),
        ),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.arange(4.0, requires_grad=True),
    ],
    ids=["transposed", "strided", "expanded", "bf16", "conjugated", "negated", "with_gradient"],
)
def test_a_view_is_written_by_its_values(tmp_path, tensor):
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensor.detach().resolve_conj().resolve_neg())


def test_a_tensor_made_under_inference_mode_is_written(tmp_path):
    with torch.inference_mode():
        tensor = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor})
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["x"].numpy(), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("sizes", [[3], [2, 3], [0, 2, 0, 1], [0, 0]])
def test_chunks_become_one_tensor(tmp_path, sizes):
    chunks = [torch.randn(size, 4) for size in sizes]
    write_safetensors(tmp_path / "a.safetensors", {"x": chunks, "y": torch.ones(2)})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.cat(chunks))
        assert file.get_slice("x").get_shape() == [sum(sizes), 4]


@pytest.mark.parametrize("names", [[], ["x"], ["a" * 57, "b" * 200, "ü:é/日本"]])
def test_the_data_starts_at_a_multiple_of_64_bytes(tmp_path, names):
    write_safetensors(tmp_path / "a.safetensors", {name: torch.ones(3) for name in names}, {"unit": "0"})
    start, _ = header_of(tmp_path / "a.safetensors")
    assert start % 64 == 0
    assert load_file(tmp_path / "a.safetensors").keys() == set(names)


def test_metadata_stands_in_the_header(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {"rows": "7", "größe": 'ä "quoted"'})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"rows": "7", "größe": 'ä "quoted"'}


def test_without_metadata_the_header_has_none(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() is None


def test_a_stream_holds_the_same_bytes_as_the_file(tmp_path):
    tensors = {"x": [torch.randn(2, 3), torch.randn(1, 3)], "y": torch.arange(4)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"rows": "3"})
    with open(tmp_path / "b.safetensors", "wb") as file:
        stream_safetensors(file, tensors, {"rows": "3"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32], ids=str)
@pytest.mark.parametrize("has_old", [True, False])
def test_a_dtype_that_the_format_lacks_is_an_error_and_leaves_the_old_file(tmp_path, has_old, dtype):
    path = tmp_path / "a.safetensors"
    if has_old:
        path.write_bytes(b"old")
    text = rf"dtype of a tensor in a safetensors file must be one of float64, .*, got {dtype}\. Convert it in a reducer"
    with pytest.raises(ArgumentError, match=text):
        write_safetensors(path, {"x": torch.ones(2), "y": torch.empty(2, dtype=dtype)})
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([b"old"] if has_old else [])


# -- shards -----------------------------------------------------------------------------------------------------------

ENTRIES = {
    "h.0:mean": [torch.arange(6.0).reshape(2, 3), torch.ones(1, 3)],
    "scalar": [torch.arange(3)],
    "bf16": [torch.arange(6).reshape(3, 2).bfloat16()],
    "none": [torch.zeros(0, 4)],
    "turned": [torch.arange(6.0).reshape(2, 3).t()],
}
ABOUT = {"unit": "00000000", "rows": "3", "store": "größe"}


def test_a_shard_is_read_back_by_safetensors(tmp_path):
    write_safetensors_shard(tmp_path / "a.safetensors", ENTRIES, ABOUT)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == ENTRIES.keys()
    for name, chunks in ENTRIES.items():
        assert read[name].dtype == chunks[0].dtype
        assert as_bytes(read[name]) == as_bytes(torch.cat(chunks))
        assert read[name].shape == torch.cat(chunks).shape


def test_the_metadata_of_a_shard_has_its_notes_its_seal_and_a_checksum_for_each_entry(tmp_path):
    seal = write_safetensors_shard(tmp_path / "a.safetensors", ENTRIES, ABOUT)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    crcs = {f"crc32:{name}": f"{zlib.crc32(as_bytes(torch.cat(chunks))):08x}" for name, chunks in ENTRIES.items()}
    assert metadata == {**ABOUT, "seal": seal, **crcs}


def test_a_checksum_is_that_of_the_bytes_in_the_file(tmp_path):
    write_safetensors_shard(tmp_path / "a.safetensors", ENTRIES, ABOUT)
    start, header = header_of(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    noted = header.pop("__metadata__")
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert noted[f"crc32:{name}"] == f"{zlib.crc32(data[start + first : start + last]):08x}"


def test_a_shard_tells_where_its_values_lie(tmp_path):
    path = tmp_path / "a.safetensors"
    seal = write_safetensors_shard(path, ENTRIES, ABOUT)
    contents = read_safetensors_shard(path)
    data = path.read_bytes()
    assert contents.metadata == {**ABOUT, "seal": seal}
    assert contents.extents.keys() == ENTRIES.keys()
    for name, chunks in ENTRIES.items():
        extent = contents.extents[name]
        assert (extent.path, extent.dtype, extent.shape) == (path, chunks[0].dtype, tuple(torch.cat(chunks).shape))
        assert data[extent.start : extent.stop] == as_bytes(torch.cat(chunks))
        assert extent.crc32 == zlib.crc32(data[extent.crc_start : extent.stop])
    contents.check_seal()


def test_the_same_shard_has_the_same_bytes(tmp_path):
    for name in "ab":
        write_safetensors_shard(tmp_path / name, ENTRIES, ABOUT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_is_never_written_over_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_safetensors_shard(tmp_path / "a", ENTRIES, ABOUT)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_without_the_librarys_notes_is_no_shard(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.ones(1)})
    with pytest.raises(KeyError):
        read_safetensors_shard(tmp_path / "a")


def test_a_shard_that_is_cut_short_or_too_long_says_so(tmp_path):
    write_safetensors_shard(tmp_path / "a", ENTRIES, ABOUT)
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-1])
    with pytest.raises(TruncatedError, match="a file that ends 1 bytes too early"):
        read_safetensors_shard(tmp_path / "a")
    (tmp_path / "a").write_bytes(data[:20])
    with pytest.raises(TruncatedError, match="a file that ends at byte 20 of"):
        read_safetensors_shard(tmp_path / "a")
    (tmp_path / "a").write_bytes(data + b"xy")
    with pytest.raises(ValueError, match="2 bytes after its last entry"):
        read_safetensors_shard(tmp_path / "a")
