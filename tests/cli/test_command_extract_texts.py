"""``activation-extractor extract`` over texts, beside the same rows through raw transformers."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import commands
import pytest
import text_models
import torch
from tiny import tiny_bert, tiny_tokenizer

from activation_extractor import capture, open_store

LAST = "encoder.layer.1"

run, mistake = partial(commands.run, "extract"), partial(commands.mistake, "extract")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dna.fasta").write_text(">s1\nACGTacgtNN\n>s2\nggatACCA\n>s3\nACGT\n")
    Path("x.txt").write_text("\n".join(["MKTLLA", "A" * 50, "CDEFGHIK"]))
    return tmp_path


def raw(name, texts, layer=LAST, **options):
    """The mean of each text alone, by transformers and torch."""
    model, tokenizer = getattr(text_models, name)()
    rows = []
    for text in texts:
        with torch.no_grad(), capture(model, layer, reduce="full") as acts:
            model(**tokenizer([text], return_tensors="pt", **options))
        rows.append(acts[layer][0].mean(0))
    return torch.stack(rows)


def stored(layer=LAST):
    return open_store("out")[layer].torch()


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_soft_masked_sequences_are_said_to_be_unknown_and_read_in_upper_case_when_asked_for(here):
    command = ["--model", "text_models:dna", "--input", "dna.fasta", "--layers", LAST]
    said = run(*command, "--out", "masked").stderr
    assert "The tokenizer does not know 8 characters in 2 of 3 rows: '[UNK]' stands for them." in said
    assert "--upper reads them in upper case." in said
    said = run(*command, "--upper", "--out", "out").stderr
    assert "does not know" not in said
    close(stored(), raw("dna", ["ACGTACGTNN", "GGATACCA", "ACGT"]))


def test_rows_of_nothing_known_are_counted_and_upper_case_is_offered_only_where_it_helps(here):
    Path("x.txt").write_text("acgt\n123\nACGT1\n")
    said = run("--model", "text_models:dna", "--input", "x.txt", "--layers", LAST, "--out", "out").stderr
    assert "8 characters in 3 of 3 rows: '[UNK]' stands for them. 2 rows of them hold nothing else. --upper" in said
    said = run("--model", "text_models:dna", "--input", "x.txt", "--upper", "--layers", LAST, "--out", "upper").stderr
    assert "4 characters in 2 of 3 rows: '[UNK]' stands for them. 1 row of them hold nothing else.\n" in said


def test_types_of_tokens_reach_the_model(here):
    run("--model", "text_models:typed", "--input", "x.txt", "--layers", LAST, "--out", "out")
    model, tokenizer = tiny_bert(), tiny_tokenizer()
    made = tokenizer(["MKTLLA"], return_tensors="pt")
    with torch.no_grad(), capture(model, LAST, reduce="mean") as acts:
        model(**made, token_type_ids=(made["input_ids"] > 8).long())
    close(stored()[0], acts[LAST][0])


def test_a_row_longer_than_the_positions_that_roberta_can_use_is_cut(here):
    said = run("--model", "text_models:roberta", "--input", "x.txt", "--layers", LAST, "--out", "out").stderr
    assert "1 of 3 rows have more than 32 tokens and are cut." in said
    texts = Path("x.txt").read_text().splitlines()
    close(stored(), raw("roberta", texts, truncation=True, max_length=32))
    command = ["--model", "text_models:roberta", "--input", "x.txt", "--out", "more"]
    assert mistake(*command, "--max-length", 33).startswith("--max-length must be from 1 to the 32 tokens that the")


def test_a_rotary_model_takes_more_tokens_than_it_was_configured_for(here):
    command = ["--model", "text_models:rotary", "--input", "x.txt", "--layers", LAST]
    assert "1 of 3 rows have more than 20 tokens" in run(*command, "--out", "cut").stderr
    assert "are cut" not in run(*command, "--max-length", 52, "--out", "out").stderr
    close(stored(), raw("rotary", Path("x.txt").read_text().splitlines()))


def test_the_length_is_blamed_where_the_model_runs_on_shorter_rows(here):
    command = ["--model", "text_models:short", "--input", "x.txt", "--layers", "h.0", "--out", "out"]
    line = run(*command, "--max-length", 20, code=2).stderr.splitlines()[-1]
    assert re.match(
        r"the model must run on rows of 20 tokens, got '(Index|Runtime)Error: index 1\d is out of bounds", line
    )
    assert line.endswith("It runs on a row of 8 tokens: pass a --max-length below 20.")
    run(*command)


def test_a_long_row_is_an_error_when_asked_for_and_may_be_left_out(here):
    Path("x.jsonl").write_text("".join(json.dumps({"id": n, "text": "A" * n}) + "\n" for n in (3, 80, 5, 90)))
    command = [
        "--model",
        "text_models:dna",
        "--input",
        "x.jsonl",
        "--id-column",
        "id",
        "--long",
        "error",
        "--out",
        "out",
    ]
    said = mistake(*command)
    assert re.match(r"the text of \w+ 2.* must have at most 64 tokens, got 'AAAA", said)
    assert said.endswith("Shorten it, or pass --long windows or --long cut.")
    done = run(*command, "--layers", LAST, "--skip-bad-rows", "bad.jsonl")
    assert done.stderr.endswith("2 rows left out; 'bad.jsonl' lists them.\n")
    assert [json.loads(line)["id"] for line in Path("bad.jsonl").read_text().splitlines()] == [80, 90]
    assert open_store("out").ids == [3, 5]
    close(stored(), raw("dna", ["AAA", "AAAAA"]))


def test_padding_that_a_model_would_see_is_avoided(here):
    Path("x.txt").write_text("MKT\nAC\nDEF\n")
    options = ["--layers", "blocks.encoder.layer.1", "--reduce", "mean", "--reduce", "last", "--out", "out"]
    said = run("--model", "text_models:maskless", "--input", "x.txt", *options).stderr
    assert "Only rows of one length share a batch: the model takes no attention_mask." in said
    model, tokenizer = tiny_bert(), tiny_tokenizer()
    for row, text in enumerate(["MKT", "AC", "DEF"]):
        with torch.no_grad(), capture(model, LAST, reduce=["mean", "last"]) as acts:
            model(**tokenizer([text], return_tensors="pt"))
        for reducer in ("mean", "last"):
            close(open_store("out")["blocks." + LAST, reducer].torch()[row], acts[LAST, reducer][0])


def test_padding_that_changes_what_is_computed_is_said(here):
    command = ["--model", "text_models:heedless", "--input", "x.txt", "--layers", "layer"]
    said = run(*command, "--out", "padded").stderr
    assert "Padding changes what the model computes, by up to " in said
    assert "Padding" not in run(*command, "--batch-size", 1, "--out", "out").stderr
    assert "Padding" not in run("--model", "text_models:typed", "--input", "x.txt", "--out", "typed").stderr


def test_what_is_said_of_the_first_rows_is_said_of_all_at_the_end(here):
    Path("x.txt").write_text("ACGT\n" * 1500 + "acgt\n" * 2)
    said = run("--model", "text_models:dna", "--input", "x.txt", "--layers", LAST, "--out", "out").stderr
    assert "8 characters in 2 of 1,502 rows" in said
    Path("y.txt").write_text("acgt\n" * 1500)
    said = run("--model", "text_models:dna", "--input", "y.txt", "--layers", LAST, "--out", "more").stderr
    assert "4,096 characters in 1,024 of the first 1,024 rows" in said
    assert "6,000 characters in 1,500 of 1,500 rows" in said
