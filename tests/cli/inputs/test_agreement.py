"""Readers beside other readers, and rules that hold for whatever stands in a file."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import read

from activation_extractor.cli.inputs import _objects

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
NUMERALS = st.text("0123456789.-+eE_ ", min_size=1, max_size=8) | st.integers().map(str) | st.floats().map(repr)


@SETTINGS
@given(cells=st.lists(NUMERALS, min_size=1, max_size=6))
def test_every_written_number_prints_back_as_it_stood(tmp_path, cells):
    with open(tmp_path / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *(["a", cell] for cell in cells)])
    kept = read(tmp_path / "x.csv", keep=["n"]).keep["n"]
    assert len({type(value) for value in kept}) == 1
    assert all(cell in printed(value) for cell, value in zip(cells, kept, strict=True))


def printed(value) -> set[str]:
    """How a value is written; a float that is whole may be an integer among floats."""
    is_whole = isinstance(value, float) and value.is_integer()
    return {str(value), *([str(int(value))] if is_whole else [])}


@SETTINGS
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), separator=st.sampled_from(",;\t|"))
def test_tables_are_what_was_written(tmp_path, rows, separator):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows([["text", "other"], *rows])
    columns = read(tmp_path / "x.csv", text_column="text", keep=["other"])
    assert columns.values == [text for text, _ in rows]
    assert list(map(str, columns.keep["other"])) == [other for _, other in rows]


@SETTINGS
@given(
    objects=st.lists(
        st.fixed_dictionaries({"text": TEXT, "n": st.integers(0, 99) | st.none()}), min_size=1, max_size=6
    ),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_arrays_of_objects_are_what_json_reads(tmp_path, objects, indent, is_ascii, chunk):
    (tmp_path / "x.json").write_text(json.dumps(objects, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_objects, "_CHUNK", chunk)
        assert read(tmp_path / "x.json").values == [one["text"] for one in objects]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=is_ascii) for one in objects), "utf-8")
    assert read(tmp_path / "x.jsonl").values == [one["text"] for one in objects]


@SETTINGS
@given(
    records=st.lists(st.text("ACDEFGHIKLMNPQRSTVWYXBZacgtn-.", min_size=1, max_size=200), min_size=1, max_size=5),
    width=st.integers(1, 80),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_fasta_is_what_dnaio_reads(tmp_path, records, width, end):
    dnaio = pytest.importorskip("dnaio", reason="reads sequences")
    lines = []
    for number, record in enumerate(records):
        lines += [f">r{number} of\tmany", *(record[start : start + width] for start in range(0, len(record), width))]
    (tmp_path / "x.fa").write_bytes(end.join(lines).encode())
    with dnaio.open(tmp_path / "x.fa") as expected:
        pairs = [(record.id, record.sequence) for record in expected]
    rows = read(tmp_path / "x.fa")
    assert list(zip(rows.ids or [], rows.values, strict=True)) == pairs
