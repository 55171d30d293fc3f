"""Rows that a model does not run on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import commands
import pytest
import torch

from activation_extractor import open_store

TEXTS = ["ACDEFGHIKL" * 3, "MKTLLAMKTLLAMKTLLAMK", *["ACDEF"[: 1 + row % 5] for row in range(30)]]
BAD = (7, 8, 25)

run, mistake = partial(commands.run, "extract"), partial(commands.mistake, "extract")
COMMAND = ["--model", "text_models:fragile", "--input", "x.txt", "--layers", "blocks.encoder.layer.1"]
COMMAND += ["--batch-size", 4, "--rows-per-unit", 8, "--out", "out"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(dict.fromkeys(BAD, "AWC"))
    return tmp_path


def write(replaced):
    Path("x.txt").write_text("\n".join(replaced.get(row, text) for row, text in enumerate(TEXTS)))


def listed():
    return [json.loads(line)["place"] for line in Path("bad.jsonl").read_text().splitlines()]


def test_the_first_of_them_is_an_error_that_names_it(here):
    said = run(*COMMAND, code=2).stderr.splitlines()[-1]
    text = "the model must run on line 8, got IndexError: index out of range in self. Remove that row, or pass"
    assert said == f"{text} --skip-bad-rows FILE."


@pytest.mark.parametrize("long", ["cut", "windows"])
def test_they_are_listed_and_left_out_and_the_same_command_goes_on(here, long):
    command = [*COMMAND, "--long", long]
    done = run(*command, "--skip-bad-rows", "bad.jsonl")
    assert done.stderr.endswith("3 rows left out; 'bad.jsonl' lists them.\n")
    assert sorted(listed()) == sorted(f"line {row + 1}" for row in BAD)
    store = open_store("out")
    assert store.rows == len(TEXTS) - 3
    Path("x.txt").write_text("\n".join(text for row, text in enumerate(TEXTS) if row not in BAD))
    run(*COMMAND[:-1], "whole")
    torch.testing.assert_close(
        store["blocks.encoder.layer.1"].torch(),
        open_store("whole")["blocks.encoder.layer.1"].torch(),
        atol=1e-5,
        rtol=1e-5,
    )
    write(dict.fromkeys(BAD, "AWC"))
    assert f"{store.rows} rows ({store.rows} from earlier)" in run(*command, "--skip-bad-rows", "bad.jsonl").stderr
    assert len(listed()) == 3


def test_a_model_that_runs_on_no_row_any_more_keeps_its_own_error(here, monkeypatch):
    import text_models

    make = text_models.fragile

    def broken():
        model, tokenizer = make()
        calls = []

        def count(module, arguments):
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("the device is lost")

        model.register_forward_pre_hook(count)
        return model, tokenizer

    monkeypatch.setattr(text_models, "fragile", broken)
    write({})
    with pytest.raises(AssertionError, match="the device is lost"):
        run(*COMMAND)
