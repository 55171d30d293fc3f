"""``activation-extractor extract`` over texts that are longer than the model takes, and over inputs that grow."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import commands
import pytest
import text_models
import torch

from activation_extractor import capture, open_store, windows

LAST = "encoder.layer.1"
SEQUENCES = ["ACGTNACGTA" * 20, "ACG", "GATTACA" * 9 + "N", "T" * 62, "CA" * 70]  # the model takes 64 tokens

run, mistake = partial(commands.run, "extract"), partial(commands.mistake, "extract")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.fasta").write_text("".join(f">s{row}\n{text}\n" for row, text in enumerate(SEQUENCES)))
    return tmp_path


def by_hand(text, size, stride=None, *, skips=False):
    """What the model computes for each position of a text, from windows of it that are run one by one."""
    model, tokenizer = text_models.dna()
    parts = []
    for window in windows([len(text)], size=size - 2, stride=stride):
        with torch.no_grad(), capture(model, LAST, reduce="full") as acts:
            model(**tokenizer([text[window.start : window.stop]], return_tensors="pt"))
        parts.append(acts[LAST][0, window.owns(before=1, after=1, counts_special=not skips)])
    return torch.cat(parts)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "size", "stride", "skips"),
    [
        ([], 64, None, False),
        (["--window", 20, "--stride", 5], 20, 5, False),
        (["--skip-special-tokens", "--max-tokens", 100], 64, None, True),
    ],
)
def test_long_sequences_are_run_in_windows_and_pooled_as_one_row(here, options, size, stride, skips):
    reducers = ["mean", "max", "first", "last", "full"]
    command = ["--model", "text_models:dna", "--input", "x.fasta", "--layers", LAST, "--long", "windows", *options]
    said = run(*command, *(word for name in reducers for word in ("--reduce", name)), "--out", "out").stderr
    long = sum(len(text) + 2 > size for text in SEQUENCES)
    assert f"{long} of 5 rows have more than {size} tokens and are run in overlapping windows." in said
    store = open_store("out")
    assert store.ids == [f"s{row}" for row in range(5)]
    for row, text in enumerate(SEQUENCES):
        whole = by_hand(text, size, stride, skips=skips)
        assert len(whole) == len(text) + (0 if skips else 2)
        close(store[LAST, "full"][row], whole)
        close(store[LAST, "mean"][row], whole.mean(0))
        close(store[LAST, "max"][row], whole.amax(0))
        close(store[LAST, "first"][row], whole[0])
        close(store[LAST, "last"][row], whole[-1])


def test_rows_that_fit_are_those_of_a_run_without_windows(here):
    Path("x.txt").write_text("ACGT\nACGTACGTNN\nGG\n")
    command = ["--model", "text_models:dna", "--input", "x.txt", "--layers", LAST]
    run(*command, "--out", "whole")
    assert "windows" not in run(*command, "--long", "windows", "--out", "out").stderr
    close(open_store("out")[LAST].torch(), open_store("whole")[LAST].torch())


def test_windows_go_on_with_batches_of_another_size(here):
    command = ["--model", "text_models:dna", "--input", "x.fasta", "--layers", LAST, "--long", "windows"]
    command += ["--rows-per-unit", 2, "--out", "out"]
    run(*command, "--batch-size", 3)
    before = open_store("out")[LAST].torch()
    Path("out/shards/00000001.safetensors").unlink()
    assert "(3 from earlier)" in run(*command, "--batch-size", 2).stderr
    close(open_store("out")[LAST].torch(), before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--window", 20], r"--window must be left out without --long windows, got 20\."),
        (["--stride", 20, "--long", "cut"], r"--stride must be left out without --long windows, got 20\."),
        (
            ["--long", "windows", "--window", 9, "--max-length", 9],
            r"--max-length must be left out with --window, got 9\.",
        ),
        (["--long", "windows", "--window", 20, "--stride", 19], r"--stride must be at most .*18"),
        (["--long", "windows", "--window", 2], r"--window must have room for a token of the text, got 2\."),
    ],
)
def test_a_mistake_about_windows_is_one_sentence(here, options, text):
    said = mistake("--model", "text_models:dna", "--input", "x.fasta", "--out", "out", *options)
    assert re.match(text, said), said


def test_rows_that_are_new_in_an_input_are_added(here):
    rows = [{"id": f"r{number}", "text": "ACGT" * (1 + number % 5)} for number in range(12)]
    write = lambda some: Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))  # noqa: E731
    command = ["--model", "text_models:dna", "--input", "x.jsonl", "--id-column", "id", "--layers", LAST]
    write(rows[:7])
    run(*command, "--out", "out")
    write([rows[11], *rows[:7], *rows[7:11]])
    assert "holds another run" in run(*command, "--out", "out", code=2).stderr
    assert "12 rows (7 from earlier)" in run(*command, "--append", "--out", "out").stderr
    run(*command, "--out", "all")
    store, whole = open_store("out"), open_store("all")
    assert sorted(store.ids) == sorted(whole.ids)
    assert store.ids[:7] == [row["id"] for row in rows[:7]]
    for row in rows:
        close(store[LAST][store.row_of(row["id"])], whole[LAST][whole.row_of(row["id"])])
    assert store.verify() == []
