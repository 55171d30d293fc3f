"""Data sets of Hugging Face, saved and of the hub."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import soundfile
from media import RATE, picture, sound

from activation_extractor.cli.inputs import _hub_datasets, open_source
from activation_extractor.cli.inputs._audio import load_sound
from activation_extractor.cli.inputs._hub_datasets import is_hub_dataset
from activation_extractor.cli.inputs._images import load_image
from activation_extractor.errors import ArgumentError, MissingExtraError


@pytest.fixture
def texts(tmp_path):
    made = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "key": ["a", "b", "c"], "label": [1, 0, -1]})
    made = made.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    made.save_to_disk(
        tmp_path / "saved",
    )
    datasets.DatasetDict(train=made, test=made.select([2])).save_to_disk(tmp_path / "split")
    return tmp_path


def test_a_saved_data_set_has_text_ids_and_labels_by_name(texts):
    source = open_source(str(texts / "saved"), id_column="key", keep=["label"])
    assert [(row.value, row.id) for row in source] == [("one", "a"), ("two", "b"), ("three", "c")]
    assert source.entries(list(source))["label"] == ["good", "bad", ""]
    assert [row.value for row in open_source(str(texts / "saved"), text_column="key")] == ["a", "b", "c"]


def test_a_split_is_named_behind_a_colon(texts):
    assert [row.value for row in open_source(f"{texts / 'split'}:test")] == ["three"]
    with pytest.raises(ArgumentError, match="input must name a split of the data set, got .*it has '?train'?"):
        open_source(str(texts / "split"))
    with pytest.raises(ArgumentError, match="input must be named without a split, as it has none"):
        open_source(f"{texts / 'saved'}:train")


def test_images_and_sounds_are_read_from_their_bytes(tmp_path):
    picture(1).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.flac", sound(0.2), RATE)
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "n": [3]}, features=features)
    made.save_to_disk(tmp_path / "images")
    source = open_source(str(tmp_path / "images"), keep=["n"])
    (row,) = source
    assert (source.kind, row.kept) == ("image", (3,))
    np.testing.assert_array_equal(np.asarray(load_image(row.value)), np.asarray(picture(1)))

    made = datasets.Dataset.from_dict({"speech": [{"bytes": (tmp_path / "a.flac").read_bytes(), "path": "a.flac"}]})
    made.cast_column("speech", datasets.Audio()).save_to_disk(tmp_path / "sounds")
    (row,) = open_source(str(tmp_path / "sounds"))
    np.testing.assert_allclose(load_sound(row.value)[0], sound(0.2), atol=1e-4)


def test_unsigned_integers_stay_so(tmp_path):
    columns = {"text": ["a", "b"], "n": np.array([1, 2], dtype=np.uint64)}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), keep=["n"])
    assert source.entries(list(source))["n"].dtype == np.uint64


def test_columns_of_numbers_are_arrays(tmp_path):
    datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]]}).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), text_column="x")
    assert (source.kind, [row.value.tolist() for row in source]) == ("array", [[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ArgumentError, match=r"text_column must name a column of .* It has 'x'"):
        open_source(str(tmp_path / "saved"))


@pytest.mark.parametrize("options", [{"text_column": "body"}, {"id_column": "body"}, {"keep": ["body"]}])
def test_a_column_that_is_not_there_is_named(texts, options):
    with pytest.raises(ArgumentError, match=rf"{next(iter(options))} must name a column of .*, got 'body'\. It has"):
        open_source(str(texts / "saved"), **options)


def test_a_data_set_of_the_hub_is_an_id_with_a_split(texts, monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.load_from_disk(texts / "saved")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_source("owner/name:train[:10%]").rows == 3
    assert open_source("owner/name:en:test").rows == 3
    assert asked == [(("owner/name", None), {"split": "train[:10%]"}), (("owner/name", "en"), {"split": "test"})]


def test_one_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    with pytest.raises(ArgumentError, match=r"^input must be a data set that can be loaded, with a split, as owner/na"):
        open_source("owner/nothing:train")
    monkeypatch.setattr(_hub_datasets, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"activation_extractor\[datasets\]"):
        open_source("owner/nothing:train")


@pytest.mark.parametrize("name", ["x.csv", "-", "owner/name", "C:\\data\\x.csv", "folder/x.txt"])
def test_names_of_files_are_no_ids(name):
    assert not is_hub_dataset(name)
