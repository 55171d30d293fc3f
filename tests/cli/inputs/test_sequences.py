"""FASTA and FASTQ."""

from __future__ import annotations

import json

import pytest
from sources import read

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError


def written(folder, name, content) -> str:
    (folder / name).write_bytes(content.encode())
    return str(folder / name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".fasta", ".fa", ".faa", ".fna", ".ffn", ".frn", ".fas", ".fsa", ".pep", ".FA"])
def test_records_are_rows(tmp_path, suffix, end):
    content = end.join([">a|1 first protein", "MPTI", "KQL", "", ">b", "MK*", ""])
    rows = read(written(tmp_path, f"x{suffix}", content), keep=["description"])
    assert (rows.values, rows.ids) == (["MPTIKQL", "MK"], ["a|1", "b"])
    assert rows.keep == {"description": ["first protein", ""]}
    assert rows.places == ["record 'a|1' at line 1", "record 'b' at line 5"]


@pytest.mark.parametrize("header", [">P1\tof a  yeast ", ">P1 of a  yeast", "> P1 of a  yeast", ">P1 \t of a  yeast"])
def test_white_space_of_any_kind_ends_the_id(tmp_path, header):
    rows = read(written(tmp_path, "x.fa", f"{header}\nMK\n"), keep=["description"])
    assert (rows.ids, rows.keep) == (["P1"], {"description": ["of a  yeast"]})


def test_comments_are_no_residues(tmp_path):
    content = "; made by hand\n# and more\n\n>a\n;inside\nMK\n#inside\nLL\n;between\n>b\nA\n;at the end\n"
    rows = read(written(tmp_path, "x.fa", content))
    assert (rows.values, rows.ids) == (["MKLL", "A"], ["a", "b"])


def test_residues_are_kept_as_they_are_but_for_white_space_and_the_last_stop_codon(tmp_path):
    content = ">a\n  acgT NN-\n\tRY.u 1*2\n>b\nM*K*\n>c\nMK\n*\n"
    assert read(written(tmp_path, "x.fa", content)).values == ["acgTNN-RY.u1*2", "M*K", "MK"]


def test_headers_may_be_in_any_script(tmp_path):
    rows = read(written(tmp_path, "x.fa", ">P1 protéine de la lèvre\nMK\n"), keep=["description"])
    assert rows.keep == {"description": ["protéine de la lèvre"]}


def test_a_line_may_be_very_long_and_lines_may_be_many(tmp_path):
    long = "ACGT" * 500_000
    wrapped = "\n".join(long[start : start + 60] for start in range(0, len(long), 60))
    rows = read(written(tmp_path, "x.fna", f">a\n{long}\n>b\n{wrapped}\n"))
    assert rows.values == [long, long]


def test_columns_of_sequences_have_names(tmp_path):
    source = written(tmp_path, "x.fa", ">a one\nMK\n>b two\nML\n")
    rows = read(source, id_column="description", keep=["id", "sequence"])
    assert (rows.ids, rows.keep) == (["one", "two"], {"id": ["a", "b"], "sequence": ["MK", "ML"]})
    with pytest.raises(ArgumentError, match=r"keep must name a column of .* got 'taxon'\. Its columns are 'sequence'"):
        read(source, keep=["taxon"])
    with pytest.raises(ArgumentError, match=r"text_column must name a column of .* got 'text'"):
        read(source, text_column="text")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (">bad one\n", r"record 'bad' at line 3 must hold residues, got ''\. Remove that record\."),
        (">bad\n*\n", r"record 'bad' at line 3 must hold residues"),
        (">\nMK\n", r"the id of record '' at line 3 must hold text, got ''\. Give that row an id\."),
        (">\n", r"record '' at line 3 must hold residues"),
        (">bad\nMK>c\nLL\n", r"record 'bad' at line 3 must hold '>' at the start of a line only, got 'MK>cLL'\."),
        (
            ">a\nLL\n",
            r"the id of record 'a' at line 3 must be its own, got 'a'\. An earlier row has it: record",
        ),
    ],
)
def test_a_bad_record_is_named_and_may_be_skipped(tmp_path, record, text):
    source = written(tmp_path, "x.fa", f">a\nMK\n{record}>z\nMM\n")
    with pytest.raises(ArgumentError, match=text):
        read(source)
    rows = read(source, bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.ids) == (["MK", "MM"], ["a", "z"])
    assert len((tmp_path / "bad").read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "\n", "; nothing\n"])
def test_a_file_without_a_record_is_an_error(tmp_path, content):
    with pytest.raises(ArgumentError, match="input must hold at least one row"):
        read(written(tmp_path, "x.fa", content))


def test_residues_without_a_header_are_an_error(tmp_path):
    with pytest.raises(ArgumentError, match=r"line 2 must come after a header that begins with '>', got 'MK'\."):
        read(written(tmp_path, "x.fa", "\nMK\n>a\nML\n"))


def test_every_record_with_an_id_of_another_is_listed(tmp_path):
    source = written(tmp_path, "x.fa", ">a\nMK\n>b\nML\n>a\nMM\n>a\nMN\n>b\nMP\n")
    rows = read(source, bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.ids) == (["MK", "ML"], ["a", "b"])
    places = [json.loads(line)["place"] for line in (tmp_path / "bad").read_text().splitlines()]
    assert places == [f"record {name!r} at line {line}" for name, line in (("a", 5), ("a", 7), ("b", 9))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".fastq", ".fq", ".FQ"])
def test_records_of_fastq_are_rows(tmp_path, suffix, end):
    lines = ["@r1/1 lane 3", "ACGTn", "+r1/1 lane 3", "II@I+", "@r2", "GG", "+", "II", ""]
    rows = read(written(tmp_path, f"x{suffix}", end.join(lines)), keep=["description"])
    assert (rows.values, rows.ids, rows.keep) == (["ACGTn", "GG"], ["r1/1", "r2"], {"description": ["lane 3", ""]})
    assert rows.places == ["record 'r1/1' at line 1", "record 'r2' at line 5"]


@pytest.mark.parametrize("content", ["@r1\nACGT\n+\nIII\n", "@r1\nACGT\n", "@r1\nAC\nGT\n+\nII\nII\n", ">r1\nACGT\n"])
def test_fastq_that_is_damaged_is_one_sentence(tmp_path, content):
    with pytest.raises(ArgumentError, match=r"input must be a file that can be read, got '.*x\.fq'\. .*[Ll]ine"):
        read(written(tmp_path, "x.fq", content))
