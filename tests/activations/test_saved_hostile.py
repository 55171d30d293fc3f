"""Files that call themselves saved activations: they are read, or refused with a `StoreError`."""

from __future__ import annotations

import contextlib
import gc
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activation_extractor import capture
from activation_extractor.activations._saved import SavedActivations
from activation_extractor.errors import StoreError

SUFFIXES = ["safetensors", "npz"]
ADVICE = ". Give it a file that Activations.save wrote, or the folder of a store."


def foreign(folder, metadata=None, **tensors) -> Path:
    """A file of another library's."""
    path = folder / "foreign.safetensors"
    save_file(tensors or {"a": torch.zeros(1), "b": torch.ones(1)}, path, metadata)
    return path


def npz(folder, **arrays) -> Path:
    np.savez(folder / "foreign.npz", **arrays)
    return folder / "foreign.npz"


def read_all(path):
    found = SavedActivations(path)
    return {key: found[key] for key in found}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"order": "[]"}], ids=str)
def test_a_file_without_an_order_is_read_as_it_lies(tmp_path, metadata):
    assert list(SavedActivations(foreign(tmp_path, metadata))) == [("a", None), ("b", None)]


def test_an_order_is_followed(tmp_path):
    found = SavedActivations(foreign(tmp_path, {"order": '["b", "a"]'}))
    assert [(key, value.item()) for key, value in found.items()] == [(("b", None), 1.0), (("a", None), 0.0)]


@pytest.mark.parametrize(
    "order", ['["a"]', '["a", "a"]', '["a", "b", "b"]', '["a", "c"]', "[1, 2]", '[["a"], ["b"]]', "{}", '"a"', "[NaN]"]
)
def test_an_order_that_is_not_of_the_entries_is_not_followed(tmp_path, order):
    found = SavedActivations(foreign(tmp_path, {"order": order}))
    assert {key: value.item() for key, value in found.items()} == {("a", None): 0.0, ("b", None): 1.0}


def check_read_or_refused(path):
    with contextlib.suppress(StoreError):
        assert sorted(read_all(path)) == [("a", None), ("b", None)]


@pytest.mark.parametrize("order", ["", "[", "nonsense", "[1,", "\x00"])
def test_an_order_that_is_no_json_is_somebody_elses_and_ignored(tmp_path, order):
    assert sorted(read_all(foreign(tmp_path, {"order": order}))) == [("a", None), ("b", None)]


@pytest.mark.parametrize("order", ["5", "null", "true", "NaN", '[1, "a"]', "[null, null]", "[" * 10**5 + "]" * 10**5])
def test_a_hostile_order_raises_nothing_else(tmp_path, order):
    check_read_or_refused(foreign(tmp_path, {"order": order}))


@pytest.mark.parametrize("entry", ["%", "%z", "%zz", "a:%zz"])
def test_an_entry_that_is_no_name_is_refused(tmp_path, entry):
    with pytest.raises(StoreError, match="must be a file of activations that can be read"):
        SavedActivations(foreign(tmp_path, **{entry: torch.ones(1)}))


@pytest.mark.parametrize("entry", ["a%4", "%+1", "%2a"])
def test_an_entry_that_no_name_is_written_as_is_refused_too(tmp_path, entry):
    with pytest.raises(StoreError):
        SavedActivations(foreign(tmp_path, **{entry: torch.ones(1)}))


def test_two_entries_of_one_name_are_not_silently_one(tmp_path):
    path = foreign(tmp_path, **{"a": torch.ones(1), "%61": torch.zeros(1)})
    with contextlib.suppress(StoreError):
        assert len(SavedActivations(path)) == 2


def test_a_file_that_is_not_there_or_a_folder_is_a_store_error(tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(StoreError) as caught:
            SavedActivations(tmp_path / f"none.{suffix}")
        text = f"{str(tmp_path / f'none.{suffix}')!r} must be a file of activations that can be read, got No such file"
        assert str(caught.value).startswith(text)
        (tmp_path / f"folder.{suffix}").mkdir()
        with pytest.raises(StoreError):
            SavedActivations(tmp_path / f"folder.{suffix}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see the next test
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_short_anywhere_is_a_store_error(stack, tokens, tmp_path, suffix):
    path = tmp_path / f"acts.{suffix}"
    with capture(stack, ["h.0", "h.1"]) as acts:
        stack(tokens)
    acts.save(path)
    whole = path.read_bytes()
    for length in [0, 1, 4, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError) as caught:
            SavedActivations(path)
        assert str(caught.value).endswith(ADVICE)
        assert caught.value.path == path


def test_a_file_that_is_refused_is_closed(tmp_path):
    path = npz(tmp_path, a=np.ones(3))
    path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(StoreError):
            SavedActivations(path)
        gc.collect()
    assert not caught


def test_damaged_values_of_an_npz_are_a_store_error(tmp_path):
    path = npz(tmp_path, a=np.zeros(100), b=np.ones(3))
    content = bytearray(path.read_bytes())
    content[500] ^= 255
    path.write_bytes(content)
    found = SavedActivations(path)
    with pytest.raises(StoreError, match=r"got Bad CRC-32 for file 'a\.npy'"):
        found["a", None]
    assert found["b", None].tolist() == [1, 1, 1]


def test_objects_are_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_here",)

    path = npz(tmp_path, a=np.ones(1), evil=np.array([Evil()], dtype=object))
    found = SavedActivations(path)
    assert found["a", None].tolist() == [1]
    with pytest.raises(StoreError, match="Object arrays cannot be loaded"):
        found["evil", None]
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StoreError, match="pickle"):
        SavedActivations(path)
    assert not (tmp_path / "was_here").exists()


def _npy_itself(path):
    with path.open("wb") as file:
        np.save(file, np.ones(2))


def _member(content):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", content)

    return write


def _header(text):
    return _member(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


STRANGE = {
    "text": lambda path: np.savez(path, a=np.array(["x"])),
    "dates": lambda path: np.savez(path, a=np.array(["2020"], dtype="M8[D]")),
    "records": lambda path: np.savez(path, a=np.zeros(1, dtype=[("x", "<f4")])),
    "long doubles": lambda path: np.savez(path, a=np.zeros(1, dtype=np.longdouble)),
    "no array": _member(b"hello"),
    "half a header": _header(b"{'descr':"),
    "too large": _header(b"{'descr':'<f4','fortran_order':False,'shape':(1000000000000000,)}\n"),
    "beyond integers": _header(b"{'descr':'<f4','fortran_order':False,'shape':(1" + b"0" * 30 + b",)}\n"),
    "an npy file": _npy_itself,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", STRANGE)
def test_an_npz_of_something_else_raises_nothing_but_a_store_error(tmp_path, kind):
    STRANGE[kind](tmp_path / "strange.npz")
    with pytest.raises(StoreError):
        read_all(tmp_path / "strange.npz")
