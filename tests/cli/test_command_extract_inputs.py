"""Inputs of ``activation-extractor extract``, as a user types them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import commands
import pytest
from tiny import save_bert

from activation_extractor import open_store

run, mistake = partial(commands.run, "extract"), partial(commands.mistake, "extract")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_labels_that_look_like_numbers_are_stored_as_they_stand(here, bert):
    Path("x.csv").write_text("text,zip,n,big\nACD,00501,1,18446744073709551615\nEF,10001,2,3\n")
    keep = ["--keep", "zip", "--keep", "n", "--keep", "big"]
    run("--model", bert, "--input", "x.csv", *keep, "--batch-size", 1, "--out", "out")
    store = open_store("out")
    assert list(store.keep["zip"]) == ["00501", "10001"]
    assert store.keep["n"].numpy().tolist() == [1, 2]
    assert store.keep["big"].numpy().tolist() == [2**64 - 1, 3]


def test_a_pipe_is_read_as_a_file_is(here, bert):
    Path("x.fa").write_text(">a one\nACD\nEF\n>b\nMK*\n")
    run("--model", bert, "--input", "x.fa", "--keep", "description", "--out", "file")
    done = run(
        "--model", bert, "--input", "-", "--keep", "description", "--out", "pipe", typed=Path("x.fa").read_text()
    )
    assert "Standard input is read as fasta; --input-format text reads its lines." in done.stderr
    names = sorted(path.name for path in Path("file/shards").iterdir())
    assert [Path("file/shards", name).read_bytes() for name in names] == [
        Path("pipe/shards", name).read_bytes() for name in names
    ]


def test_options_say_format_encoding_and_separator(here, bert):
    Path("x.dat").write_bytes("id:body\n007:Größe\n".encode("latin-1"))
    options = ["--input-format", "csv", "--input-encoding", "latin-1", "--separator", ":"]
    columns = ["--text-column", "body", "--id-column", "id", "--keep", "body"]
    run("--model", bert, "--input", "x.dat", *options, *columns, "--out", "out")
    assert (open_store("out").ids, list(open_store("out").keep["body"])) == (["007"], ["Größe"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "--input must be .txt, .jsonl, .json, .csv, .tsv, .parquet, .fasta, .fastq, .npy or a folder, "
             "got 'x.dat'. Say --input-format text, or what it holds."),
        (["--input-format", "cvs"], "--input-format must be one of text, jsonl"),
        (["--input-format", "csv", "--input-encoding", "latin-0"], "--input-encoding must be an encoding that Python"),
        (["--input-format", "csv", "--separator", "::"], "--separator must be one character"),
        (["--input-format", "csv"], "the text of line 3 (row 2) must be text in the encoding that it is read in, got "
             "'the byte 0xf6 behind 2 characters'. Say what it is in: --input-encoding 'latin-1'."),
    ],
)  # fmt: skip
def test_a_mistake_names_the_option_that_mends_it(here, bert, options, text):
    Path("x.dat").write_bytes("text\nACD\nGröße\n".encode("latin-1"))
    assert mistake("--model", bert, "--input", "x.dat", *options, "--out", "out").startswith(text)
    assert not Path("out").exists()


def test_bad_rows_of_every_kind_are_listed_and_the_others_are_stored(here, bert):
    Path("x.csv").write_text("id,text\na,ACD\n\nb,\n,EF\na,MK\nc,LL,1\nd,WY\n")
    done = run("--model", bert, "--input", "x.csv", "--id-column", "id", "--skip-bad-rows", "bad.jsonl", "--out", "out")
    assert open_store("out").ids == ["a", "d"]
    assert len(Path("bad.jsonl").read_text().splitlines()) == 4
    assert "1 blank line of 'x.csv' left out." in done.stderr
