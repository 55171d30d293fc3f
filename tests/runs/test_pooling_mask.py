"""Positions that count for reducers though the model sees more, or fewer, of them."""

from __future__ import annotations

import pytest
import torch
from models import BlockStack

from activation_extractor import extract
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError

TOKENS = torch.tensor([[7, 8, 9, 10], [5, 6, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
INNER = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])


def run(out, **options):
    batch = {"input_ids": TOKENS, "attention_mask": REAL, "inner": INNER}
    reduce = ["mean", "first", "last", "full"]
    return extract(BlockStack().eval(), [batch], "h.*", out=out, reduce=reduce, progress=False, **options)


def test_reducers_and_stores_leave_out_what_the_pooling_mask_leaves_out(tmp_path):
    torch.manual_seed(0)
    store = run(tmp_path / "out", pooling_mask="inner")
    torch.manual_seed(0)
    model = BlockStack().eval()
    whole = model.h[0](model.embed(TOKENS)).detach()
    torch.testing.assert_close(store["h.0", "mean"].torch(), torch.stack([whole[0, 1:3].mean(0), whole[1, 1]]))
    torch.testing.assert_close(store["h.0", "first"].torch(), whole[:, 1])
    torch.testing.assert_close(store["h.0", "last"].torch(), torch.stack([whole[0, 2], whole[1, 1]]))
    assert store["h.0", "full"].lengths().tolist() == [2, 1]
    assert store.manifest["fingerprint"]["mask"] == {"entry": "inner"}


def test_the_model_is_not_given_the_pooling_mask_but_its_own(tmp_path):
    class Telling(BlockStack):
        def forward(self, input_ids, attention_mask):
            seen.append(attention_mask)
            return super().forward(input_ids)

    seen: list[torch.Tensor] = []
    batch = {"input_ids": TOKENS, "attention_mask": REAL, "inner": INNER}
    extract(Telling(), [batch], "h.0", out=tmp_path / "out", reduce="mean", pooling_mask="inner", progress=False)
    assert seen[0] is REAL


def test_each_batch_has_a_pooling_mask_of_its_own(tmp_path):
    model = BlockStack().eval()
    batches = [{"input_ids": TOKENS[:1], "inner": INNER[:1]}, {"input_ids": TOKENS[:1], "inner": 1 - INNER[:1]}]
    store = extract(model, batches, "h.0", out=tmp_path / "out", reduce="mean", pooling_mask="inner", progress=False)
    whole = model.h[0](model.embed(TOKENS[:1])).detach()[0]
    torch.testing.assert_close(store["h.0"].torch(), torch.stack([whole[1:3].mean(0), whole[[0, 3]].mean(0)]))


def test_a_row_without_a_position_that_counts_is_an_error_that_names_it(tmp_path):
    batch = {"input_ids": TOKENS, "inner": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])}
    with pytest.raises(MaskError, match="row 1"):
        extract(BlockStack(), [batch], "h.0", out=tmp_path / "out", reduce="mean", pooling_mask="inner", progress=False)


def test_a_pooling_mask_of_another_shape_is_an_error(tmp_path):
    batch = {"input_ids": TOKENS, "inner": INNER[:, :2]}
    with pytest.raises(MaskError, match=r"must have shape \(2, 4\), got shape \(2, 2\)"):
        extract(BlockStack(), [batch], "h.0", out=tmp_path / "out", reduce="mean", pooling_mask="inner", progress=False)


def test_mask_and_pooling_mask_are_one_too_many(tmp_path):
    with pytest.raises(ArgumentError, match=r"mask must be left out with pooling_mask, got None\."):
        run(tmp_path / "out", pooling_mask="inner", mask=None)
    with pytest.raises(ArgumentTypeError, match=r"pooling_mask must name a field of the batches, got tensor"):
        run(tmp_path / "out", pooling_mask=torch.ones(1))
    with pytest.raises(ArgumentError, match=r"a batch must hold the field 'outer'"):
        run(tmp_path / "out", pooling_mask="outer")


def test_another_pooling_mask_is_another_run(tmp_path):
    torch.manual_seed(0)
    model = BlockStack()
    options = {"out": tmp_path / "out", "reduce": "mean", "pooling_mask": "inner", "progress": False}
    extract(model, [{"input_ids": TOKENS, "inner": INNER}], "h.0", **options)
    with pytest.raises(OSError, match="other inputs"):
        extract(model, [{"input_ids": TOKENS, "inner": REAL}], "h.0", **options)
