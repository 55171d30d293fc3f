"""``import``: hidden states of an inference server become a store."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import mistake, run
from safetensors.torch import save_file

from activation_extractor import open_store


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for row in range(2):
        tensors = {"hidden_states": torch.ones(3, 2, 4), "token_ids": torch.arange(3)}
        save_file(tensors, tmp_path / "in" / f"hs_{row}.safetensors")
    return tmp_path / "in"


def test_it_says_what_was_written_and_verify_finds_it_well(tmp_path, folder):
    done = run("import", folder, "--out", tmp_path / "out", "--layers", "2", "--layers", "last")
    assert done.stdout.startswith(f"Wrote '{tmp_path / 'out'}': 2 rows of 3 columns, ")
    assert open_store(tmp_path / "out").names == ["hidden_states.2", "last", "token_ids"]
    run("verify", tmp_path / "out")


def test_mistakes_are_sentences(tmp_path, folder):
    assert mistake("import", folder, "--out", folder).startswith(
        f"'{folder}' must be a new folder, got one that exists"
    )
    line = mistake("import", folder, "--out", tmp_path / "out", "--layers", "2")
    assert line == "--layers must name each of the 2 layers in a file, got ['hidden_states.2']."
    (folder / "hs_1.safetensors").write_bytes(b"")
    assert "hs_1.safetensors' must be a readable" in mistake("import", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
