"""npz and npy files, read back with numpy and zipfile themselves."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy_format

from activation_extractor._files import TruncatedError, draft
from activation_extractor._format._numpy import (
    npy_file,
    read_npy_shard,
    read_npz_shard,
    write_npy_shard,
    write_npz,
    write_npz_shard,
)
from activation_extractor._tensors import as_numpy_has
from activation_extractor.errors import StoreError

READ = {write_npz_shard: read_npz_shard, write_npy_shard: read_npy_shard}
DTYPES = [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
DTYPES += [torch.bool, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]
ENTRIES = {
    "h.0:mean": [torch.arange(6.0).reshape(2, 3), torch.zeros(0, 3), torch.ones(1, 3)],
    "scalar": [torch.arange(3)],
    "none": [torch.zeros(0, 4, dtype=torch.bool)],
    "nothing": [torch.zeros(3, 0)],
    "turned": [torch.arange(6.0).reshape(2, 3).t()],
    "../../ü:%2F#rows": [torch.arange(3, dtype=torch.uint8)],
    "long" * 100: [torch.ones(1)],
}
ABOUT = {"unit": "00000000", "rows": "3", "store": "größe"}


@pytest.fixture(params=READ, ids=["npz", "npy"])
def write(request):
    return request.param


def load(path: Path) -> dict[str, np.ndarray]:
    """What numpy reads of a shard, nothing unpickled."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    names = json.loads((path / "about.json").read_bytes())["crc32"]
    files = sorted(one for one in path.iterdir() if one.suffix == ".npy")
    return {name: np.load(file, allow_pickle=False) for name, file in zip(names, files, strict=True)}


def as_bytes(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.iterdir()
    return {one.name: one.read_bytes() for one in files}


# -- files of a user's own --------------------------------------------------------------------------------------------


def test_an_npz_holds_what_numpy_reads(tmp_path):
    wide = torch.randn(2, 3)
    tensors = {"h.0:mean": wide, "turned": wide.t(), "bf16": wide.bfloat16(), "int": torch.arange(3), "one": wide[0, 0]}
    write_npz(tmp_path / "a.npz", tensors)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == list(tensors)
        assert np.array_equal(archive["h.0:mean"], wide.numpy())
        assert np.array_equal(archive["turned"], wide.numpy().T)
        assert archive["bf16"].dtype == np.float32
        assert np.array_equal(archive["bf16"], wide.bfloat16().float().numpy())
        assert archive["int"].dtype == np.int64
        assert archive["one"].shape == ()
        assert archive["one"] == wide[0, 0].item()


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_an_npz_takes_every_name(tmp_path, name):
    write_npz(tmp_path / "a.npz", {name: torch.ones(2)})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == [name]


def test_a_new_npz_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    write_npz(path, {"x": torch.ones(2)})
    assert load(path)["x"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_an_npz_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"a\.npz' must be writable, got No such file or directory\."):
        write_npz(tmp_path / "missing" / "a.npz", {"x": torch.ones(2)})


def test_a_long_name_that_the_disk_takes_is_written(tmp_path):
    path = tmp_path / ("\N{GRINNING FACE}" * 55 + ".npz")
    path.touch()  # the disk takes it
    write_npz(path, {"x": torch.ones(2)})
    assert load(path)["x"].tolist() == [1, 1]


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_that_numpy_has_is_kept_bit_for_bit(tmp_path, write, dtype):
    given = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    assert as_numpy_has(given).data_ptr() == given.data_ptr()
    write(tmp_path / "a", {"x": [given]}, ABOUT)
    found = load(tmp_path / "a")["x"]
    assert found.dtype == given.numpy().dtype
    assert found.tobytes() == given.numpy().tobytes()


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (torch.tensor([1 + 2j, -1j]).conj(), [1 - 2j, 1j]),
        (torch.tensor([1 + 2j, 3j]).conj().imag, [-2.0, -3.0]),
        (torch.tensor([1.0, 0.0, 2.0]).to_sparse(), [1.0, 0.0, 2.0]),
        (torch.ones(1, requires_grad=True), [1.0]),
    ],
    ids=["conjugated", "negated", "sparse", "with_gradient"],
)
def test_a_tensor_that_numpy_does_not_take_is_stored_by_its_values(tmp_path, write, given, values):
    write(tmp_path / "a", {"x": [as_numpy_has(given)]}, ABOUT)
    assert load(tmp_path / "a")["x"].tolist() == values


# -- shards -----------------------------------------------------------------------------------------------------------


