"""``activation-extractor layers``: what is in a model, as a table that is right in a pipe too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs it")

from commands import mistake, run

MODELS = """
import torch
from torch import nn
from models import BlockStack

class Example(BlockStack):
    main_input_name = "input_ids"

    @property
    def dummy_inputs(self):
        return {"input_ids": torch.zeros(2, 5, dtype=torch.long)}

def small():
    model = Example(2)
    model.spare = nn.Linear(8, 8)
    return model

def large():
    return Example(20)

def uneven():
    model = Example(20)
    model.h[7] = nn.Linear(8, 8)
    model.h[19] = nn.Identity()
    return model

def bare():
    return BlockStack(1)

def wrong():
    model = Example(1)
    model.forward = lambda input_ids: 1 / 0
    return model

def pair():
    return nn.Sequential(nn.ReLU(), nn.ReLU())

def scripted():
    return nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.ReLU()))
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The name of a module of factories in the current directory."""
    monkeypatch.chdir(tmp_path)
    name = f"layers_{tmp_path.name}"
    Path(f"{name}.py").write_text(MODELS)
    yield name
    sys.modules.pop(name, None)


def test_a_small_model_is_shown_whole(name):
    done = run("layers", f"{name}:small")
    assert done.stderr == ""
    assert done.stdout == (
        f"{name}:small: Example, 648 parameters, 8 layers\n"
        "  name      type       parameters  output       dtype    bytes per row  calls\n"
        "  embed     Embedding         400  (2, 5, 8)    float32            160      1\n"
        "  h.0       Block              88  (2, 5, 8)    float32            160      1\n"
        "  h.0.norm  LayerNorm          16  (2, 5, 8)    float32            160      1\n"
        "  h.0.mlp   Linear             72  (2, 5, 8)    float32            160      1\n"
        "  h.1       Block              88  (2, 5, 8)    float32            160      1\n"
        "  h.1.norm  LayerNorm          16  (2, 5, 8)    float32            160      1\n"
        "  h.1.mlp   Linear             72  (2, 5, 8)    float32            160      1\n"
        f"  spare     Linear             72  did not run{'':30}0\n"
    )


def test_repeated_blocks_of_a_large_model_are_one_line(name):
    lines = run("layers", f"{name}:large").stdout.splitlines()
    assert lines[0].endswith(", 61 layers")
    assert [line.split("  ")[1] for line in lines[2:]] == [
        "embed", "h.0", "h.0.norm", "h.0.mlp", "... 19 more like h.0: 1 to 19"
    ]  # fmt: skip
    assert len(run("layers", f"{name}:large", "--all").stdout.splitlines()) == 63


def test_blocks_that_differ_are_shown(name, monkeypatch):
    monkeypatch.setattr(sys.modules["activation_extractor.cli.commands.layers"], "_MOST_LINES", 10)
    lines = run("layers", f"{name}:uneven").stdout.splitlines()
    assert [line.split("  ")[1] for line in lines[2:]] == [
        "embed", "h.0", "h.0.norm", "h.0.mlp", "... 6 more like h.0: 1 to 6", "h.7",
        "h.8", "h.8.norm", "h.8.mlp", "... 10 more like h.8: 9 to 18", "h.19",
    ]  # fmt: skip


def test_a_line_is_not_replaced_by_another_line(name, monkeypatch):
    monkeypatch.setattr(sys.modules["activation_extractor.cli.commands.layers"], "_MOST_LINES", 1)
    assert [line.split()[0] for line in run("layers", f"{name}:pair").stdout.splitlines()[2:]] == ["0", "1"]


def test_a_pattern_shows_what_it_selects(name):
    done = run("layers", f"{name}:small", "--layers", "h.*", "--layers", "spare")
    assert done.stdout.splitlines()[0].endswith("3 layers selected by 'h.*', 'spare'")
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["h.0", "h.1", "spare"]
    assert "1 layer selected by 'h.1'" in run("layers", f"{name}:small", "--layers", "h.1").stdout


def test_a_pattern_that_selects_nothing_is_the_librarys_own_error(name):
    line = mistake("layers", f"{name}:small", "--layers", "h.00")
    assert line == "No layer matches 'h.00'. Close matches: 'h.0'."


def test_json_holds_every_layer(name):
    done = run("layers", f"{name}:large", "--json")
    content = json.loads(done.stdout)
    assert {key: content[key] for key in ("model", "class", "parameters", "count", "notes")} == {
        "model": f"{name}:large", "class": "Example", "parameters": 2160, "count": 61, "notes": []
    }  # fmt: skip
    assert len(content["layers"]) == 61
    assert content["layers"][1] == {
        "name": "h.0", "type": "Block", "parameters": 88, "calls": 1, "shape": [2, 5, 8], "dtype": "float32",
        "bytes": 320, "bytes_per_row": 160,
    }  # fmt: skip
    spare = json.loads(run("layers", f"{name}:small", "--json", "--layers", "spare").stdout)["layers"][0]
    assert (spare["calls"], spare["shape"], spare["dtype"], spare["bytes"]) == (0, None, None, None)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("bare", "Shapes are left out: there is no example to run this model on."),
        ("wrong", "Shapes are left out: running an example raised ZeroDivisionError: division by zero"),
    ],
)
def test_without_an_example_the_names_are_shown_and_a_sentence_says_why(name, factory, reason):
    done = run("layers", f"{name}:{factory}")
    assert done.stderr == reason + "\n"
    assert done.stdout.splitlines()[1:3] == [
        "  name      type       parameters",
        "  embed     Embedding         400",
    ]
    content = json.loads(run("layers", f"{name}:{factory}", "--json").stdout)
    assert content["notes"] == [reason]
    assert content["layers"][0]["calls"] is content["layers"][0]["shape"] is None


def test_a_model_of_one_layer_is_shown_as_itself():
    done = run("layers", "torch.nn:ReLU")
    assert done.stdout.splitlines()[2].split() == ["(the", "model)", "ReLU", "0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_parts_that_take_no_hooks_are_left_out(name):
    done = run("layers", f"{name}:scripted")
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["0"]


def test_a_folder_with_a_tokenizer_is_run_on_texts_and_random_weights_are_told(tmp_path):
    transformers = pytest.importorskip("transformers", reason="folders are transformers'")
    from bert import bert_config, save, tokenizer

    folder = str(save(transformers.BertForMaskedLM(bert_config()), tmp_path / "bert", tokenizer(pad_token="[PAD]")))
    done = run("layers", folder, "--layers", "encoder.layer.*")
    line = " ".join(done.stdout.splitlines()[2].split())
    assert line == "encoder.layer.0 BertLayer 600 (2, 3, 8) float32 96 1"
    assert done.stderr == (
        "Random numbers stand for what is not among the saved weights: 'pooler.dense.bias', 'pooler.dense.weight'.\n"
    )


def test_an_unknown_model_is_an_error_of_ours(tmp_path):
    assert mistake("layers", tmp_path).startswith("MODEL must be a folder with a config.json")


def test_no_line_is_cut_or_wrapped_and_a_mistyped_factory_is_one_sentence(name):
    Path("wide.py").write_text(
        "from torch import nn\ndef build():\n    return nn.ModuleDict({'a' * 150: nn.Sequential(nn.ReLU())})\n"
    )
    assert run("layers", "wide:build").stdout.splitlines()[2].split() == ["a" * 150, "Sequential", "0"]
    line = mistake("layers", "wide:biuld")
    assert line == "MODEL must name something that 'wide' holds, got 'wide:biuld'. Close matches: 'build'."


def test_help_has_examples_on_lines_of_their_own():
    assert "\n      activation-extractor layers gpt2\n" in run("layers", "--help").stdout
