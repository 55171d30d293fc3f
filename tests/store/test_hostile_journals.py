"""Hostile journals and manifests: what they claim is checked against the shards, or refused."""

from __future__ import annotations

import pytest
from hostile import UNITS, change_journal, change_manifest, entries_of, faults, guarded, make_store

from activation_extractor import open_store
from activation_extractor._format._codecs import SAFETENSORS
from activation_extractor._format._shards import read_shard, shard_path
from activation_extractor.errors import StoreError


@pytest.fixture(autouse=True)
def is_guarded():
    with guarded():
        yield


def short(value: object) -> str:
    return repr(value).replace(" ", "")[:70]


# -- journals ---------------------------------------------------------------------------------------------------------

LINES = ["", "{", "[]", "null", "1], [2", '"x"', "{}", '{"unit": 1}', "\0\0", "\ud800", "[" * 9999, "9" * 9999, "NaN"]
LINES += [
    '{"unit": "../../x", "rows": 4, "bytes": 1, "seal": "0"}',
    '{"unit": "/etc", "rows": 1, "bytes": 1, "seal": ""}',
]
LINES += ['{"unit": "00000001", "rows": -4, "bytes": 1, "seal": "0"}', '{"unit": "00000001", "rows": true, "bytes": 1}']
LINES += ['{"unit": "00000001", "rows": 4, "bytes": 1, "seal": "0", "counts": {"h:mean": -1}}']
LINES += [
    '{"unit": "00000001", "rows": 4, "bytes": 1, "seal": "0", "counts": [4]}',
    '{"unit": ["00000001"], "rows": 4}',
]


@pytest.mark.parametrize("line", LINES, ids=short)
def test_a_line_of_a_journal_that_is_no_record_is_passed_over(tmp_path, line):
    folder = make_store(tmp_path / "out", SAFETENSORS)
    with open(folder / "journal" / "w.jsonl", "ab") as file:
        file.write(line.encode(errors="surrogatepass") + b"\n")
    assert faults(folder) == []


def test_a_line_that_is_torn_hides_no_other(tmp_path):
    folder = make_store(tmp_path / "out", SAFETENSORS, units=1)
    path = folder / "journal" / "w.jsonl"
    path.write_bytes(b'{"unit": "00000' + b"\n" + path.read_bytes() + b'{"unit": "00000007", "rows": 4')
    assert faults(folder) == []
    shard_path(folder, UNITS[0], SAFETENSORS).unlink()
    with pytest.raises(StoreError, match="must have all of its units, got 1 of 1 missing: '00000000'"):
        open_store(folder)


COUNTS = {"h:mean": 4, "h:full": 4, "rare:max": 3, "#keep:label": 4}
RECORDS = [{"rows": rows} for rows in (0, 3, 5, 10**6, 2**40, 2**45)]
RECORDS += [{"seal": "00000000"}, {"unit": "00000009"}]
RECORDS += [{"rows": 9, "counts": COUNTS}, {"rows": 3, "counts": dict.fromkeys(COUNTS, 3)}, {"counts": {}}]
RECORDS += [{"counts": {**COUNTS, entry: count}} for entry in ("h:mean", "h:full", "rare:max") for count in (0, 1, 9)]
RECORDS += [{"counts": {**COUNTS, entry: 4}} for entry in ("x:y", "%68:mean", "#keep:x", "#keep:%6c", "../../x:y")]
RECORDS += [{"counts": {**COUNTS, "x:y": 0}}, {"counts": {**COUNTS, "#ids": 9, "h:mean#rows": 9, "": 9, "junk": 9}}]


UNCOUNTABLE = [{name: number} for name in ("rows", "bytes") for number in (2**46, 2**62, 10**30, 10**400)]
UNCOUNTABLE += [{"counts": {**COUNTS, entry: 10**30}} for entry in ("h:mean", "h:full", "rare:max")]


@pytest.mark.parametrize("record", UNCOUNTABLE, ids=short)
def test_a_record_of_more_than_any_disk_holds_is_passed_over(tmp_path, record):
    folder = make_store(tmp_path / "out", SAFETENSORS, ids="str" if "counts" in record else None)
    change_journal(folder, lambda one: {**one, **record})
    assert faults(folder) == []


@pytest.mark.parametrize("record", RECORDS, ids=short)
def test_a_journal_that_tells_of_other_rows_is_found_out(tmp_path, record):
    folder = make_store(tmp_path / "out", SAFETENSORS, ids="str" if "counts" in record else None)
    change_journal(folder, lambda one: {**one, **record})
    assert faults(folder)


