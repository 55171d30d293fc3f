"""Folders for `datasets.load_from_disk`, opened with it, as SAELens opens its caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exports import DENSE, HALVES, IDS, LENGTHS, RAGGED, SHORT, make_store, simple_store

from activation_extractor import export
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, ArgumentTypeError, MissingExtraError
from activation_extractor.store import _datasets_folder as module

datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")

CONTEXT = torch.arange(24.0).view(3, 4, 2)  # three contexts of four tokens
TOKENS = torch.arange(12).view(3, 4)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def opened(store, path, **options):
    export(store, path, "datasets", **options)
    return datasets.load_from_disk(str(path))


def full(dtype=torch.float32, lengths=(4, 4, 4)):
    values = CONTEXT.reshape(12, 2)[: sum(lengths)].to(dtype)
    return Ragged(values, torch.tensor(lengths))


def ragged_store(folder, values, keep=None):
    from activation_extractor import SafetensorsSink, open_store
    from activation_extractor.sinks import Step

    sink = SafetensorsSink(folder / "store")
    sink.write(Step(0, 3, values, None, keep or {}))
    sink.close()
    return open_store(folder / "store")


def test_every_column_comes_back_with_its_values(store, tmp_path):
    found = opened(store, tmp_path / "out")
    assert found.column_names == ["id", "h.0:mean", "h.0", "h:1:mean", "x:mean", "label"]
    assert list(found["id"]) == IDS
    assert list(found["label"]) == [0, 1, 2, 3, 4]
    assert np.array_equal(found.with_format("numpy")["h.0:mean"][:], DENSE.view(5, 2, 3).numpy())
    assert list(found["h:1:mean"]) == HALVES.float().tolist()
    assert list(found["h.0"]) == [one.tolist() for one in torch.split(RAGGED, LENGTHS)]
    assert list(found["x:mean"]) == [None, None, *SHORT.tolist()]


def test_features_say_shapes_and_dtypes(store, tmp_path):
    features = opened(store, tmp_path / "out").features
    assert features["h.0:mean"] == datasets.Array2D((2, 3), "float32")
    assert features["h.0"] == datasets.Array2D((None, 2), "float32")
    assert (features["h:1:mean"].length, features["h:1:mean"].feature.dtype) == (2, "float32")
    assert (features["id"].dtype, features["label"].dtype) == ("string", "int64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_one_length_are_what_saelens_reads(tmp_path, dtype):
    values = {("blocks.0.hook_resid_post", "full"): full(dtype), ("blocks.0.hook_resid_post", "mean"): CONTEXT[:, 0]}
    found = opened(ragged_store(tmp_path, values, {"input_ids": TOKENS}), tmp_path / "out")
    # As `ActivationsStore.load_cached_activation_dataset` of SAELens 6 does, and the batches that it then takes.
    columns = ["blocks.0.hook_resid_post", "token_ids"]
    found.set_format(type="torch", columns=columns, dtype=torch.float32)
    assert found.features["blocks.0.hook_resid_post"].shape == (4, 2)
    batch = found[0:2]
    assert torch.equal(batch["blocks.0.hook_resid_post"], CONTEXT[:2])
    assert batch["token_ids"].tolist() == TOKENS[:2].tolist()


@pytest.mark.parametrize("name", ["token_ids", "input_ids"])
def test_token_ids_are_a_kept_column_or_a_layer_of_that_name(tmp_path, name):
    keep = {name: TOKENS, "label": torch.arange(3)}
    assert opened(ragged_store(tmp_path, {("h", "full"): full()}, keep), tmp_path / "out")["token_ids"][0] == [
        0,
        1,
        2,
        3,
    ]


def test_a_layer_of_token_ids_gives_them_too(tmp_path):
    ids = Ragged(torch.arange(12), torch.tensor([4, 4, 4]))
    found = opened(ragged_store(tmp_path, {("h", "full"): full(), ("token_ids", "ids"): ids}), tmp_path / "out")
    assert found.features["token_ids"].length == 4
    assert found["token_ids"][2] == [8, 9, 10, 11]


def test_token_ids_that_are_there_are_left_as_they_are(tmp_path):
    keep = {"input_ids": TOKENS + 100, "token_ids": TOKENS}
    found = opened(ragged_store(tmp_path, {("h", "full"): full()}, keep), tmp_path / "out")
    assert (found["token_ids"][0], found["input_ids"][0]) == ([0, 1, 2, 3], [100, 101, 102, 103])


def test_files_have_the_bytes_that_were_asked_for_and_all_rows(store, tmp_path):
    whole, parts = opened(store, tmp_path / "whole"), opened(store, tmp_path / "parts", shard_bytes=64)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        *(f"data-{number:05d}-of-00005.arrow" for number in range(5)),
        "dataset_info.json",
        "state.json",
    ]
    assert parts[:] == whole[:]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4), (2, 1, 2, 1), (1, 2, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint16, torch.bool, torch.float8_e4m3fn])
def test_rows_of_each_shape_and_dtype_come_back(tmp_path, shape, dtype):
    values = (torch.rand(3, *shape) * 4).to(dtype)
    found = opened(simple_store(tmp_path, {("a", "mean"): values}), tmp_path / "out").with_format("numpy")["a"][:]
    assert np.array_equal(np.asarray(found), values.float().numpy() if values.is_floating_point() else values.numpy())


def test_short_columns_of_several_axes_and_of_numbers_have_nulls(tmp_path):
    from activation_extractor import SafetensorsSink, open_store
    from activation_extractor.sinks import Step

    sink = SafetensorsSink(tmp_path / "store", rows_per_unit=1)
    for index in range(2):
        more = {("m", "x"): CONTEXT[:1], ("n", "x"): torch.tensor([7])} if index else {}
        sink.write(Step(index, 1, {("a", "x"): torch.ones(1, 1), **more}))
    sink.close()
    found = opened(open_store(tmp_path / "store"), tmp_path / "out")
    assert (found["m"][0], found["m"][1]) == (None, CONTEXT[0].tolist())
    assert list(found["n"]) == [None, 7]


def test_nan_and_infinities_stay(tmp_path):
    values = torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]])
    found = opened(simple_store(tmp_path, {("a", "mean"): values}), tmp_path / "out").with_format("numpy")["a"][:]
    assert np.array_equal(np.asarray(found), values.numpy(), equal_nan=True)


@pytest.mark.parametrize("name", ["a/b", "id", "", ".", "ünï 'x'\"", "a.b.c", "%"])
def test_names_of_any_kind_come_back(tmp_path, name):
    found = opened(simple_store(tmp_path, {(name, "mean"): torch.ones(2, 1)}), tmp_path / "out")
    assert found.column_names == ["id", name if name not in ("", "id") else f"{name}:mean"]


def test_what_the_format_does_not_have_is_an_error_that_says_what_to_do(tmp_path):
    for number, values in enumerate(
        [torch.ones(2, 1, dtype=torch.complex64), torch.ones(2, *[1] * 6), torch.ones(2, 0)]
    ):
        (tmp_path / str(number)).mkdir()
        store = simple_store(tmp_path / str(number), {("a", "mean"): values})
        with pytest.raises(ArgumentError, match=r"^column 'a' of a data set must .*, got .*\. Export to npz instead"):
            export(store, tmp_path / "out", "datasets")
    (tmp_path / "nul").mkdir()
    with pytest.raises(ArgumentError, match=r"column must be without NUL, got 'a\\x00b'\. Export to npz instead"):
        export(simple_store(tmp_path / "nul", {("a\0b", "mean"): torch.ones(1, 1)}), tmp_path / "out", "datasets")
    assert not (tmp_path / "out").exists()


def test_columns_can_be_chosen(store, tmp_path):
    assert opened(store, tmp_path / "a", keys=[("h.0", "full")]).column_names == ["id", "h.0", "label"]
    assert opened(store, tmp_path / "b", keys=[]).column_names == ["id", "label"]
    with pytest.raises(ActivationNotFoundError):
        export(store, tmp_path / "c", "datasets", keys=[("nope", "full")])
    with pytest.raises(ArgumentTypeError, match="keys must be several keys of columns, got 'h.0'"):
        export(store, tmp_path / "c", "datasets", keys="h.0")


def test_without_datasets_the_error_names_the_extra(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"^Exporting to datasets needs datasets, .*activation_extractor\[datasets\]"
    ):
        export(store, tmp_path / "out", "datasets")