def test_a_shard_is_read_back_by_numpy(tmp_path, write):
    write(tmp_path / "a", ENTRIES, ABOUT)
    read = load(tmp_path / "a")
    assert list(read) == list(ENTRIES)
    for name, chunks in ENTRIES.items():
        whole = torch.cat(chunks).numpy()
        assert (read[name].dtype, read[name].shape) == (whole.dtype, whole.shape)
        assert np.array_equal(read[name], whole)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_makes_no_path_and_a_name_that_any_disk_takes(name):
    file = npy_file(12, name)
    assert os.path.basename(file) == file
    assert file.isascii()
    assert len(file) <= 110
    assert file.startswith("0012-")
    assert file.endswith(".npy")


def test_the_notes_and_the_seal_stand_in_the_comment_or_beside_the_arrays(tmp_path, write):
    seal = write(tmp_path / "a", ENTRIES, ABOUT)
    if write is write_npz_shard:
        with zipfile.ZipFile(tmp_path / "a") as archive:
            about = json.loads(archive.comment)
    else:
        about = json.loads((tmp_path / "a" / "about.json").read_bytes())["about"]
    assert about == {**ABOUT, "seal": seal}


def test_an_npz_is_not_compressed_and_has_no_date(tmp_path):
    write_npz_shard(tmp_path / "a", ENTRIES, ABOUT)
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.date_time == (1980, 1, 1, 0, 0, 0)


def test_the_same_shard_has_the_same_bytes(tmp_path, write, monkeypatch):
    write(tmp_path / "a", ENTRIES, ABOUT)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *seconds: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    write(tmp_path / "b", ENTRIES, ABOUT)
    one, two = as_bytes(tmp_path / "a"), as_bytes(tmp_path / "b")
    assert list(one.values()) == list(two.values()) if write is write_npz_shard else one == two


def test_a_checksum_is_that_of_the_npy_file_header_included(tmp_path, write):
    path = tmp_path / "a"
    write(path, ENTRIES, ABOUT)
    contents = READ[write](path)
    if write is write_npz_shard:
        with zipfile.ZipFile(path) as archive:
            crcs = {one.filename.removesuffix(".npy"): zlib.crc32(archive.read(one)) for one in archive.infolist()}
    else:
        crcs = json.loads((path / "about.json").read_bytes())["crc32"]
        files = sorted(path.glob("*.npy"))
        assert list(crcs.values()) == [zlib.crc32(file.read_bytes()) for file in files]
    assert {name: extent.crc32 for name, extent in contents.extents.items()} == crcs


def test_a_shard_tells_where_its_values_lie(tmp_path, write):
    seal = write(tmp_path / "a", ENTRIES, ABOUT)
    contents = READ[write](tmp_path / "a")
    assert contents.metadata == {**ABOUT, "seal": seal}
    assert list(contents.extents) == list(ENTRIES)
    for name, chunks in ENTRIES.items():
        extent, whole = contents.extents[name], torch.cat(chunks)
        data = extent.path.read_bytes()
        assert (extent.dtype, extent.shape) == (whole.dtype, tuple(whole.shape))
        assert data[extent.start : extent.stop] == whole.numpy().tobytes()
        assert extent.crc32 == zlib.crc32(data[extent.crc_start : extent.stop])
    contents.check_seal()


def test_a_shard_is_never_written_over_what_is_there(tmp_path, write):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", ENTRIES, ABOUT)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_of_arrays_holds_nothing_else(tmp_path):
    with draft(tmp_path / "a") as beside:
        write_npy_shard(beside, ENTRIES, ABOUT)
        assert sorted(one.name for one in beside.iterdir()) == sorted(
            ["about.json", *(npy_file(number, name) for number, name in enumerate(ENTRIES))]
        )


def test_every_file_of_a_shard_is_synced(tmp_path, write, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write(tmp_path / "a", ENTRIES, ABOUT)
    assert {path.stat().st_ino for path in (tmp_path / "a", *(tmp_path / "a").glob("*"))} == set(synced)


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_an_array_of_another_version_of_the_format_is_refused(tmp_path, version):
    write_npy_shard(tmp_path / "a", {"x": [torch.ones(2)]}, ABOUT)
    with open(tmp_path / "a" / npy_file(0, "x"), "wb") as file:
        npy_format.write_array(file, np.ones(2, np.float32), version)
    with pytest.raises(ValueError, match="an npy file of another version"):
        read_npy_shard(tmp_path / "a")


def test_an_array_that_is_cut_short_or_too_long_says_so(tmp_path):
    write_npy_shard(tmp_path / "a", {"x": [torch.ones(2)]}, ABOUT)
    file = tmp_path / "a" / npy_file(0, "x")
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(TruncatedError, match=f"a file that ends at byte {len(data) - 1} of {len(data)}"):
        read_npy_shard(tmp_path / "a")
    file.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="bytes after the end of an array"):
        read_npy_shard(tmp_path / "a")