# -- manifests --------------------------------------------------------------------------------------------------------

DTYPES = ["float64", "bfloat16", "complex32", "qint8", "bits8", "float4_e2m1fn_x2", "uint4", "float", "Tensor", "", 3]
SHAPES = [
    [],
    [4],
    [3, 1],
    [-3],
    [True],
    ["3"],
    [2**40],
    [2**62],
    [2**63],
    [2**70],
    [2**40] * 2,
    [0],
    [2**62, 0],
    None,
    3,
]
COLUMN = [{"dtype": dtype} for dtype in DTYPES] + [{"row_shape": shape} for shape in SHAPES]
COLUMN += [{"ragged": True}, {"ragged": 1}, {"layer": "x"}, {"layer": "../../x"}, {"layer": 3}, {"reducer": None}]


@pytest.mark.parametrize("units", [2, 0])
@pytest.mark.parametrize("column", COLUMN, ids=short)
def test_a_manifest_that_tells_of_other_columns_is_found_out(tmp_path, column, units):
    folder = make_store(tmp_path / "out", SAFETENSORS, units=units)
    change_manifest(folder, lambda one: {**one, "columns": [{**one["columns"][0], **column}, *one["columns"][1:]]})
    assert faults(folder) or units == 0 or isinstance(column.get("layer"), str)  # one that no row has


@pytest.mark.parametrize("question", ["lengths", "flat", "mapped", "torch"])
def test_a_column_that_is_not_ragged_as_the_manifest_tells_is_refused(tmp_path, question):
    folder = make_store(tmp_path / "out", SAFETENSORS)
    change_manifest(folder, lambda one: {**one, "columns": [{**column, "ragged": True} for column in one["columns"]]})
    with pytest.raises(StoreError):
        getattr(open_store(folder)["h", "mean"], question)()


MANIFESTS = [{"codec": value} for value in ("npz", "pickle", "../x", None, ["npz"], {"npz": 1})]
MANIFESTS += [{"ids": value} for value in ("int", None, "float", [])] + [
    {"keep": value} for value in ([], None, [{}], "x")
]
MANIFESTS += [{"columns": value} for value in ([], None, {}, [[]], [None])] + [
    {"fingerprint": v} for v in ({}, [], None)
]
MANIFESTS += [{"batches_per_unit": value} for value in (0, -1, True, "1", 1.0)]
MANIFESTS += [{"least_rows_per_unit": value} for value in (0, -1, True, "1", 1.0)]
MANIFESTS += [{"version": value} for value in (0, 2, "1", None, [])] + [{"format": value} for value in ("", None, 1)]
FINE = [{"keep": []}, {"columns": []}, {"ids": "int"}, {"ids": None}]


@pytest.mark.parametrize("has_journal", [True, False], ids=["journal", "no_journal"])
@pytest.mark.parametrize("change", MANIFESTS, ids=short)
def test_a_manifest_that_tells_something_else_is_found_out(tmp_path, change, has_journal):
    folder = make_store(tmp_path / "out", SAFETENSORS, has_journal=has_journal)
    change_manifest(folder, lambda one: {**one, **change})
    assert faults(folder) or change in FINE


def test_a_manifest_may_hold_paths_that_lead_nowhere(tmp_path):
    folder = make_store(tmp_path / "out", SAFETENSORS)
    change_manifest(folder, lambda one: {**one, "shards": "../../x", "path": "/etc", "journal": ["/etc/passwd"]})
    assert faults(folder) == []


def test_a_unit_of_a_with_block_in_a_store_of_a_data_set_is_refused(tmp_path):
    codec, folder = SAFETENSORS, make_store(tmp_path / "out", SAFETENSORS, units=1, ids=None, has_journal=False)
    unit = "20260102T030405678901-0123abcd-00000000"
    shard = read_shard(shard_path(folder, UNITS[0], codec), codec)
    entries = {name: chunks for name, chunks in entries_of(0).items() if not name.startswith("#ids")}
    codec.write(shard_path(folder, unit, codec), entries, {**shard.metadata, "unit": unit})
    assert faults(folder)


def test_a_manifest_of_any_depth_is_read_or_refused(tmp_path):
    folder = make_store(tmp_path / "out", SAFETENSORS, units=0)
    text = (folder / "manifest.json").read_text()
    for depth in (*range(700, 1000, 3), 10_000, 200_000):
        nested = text.replace('"fingerprint": {', '"fingerprint": {"x": ' + "[" * depth + "]" * depth + ",", 1)
        (folder / "manifest.json").write_text(nested)
        faults(folder)
