"""The manifest: written once, read back with json itself, and refused where it is faulty."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format._codecs import CODECS
from activation_extractor._format._fields import Field
from activation_extractor._format._manifest import (
    Manifest,
    has_manifest,
    make_manifest,
    read_manifest,
    store_name,
    write_manifest,
)
from activation_extractor.errors import StoreError

FULL = {"layer": "h:0", "reducer": "full", "dtype": "bfloat16", "row_shape": [4], "ragged": True}
MEAN = {"layer": "é", "reducer": "mean", "dtype": "float32", "row_shape": [2, 3], "ragged": False}
LABEL = {"name": "a#label", "dtype": "int64", "row_shape": [], "ragged": False}


def manifest(codec: str = "safetensors", **run) -> Manifest:
    run = {"fingerprint": {"model": "Tiny", "ß": [1, None]}, "batches_per_unit": 3, "model": "Tiny", **run}
    columns = [Field.from_json(column, is_kept=False) for column in (FULL, MEAN)]
    return make_manifest(CODECS[codec], run, columns, [Field.from_json(LABEL, is_kept=True)], "str")


def content(**changes) -> dict[str, Any]:
    return {**manifest().content, **changes}


@pytest.mark.parametrize("codec", CODECS)
def test_a_manifest_says_what_the_run_and_its_columns_are(tmp_path, codec):
    assert write_manifest(tmp_path, manifest(codec))
    (path,) = tmp_path.iterdir()
    assert path.name == "manifest.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    versions = written.pop("versions")
    assert written == {
        "format": "activation_extractor store",
        "version": 1,
        "codec": codec,
        "fingerprint": {"model": "Tiny", "ß": [1, None]},
        "batches_per_unit": 3,
        "model": "Tiny",
        "columns": [FULL, MEAN],
        "keep": [LABEL],
        "ids": "str",
    }
    assert versions.keys() == {"python", "torch", "numpy", "safetensors"}
    assert versions["torch"] == str(torch.__version__)
    assert versions["numpy"] == np.__version__
    assert versions["safetensors"] == safetensors.__version__


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("batches", [None, 1, 10**6])
def test_what_was_written_is_read(tmp_path, codec, batches):
    write_manifest(tmp_path, manifest(codec, batches_per_unit=batches))
    found = read_manifest(tmp_path)
    assert found == manifest(codec, batches_per_unit=batches)
    assert found.codec is CODECS[codec]
    assert found.batches_per_unit == batches
    assert found.fingerprint == {"model": "Tiny", "ß": [1, None]}
    assert [field.key for field in found.columns] == [("h:0", "full"), ("é", "mean")]
    assert [field.to_json() for field in (*found.columns, *found.keep)] == [FULL, MEAN, LABEL]
    assert found.entries == {"h%3A0:full", "é:mean", "#keep:a%23label"}


def test_a_manifest_is_written_once_and_never_changes(tmp_path):
    assert not has_manifest(tmp_path)
    assert write_manifest(tmp_path, manifest(model="first"))
    before = (tmp_path / "manifest.json").read_bytes()
    assert not write_manifest(tmp_path, manifest(model="second"))
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert has_manifest(tmp_path)
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_manifest_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="manifest.json' must be writable, got No space left on device. Check the"):
        write_manifest(tmp_path, manifest())
    assert os.listdir(tmp_path) == []
    with pytest.raises(StoreError, match="must be writable, got No such file or directory"):
        write_manifest(tmp_path / "missing", manifest())


COLUMN_FAULTS = [
    None,
    {},
    "text",
    [3],
    [None],
    [{**FULL, "layer": 3}],
    [{**FULL, "reducer": None}],
    [{**FULL, "dtype": "float31"}],
    [{**FULL, "dtype": "Tensor"}],
    [{**FULL, "dtype": ["float32"]}],
    [{**FULL, "row_shape": None}],
    [{**FULL, "row_shape": 4}],
    [{**FULL, "row_shape": [-1]}],
    [{**FULL, "row_shape": [4.0]}],
    [{**FULL, "row_shape": [True]}],
    [{**FULL, "row_shape": [2**58]}],
    [{**FULL, "converted_from": 3}],
    [{**FULL, "ragged": 1}],
    [{**FULL, "ragged": None}],
    [{key: value for key, value in FULL.items() if key != "layer"}],
    [MEAN, LABEL],
]
FAULTS = [
    *[("codec", value) for value in ("zip", None, ["npz"], 3)],
    *[("fingerprint", value) for value in (None, [], "text")],
    *[("batches_per_unit", value) for value in (0, -1, 1.0, True, "3", [])],
    *[("rows_per_unit", value) for value in (0, -1, 1.0, True, "3", [])],
    *[("ids", value) for value in ("bytes", 3, [], {}, False)],
    *[("columns", value) for value in COLUMN_FAULTS],
    *[("keep", value) for value in (None, {}, [3], [{**LABEL, "name": 3}], [{**LABEL, "dtype": None}], [FULL])],
    *[("keep", [{**LABEL, "ragged": True, **other}]) for other in ({}, {"dtype": "uint8", "row_shape": [2]})],
]


@pytest.mark.parametrize(("member", "value"), FAULTS, ids=str)
def test_a_faulty_member_is_named(tmp_path, member, value):
    (tmp_path / "manifest.json").write_text(json.dumps(content(**{member: value})))
    text = f"must hold a valid '{member}', got none. Restore it from a copy."
    with pytest.raises(StoreError, match=text) as caught:
        read_manifest(tmp_path)
    assert caught.value.path == tmp_path / "manifest.json"


@pytest.mark.parametrize("member", ["codec", "fingerprint", "batches_per_unit", "columns", "keep", "ids"])
def test_a_missing_member_is_named(tmp_path, member):
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in content().items() if k != member}))
    with pytest.raises(StoreError, match=f"must hold a valid '{member}', got none"):
        read_manifest(tmp_path)


def test_members_that_are_not_known_are_no_fault(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(content(more={"a": 1}, versions=None)))
    assert read_manifest(tmp_path).content["more"] == {"a": 1}


@pytest.mark.parametrize("version", [2, 0, "1", None, [1]])
def test_another_version_is_an_error_that_says_so(tmp_path, version):
    (tmp_path / "manifest.json").write_text(json.dumps(content(version=version, columns=None)))
    with pytest.raises(StoreError) as caught:
        read_manifest(tmp_path)
    text = f"must be of version 1, got version {version!r}. Update activation_extractor."
    assert str(caught.value) == f"{str(tmp_path / 'manifest.json')!r} {text}"


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", "\0", "9" * 5000])
def test_what_is_no_json_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="must be a readable manifest, got .*[.] Restore it from a copy[.]"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("value", ["null", "3", "[]", "{}", '{"format": "other"}', '"activation_extractor store"'])
def test_json_of_something_else_is_an_error(tmp_path, value):
    (tmp_path / "manifest.json").write_text(value)
    with pytest.raises(StoreError, match="must be the manifest of a store, got something else. Give the folder of a"):
        read_manifest(tmp_path)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_manifest(tmp_path / "elsewhere", manifest())
    (tmp_path / "manifest.json").symlink_to(tmp_path / "elsewhere" / "manifest.json")
    with pytest.raises(StoreError, match="must be a readable manifest, got a link. Restore it from a copy."):
        read_manifest(tmp_path)
    assert not write_manifest(tmp_path, manifest(model="other"))
    assert json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())["model"] == "Tiny"


def test_a_link_that_leads_nowhere_is_not_taken_for_a_free_place(tmp_path):
    (tmp_path / "manifest.json").symlink_to(tmp_path / "nowhere")
    assert has_manifest(tmp_path)
    assert not write_manifest(tmp_path, manifest())
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_of_that_name_is_an_error_and_no_wait(tmp_path, make):
    make(tmp_path / "manifest.json")
    with pytest.raises(StoreError, match="must be a readable manifest, got something else than a file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "got"), [("missing", "no such folder"), ("file", "a file"), (".", "a folder without manifest.json")]
)
def test_what_is_no_store_says_what_it_is(tmp_path, name, got):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"must be a store, got {got}. Give the folder that was given as out= or"):
        read_manifest(tmp_path / name)


@given(st.dictionaries(st.text(max_size=4), st.lists(st.integers() | st.text(max_size=4), max_size=3), max_size=4))
@settings(deadline=None, max_examples=25)
def test_the_name_of_a_store_follows_from_its_fingerprint_alone(fingerprint):
    name = store_name(fingerprint)
    assert len(name) == 8
    assert int(name, 16) >= 0
    reordered = dict(reversed(json.loads(json.dumps(fingerprint)).items()))
    assert store_name(reordered) == name
    assert store_name({**fingerprint, "another": 1}) != name
