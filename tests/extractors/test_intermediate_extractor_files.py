"""The files of the original system's extractor: where they lie, what is in them, what is never touched."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from activation_extractor import IntermediateExtractor
from activation_extractor.errors import ArgumentError, StoreError

FORMATS = ["full", "mean", "FT", "LT", "custom"]
SUFFIXES = {"numpy_compressed": ".npz", "numpy": ".npy"}


@pytest.fixture
def collected(stack: nn.Module, tokens: torch.Tensor) -> IntermediateExtractor:
    extractor = IntermediateExtractor(stack, ["h.0", "h.1"])
    extractor.register_hooks()
    stack(tokens)
    extractor.detach_hooks()
    return extractor


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def load(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    return loaded["arr_0"] if path.suffix == ".npz" else loaded


def put(path: Path, text: str = "foreign") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("output_id", ["sample-1", 7])
@pytest.mark.parametrize(("method", "suffix"), SUFFIXES.items())
def test_files_lie_under_format_id_and_layer(collected, tmp_path, output_id, method, suffix):
    collected.save_outputs(
        tmp_path / "new" / "out", output_id, save_method=method, emb_formats=FORMATS, custom_position=2
    )
    expected = {f"{name}/{output_id}/{layer}{suffix}" for name in FORMATS for layer in ("h.0", "h.1")}
    assert files_in(tmp_path / "new" / "out") == expected


def test_the_defaults_are_compressed_files_of_last_and_first_token(collected, tmp_path):
    full = collected.get_outputs()["h.0"].numpy()
    collected.save_outputs(tmp_path, "a")
    assert files_in(tmp_path) == {f"{name}/a/{layer}.npz" for name in ("LT", "FT") for layer in ("h.0", "h.1")}
    with np.load(tmp_path / "LT/a/h.0.npz") as archive:
        assert archive.files == ["arr_0"]
        assert np.array_equal(archive["arr_0"], full[:, -1])
    assert np.array_equal(load(tmp_path / "FT/a/h.0.npz"), full[:, 0])


@pytest.mark.parametrize("move_to_cpu", [True, False])
@pytest.mark.parametrize(("method", "suffix"), SUFFIXES.items())
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_every_format_is_saved_by_its_values(collected, tmp_path, method, suffix, axis, move_to_cpu):
    before = dict(collected.get_outputs())
    collected.save_outputs(tmp_path, "a", False, move_to_cpu, method, FORMATS, axis, 1)
    for layer, tensor in before.items():
        full = tensor.numpy()
        wanted = {"full": full, "mean": full.mean(axis), "FT": full.take(0, axis), "LT": full.take(-1, axis)}
        wanted["custom"] = full.take(1, axis)
        for name, array in wanted.items():
            saved = load(tmp_path / name / "a" / f"{layer}{suffix}")
            np.testing.assert_allclose(saved, array, rtol=1e-5, atol=1e-6)
    left = collected.intermediate_outputs["h.0"]
    assert isinstance(left, np.ndarray) if move_to_cpu else left is before["h.0"]


@pytest.mark.parametrize(
    ("emb_format", "move_to_cpu"),
    [(name, move) for name in ("full", "FT", "LT") for move in (True, False)]
    + [("mean", False), pytest.param("mean", True)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_and_float32_are_saved_as_float32(tmp_path, dtype, emb_format, move_to_cpu):
    model = nn.Sequential(nn.Identity())
    extractor = IntermediateExtractor(model, ["0"])
    extractor.register_hooks()
    model(torch.arange(6.0).reshape(1, 3, 2).to(dtype))
    extractor.save_outputs(tmp_path, "a", move_to_cpu=move_to_cpu, emb_formats=[emb_format])
    values = {"full": [[[0, 1], [2, 3], [4, 5]]], "mean": [[2, 3]], "FT": [[0, 1]], "LT": [[4, 5]]}
    saved = load(tmp_path / emb_format / "a" / "0.npz")
    assert saved.tolist() == values[emb_format]
    assert saved.dtype == np.float32


def test_a_tuple_output_is_saved_by_its_first_tensor(tmp_path):
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    extractor = IntermediateExtractor(model, ["0"])
    extractor.register_hooks()
    hidden, _ = model(torch.randn(2, 5, 3))
    extractor.save_outputs(tmp_path, "a", emb_formats=["full"])
    assert np.array_equal(load(tmp_path / "full/a/0.npz"), hidden.detach().numpy())


def test_one_format_may_be_given_as_a_word(collected, tmp_path):
    collected.save_outputs(tmp_path, "a", emb_formats="mean")
    assert files_in(tmp_path) == {"mean/a/h.0.npz", "mean/a/h.1.npz"}


def test_saving_again_replaces_the_files_and_keeps_other_calls(collected, tmp_path):
    collected.save_outputs(tmp_path, "a", emb_formats=["full"])
    collected.save_outputs(tmp_path, "b", emb_formats=["full"])
    collected.intermediate_outputs["h.0"] = np.zeros((1, 2))
    collected.save_outputs(tmp_path, "a", emb_formats=["full"])
    assert load(tmp_path / "full/a/h.0.npz").shape == (1, 2)
    assert load(tmp_path / "full/b/h.0.npz").shape == (2, 5, 8)


def test_reset_removes_its_own_files_in_the_given_formats_only(collected, tmp_path):
    collected.save_outputs(tmp_path, "old", emb_formats=["LT", "mean"])
    collected.save_outputs(tmp_path, "old", emb_formats=["LT"], save_method="numpy")
    collected.save_outputs(tmp_path, "new", reset=True, emb_formats=["LT"])
    assert files_in(tmp_path / "LT") == {"new/h.0.npz", "new/h.1.npz"}
    assert not (tmp_path / "LT/old").exists()  # it was left empty
    assert files_in(tmp_path / "mean") == {"old/h.0.npz", "old/h.1.npz"}


def test_reset_never_removes_another_file_or_folder(collected, tmp_path):
    foreign = [
        "LT/old/h.2.npz",
        "LT/old/h.0.npz.bak",
        "LT/old/h.0.txt",
        "LT/old/.hidden",
        "LT/h.0.npz",
        "LT/old/deeper/h.0.npz",
        "h.0.npz",
        "other/old/h.0.npz",
    ]
    for path in foreign:
        put(tmp_path / path)
    (tmp_path / "LT/empty").mkdir()
    (tmp_path / "LT/folder/h.0.npz").mkdir(parents=True)
    put(tmp_path / "LT/old/h.0.npz")
    collected.save_outputs(tmp_path, "new", reset=True, emb_formats=["LT"])
    assert files_in(tmp_path) == {*foreign, "LT/new/h.0.npz", "LT/new/h.1.npz"}
    assert all((tmp_path / path).read_text() == "foreign" for path in foreign)
    assert (tmp_path / "LT/empty").is_dir()
    assert (tmp_path / "LT/folder/h.0.npz").is_dir()


def test_reset_does_not_follow_links_out_of_the_folder(collected, tmp_path):
    file = put(tmp_path / "elsewhere/h.0.npz")
    out = tmp_path / "out"
    (out / "LT/linked-file").mkdir(parents=True)
    (out / "LT/linked-folder").symlink_to(tmp_path / "elsewhere")
    (out / "LT/linked-file/h.0.npz").symlink_to(file)
    collected.save_outputs(out, "new", reset=True, emb_formats=["LT"])
    assert file.read_text() == "foreign"
    assert (out / "LT/linked-folder").is_symlink()


def test_reset_does_not_follow_a_format_folder_that_is_a_link(collected, tmp_path):
    file = put(tmp_path / "elsewhere/old/h.0.npz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/LT").symlink_to(tmp_path / "elsewhere")
    collected.save_outputs(tmp_path / "out", "new", reset=True, emb_formats=["LT"])
    assert file.read_text() == "foreign"


def test_reset_of_a_folder_that_is_not_there_does_no_harm(collected, tmp_path):
    collected.save_outputs(tmp_path / "new", "a", reset=True)
    assert len(files_in(tmp_path / "new")) == 4


def test_a_failure_removes_and_writes_nothing_even_with_reset(collected, tmp_path):
    collected.save_outputs(tmp_path, "old")
    before = files_in(tmp_path)
    collected.intermediate_outputs["h.1"] = None
    with pytest.raises(TypeError, match=r"'h\.1'"):
        collected.save_outputs(tmp_path, "new", reset=True)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_folders_and_files_keep_the_umask(collected, tmp_path, umask):
    previous = os.umask(umask)
    try:
        collected.save_outputs(tmp_path / "out", "a", emb_formats=["LT"])
    finally:
        os.umask(previous)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


OUTSIDE = ["../x", "{tmp_path}/x", "..", ".", "", "a/b", "a\\b", "nul\0l", "../../etc/x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_output_id_cannot_leave_the_folder(collected, tmp_path, name):
    with pytest.raises(ArgumentError, match="output_id must be a plain file name, got .* Leave out path separators"):
        collected.save_outputs(tmp_path / "out", name.format(tmp_path=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
@pytest.mark.parametrize("way", ["renamed", "assigned"])
def test_a_layer_name_cannot_leave_the_folder(stack, tokens, tmp_path, name, way):
    name = name.format(tmp_path=tmp_path)
    extractor = IntermediateExtractor(stack, {name: "h.0"} if way == "renamed" else ["h.0"])
    extractor.register_hooks()
    stack(tokens)
    if way == "assigned":
        extractor.intermediate_outputs[name] = torch.ones(1, 2, 3)
    with pytest.raises(ArgumentError, match="a layer's name must be a plain file name"):
        extractor.save_outputs(tmp_path / "out", "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save_method": "pickle"}, r"save_method must be one of 'numpy_compressed', 'numpy', got 'pickle'\."),
        ({"emb_formats": ["LT", "median"]}, r"emb_format must be one of full, mean, FT, LT, custom, got 'median'\."),
        ({"emb_formats": []}, r"emb_formats must name at least one of full, mean, FT, LT, custom, got \[\]\."),
        ({"emb_formats": ["custom"]}, r"custom_position must be an integer for emb_format='custom', got None\."),
        ({"sequence_axis": 5}, r"sequence_axis must be an axis of shape \(2, 5, 8\), got 5\."),
    ],
)
def test_an_unusable_option_is_an_error_before_any_file(collected, tmp_path, options, text):
    with pytest.raises(ArgumentError, match=text):
        collected.save_outputs(tmp_path / "out", "a", reset=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way_leaves_no_half_file(collected, tmp_path, monkeypatch):
    collected.save_outputs(tmp_path, "a", emb_formats=["full"], save_method="numpy")
    before = (tmp_path / "full/a/h.0.npy").read_bytes()

    def fail(file, array, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(StoreError, match=r"h\.0\.npy' must be writable, got No space left on device\."):
        collected.save_outputs(tmp_path, "a", emb_formats=["full"], save_method="numpy")
    assert (tmp_path / "full/a/h.0.npy").read_bytes() == before
    assert files_in(tmp_path) == {"full/a/h.0.npy", "full/a/h.1.npy"}


@pytest.mark.parametrize("case", ["a file in the way", "too long an id"])
def test_a_folder_that_cannot_be_made_is_a_store_error(collected, tmp_path, case):
    put(tmp_path / "file")
    folder, output_id = (tmp_path / "file", "a") if case == "a file in the way" else (tmp_path, "a" * 300)
    with pytest.raises(StoreError):
        collected.save_outputs(folder, output_id)
