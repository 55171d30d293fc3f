"""Rows as batches for a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sources import source_of
from tiny import tiny_bert, tiny_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaModel

from activation_extractor import length_batches
from activation_extractor.cli import _feed
from activation_extractor.cli._feed import make_feed
from activation_extractor.cli.inputs import open_source
from activation_extractor.errors import ArgumentError

TEXTS = ["MK", "MPTIKQL", "A", "ACDEF"]


def text_feed(texts=TEXTS, ids=None, keep=None, model=None, tokenizer=None, **options):
    rows = source_of("text", texts, ids, keep or {})
    return make_feed(rows, model or tiny_bert(), tokenizer or tiny_tokenizer(), **options)


def test_text_is_batched_by_length_with_its_places_ids_and_columns():
    feed = text_feed(ids=["a", "b", "c", "d"], keep={"n": [1, 2, 3, 4]}, batch_size=2)
    first, second = feed
    assert feed.total_rows == 4
    assert (first["row"], first["id"], first["n"].tolist()) == ([1, 3], ["b", "d"], [2, 4])
    assert (second["row"], second["id"], second["n"].tolist()) == ([0, 2], ["a", "c"], [1, 3])
    assert first["attention_mask"].sum(1).tolist() == [9, 7]
    assert (feed.lengths, feed.positions) == ((3, 9), 23)
    assert feed.options == {"ids": "id", "order": "row", "keep": ["n"]}


def test_batches_are_what_the_tokenizer_makes_of_the_same_texts():
    tokenizer = tiny_tokenizer()
    for batch in text_feed(max_tokens=18):
        expected = tokenizer([TEXTS[row] for row in batch["row"]], padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    plan = [batch["row"] for batch in text_feed(max_tokens=18)]
    assert plan == length_batches([4, 9, 3, 7], max_tokens=18)


def test_going_through_it_again_gives_the_same():
    feed = text_feed(batch_size=3)
    for one, other in zip(feed, feed, strict=True):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def test_rows_are_sorted_within_windows_and_numbered_over_all_of_them():
    feed = text_feed(batch_size=1)
    feed.window_rows = 2
    assert [batch["row"] for batch in feed] == [[1], [0], [3], [2]]


def test_a_window_of_long_rows_has_fewer_of_them(monkeypatch):
    monkeypatch.setattr(_feed, "_WINDOW_TOKENS", 12)
    feed = text_feed(["MK", "MPTIKQL", "A", "ACDEF", "M"], batch_size=8)
    assert [batch["row"] for batch in feed] == [[1, 0], [3, 2, 4]]
    monkeypatch.setattr(_feed, "_SAMPLE_TOKENS", 12)
    assert text_feed(["MKT"] * 3 + ["1"], batch_size=8).notes == []
    assert text_feed(["MKT"] * 3 + ["1"], batch_size=8).positions == 17


def test_the_example_is_the_longest_rows_of_all():
    assert text_feed(batch_size=1).example()["attention_mask"].sum(1).tolist() == [9, 7]
    assert len(text_feed(["MK"]).example()["input_ids"]) == 1
    feed = text_feed(batch_size=1)
    assert feed.batch_of(feed.extremes())["attention_mask"].sum(1).tolist() == [3, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_special_tokens_are_left_out_of_the_pooling_mask_alone(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    model = (
        LlamaModel(LlamaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        if side == "left"
        else None
    )
    (batch,) = text_feed(["ACD", "M"], model=model, tokenizer=tokenizer, batch_size=2, skip_special_tokens=True)
    letters = batch["input_ids"] > 3
    assert torch.equal(batch["pooling_mask"], letters.to(batch["attention_mask"].dtype))
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]
    assert text_feed(["ACD", "M"], batch_size=2, skip_special_tokens=True).positions == 4


def test_long_text_is_cut_with_its_end_token_and_that_is_told():
    feed = text_feed(["A" * 100, "MK"], batch_size=1)
    first, second = feed
    assert first["input_ids"].shape == (1, 64)
    assert first["input_ids"][0, -1] == 3
    assert feed.notes == ["1 of 2 rows have more than 64 tokens and are cut."]
    assert text_feed(["A" * 62], batch_size=1).notes == []
    assert next(iter(text_feed(batch_size=4, max_length=5)))["input_ids"].shape == (4, 5)
    assert second["input_ids"].shape == (1, 4)


def test_arrays_go_to_the_models_first_argument_in_its_dtype():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, signal):
            return self.layer(signal)

    rows = source_of("array", np.arange(10.0).reshape(5, 2))
    first, second = make_feed(rows, Model().to(torch.bfloat16), None, batch_size=3)
    assert first["signal"].dtype == torch.bfloat16
    assert first["signal"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second["signal"].tolist() == [[6, 7], [8, 9]]
    assert make_feed(rows, Model(), None).options == {"keep": []}


def test_a_callable_beside_the_model_makes_batches_of_rows():
    source = source_of("text", TEXTS)
    feed = make_feed(source, nn.Linear(1, 1), lambda texts: torch.tensor([[len(one)] for one in texts]))
    assert next(iter(feed))["input"].tolist() == [[2], [7], [1], [5]]
    named = make_feed(source, nn.Linear(1, 1), lambda texts: {"input": torch.ones(len(texts), 1)})
    assert list(next(iter(named))) == ["input"]
    with pytest.raises(
        ArgumentError, match=r"what the callable beside the model returns must be a mapping or a tensor"
    ):
        next(iter(make_feed(source, nn.Linear(1, 1), lambda texts: texts)))


def test_images_go_through_the_processor_in_colour(tmp_path):
    for index, mode in enumerate(["L", "RGBA", "P"]):
        Image.new(mode, (4, 3)).save(tmp_path / f"{index}.png")

    def process(images):
        assert all(image.mode == "RGB" for image in images)
        return torch.stack([torch.from_numpy(np.asarray(image).copy()).float().mean((0, 1)) for image in images])

    feed = make_feed(open_source(str(tmp_path)), nn.Linear(3, 1), process, batch_size=2)
    assert [batch["id"] for batch in feed] == [["0.png", "1.png"], ["2.png"]]


def test_an_image_that_is_cut_short_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArgumentError, match=r"an image must be whole, got '.*x\.png'\."):
        make_feed(open_source(str(tmp_path)), nn.Linear(3, 1), lambda images: torch.ones(1, 3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 9}, r"max_tokens must be left out where rows have no tokens, got 9\."),
        ({"max_length": 9}, r"max_length must be left out where rows have no tokens"),
        ({"skip_special_tokens": True}, r"skip_special_tokens must be left out where rows have no tokens"),
        ({"batch_size": 0}, r"batch_size must be a positive integer, got 0\."),
    ],
)
def test_options_of_text_are_refused_for_other_rows(options, text):
    with pytest.raises(ArgumentError, match=text):
        make_feed(source_of("array", np.zeros((2, 2))), nn.Linear(2, 2), None, **options)


@pytest.mark.parametrize(
    ("rows", "prepare", "text"),
    [
        (source_of("text", ["a"]), None, r"the model must come with a tokenizer for text, got 'Linear'\."),
        (
            source_of("text", ["a"]),
            SimpleNamespace(model_input_names=["pixel_values"]),
            r"must come with a tokenizer for text",
        ),
        (source_of("image", ["a.png"]), None, r"the model must come with an image processor, got 'Linear'\."),
        (source_of("image", ["a.png"]), tiny_tokenizer(), r"the model must come with an image processor"),
    ],
)
def test_rows_that_the_model_cannot_be_given_are_an_error(rows, prepare, text):
    with pytest.raises(ArgumentError, match=text):
        make_feed(rows, nn.Linear(1, 1), prepare)


def test_text_beyond_the_model_and_text_without_a_token_are_an_error():
    with pytest.raises(
        ArgumentError, match=r"max_length must be from 1 to the 64 tokens that the model takes, got 65\."
    ):
        text_feed(max_length=65)
    with pytest.raises(ArgumentError, match=r"max_tokens must be a positive integer, got 0\."):
        text_feed(max_tokens=0)
    with pytest.raises(ArgumentError, match=r"the text of row 2 must hold a token that counts, got '\[SEP\]'\."):
        text_feed(["A", "[SEP]"], skip_special_tokens=True)


def test_a_kept_column_may_not_stand_for_what_the_model_is_given():
    with pytest.raises(ArgumentError, match="have another name than what the model is given, got 'input_ids'"):
        next(iter(text_feed(keep={"input_ids": [1, 2, 3, 4]})))
    with pytest.raises(ArgumentError, match=r"have another name than what batches hold, got 'row'\. Rename it\."):
        text_feed(keep={"row": [1, 2, 3, 4]})
