"""Files written by `_formats`, read back with safetensors and numpy themselves."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from activation_extractor import _formats
from activation_extractor._formats import (
    entry_name,
    escape,
    replacing,
    stream_safetensors,
    sync_folder,
    temporary,
    unescape,
    write_npz,
    write_safetensors,
)
from activation_extractor.errors import ArgumentError, StoreError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


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
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
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


def test_an_npz_holds_what_numpy_reads(tmp_path):
    wide = torch.randn(2, 3)
    tensors = {"h.0:mean": wide, "turned": wide.t(), "bf16": wide.bfloat16(), "int": torch.arange(3)}
    write_npz(tmp_path / "a.npz", tensors)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert set(archive.files) == set(tensors)
        assert np.array_equal(archive["h.0:mean"], wide.numpy())
        assert np.array_equal(archive["turned"], wide.numpy().T)
        assert archive["bf16"].dtype == np.float32
        assert np.array_equal(archive["bf16"], wide.bfloat16().float().numpy())
        assert archive["int"].dtype == np.int64


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_an_npz_takes_every_name(tmp_path, name):
    write_npz(tmp_path / "a.npz", {name: torch.ones(2)})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == [name]


NAMES = st.text(st.characters(exclude_categories=[])) | st.text("%:#/\\\x0025F", max_size=12)


@settings(deadline=None, max_examples=40)
@given(NAMES)
def test_a_name_comes_back_from_its_escaped_form(name):
    escaped = escape(name)
    assert unescape(escaped) == name
    assert not set(escaped) & set(":#/\\\0")


@settings(deadline=None, max_examples=40)
@given(NAMES, NAMES, NAMES, NAMES)
def test_different_layers_and_reducers_have_different_entries(layer, reducer, other_layer, other_reducer):
    same = (layer, reducer) == (other_layer, other_reducer)
    assert (entry_name(layer, reducer) == entry_name(other_layer, other_reducer)) == same
    assert entry_name(layer).count(":") == 0


def test_an_entry_is_named_after_layer_and_reducer():
    assert entry_name("h.0") == "h.0"
    assert entry_name("h.0", "mean") == "h.0:mean"
    assert entry_name("h.0:input", "position(1)") == "h.0%3Ainput:position(1)"


@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_a_new_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path, write):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    write(path, {"x": torch.ones(2)})
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("has_old", [True, False])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, has_old):
    path = tmp_path / "a.safetensors"
    if has_old:
        path.write_bytes(b"old")
    with pytest.raises(ArgumentError, match=r"dtype of a stored tensor must be one of float64, .*, got torch\.complex"):
        write_safetensors(path, {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.complex128)})
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([b"old"] if has_old else [])


@pytest.mark.parametrize("error", [ValueError("body"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"half of the new")
        raise error
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


def test_a_disk_that_refuses_half_way_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(_formats.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StoreError, match=r"a\.safetensors' must be writable, got No space left\. Check the folder"):
        write_safetensors(path, {"x": torch.ones(2)})
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "missing" / "a.safetensors"
    with pytest.raises(
        StoreError, match=r"a\.safetensors' must be writable, got No such file or directory\."
    ) as caught:
        write_safetensors(path, {"x": torch.ones(2)})
    assert caught.value.path == path
    assert isinstance(caught.value, OSError)
    assert not path.parent.exists()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be writable, got Not a directory"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {"x": torch.ones(2)})


def test_a_long_name_that_the_disk_takes_is_written(tmp_path):
    path = tmp_path / ("\N{GRINNING FACE}" * 55 + ".npz")
    path.touch()  # the disk takes it
    write_npz(path, {"x": torch.ones(2)})


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_wide_unsigned_integers_are_written_too(tmp_path, dtype):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.tensor([1, 2], dtype=dtype)})
    assert load_file(tmp_path / "a.safetensors")["x"].dtype == dtype


def test_a_temporary_file_lies_beside_its_goal_until_the_block_ends(tmp_path):
    path = tmp_path / ("long" * 40)
    with temporary(path) as (file, draft):
        file.write(b"x")
        assert draft.parent == tmp_path
        assert draft.name.startswith(".")
        assert draft.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_can_be_synced(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
