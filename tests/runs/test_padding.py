"""What is padding does not count where inputs are compared; everything else does, whatever its mask is called."""

from __future__ import annotations

import pytest
import torch
from small_runs import BATCHES, TOKENS, batch, run, small_model
from torch import nn

from activation_extractor.errors import OtherRunError
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._padding import Padding

pytestmark = pytest.mark.filterwarnings("ignore:.*differ by rounding.*in a batch with others")


def changed(at: tuple[int, int], batches) -> list[dict]:
    tokens = TOKENS.clone()
    tokens[at] = (tokens[at] + 1) % 50
    return [one | {"input_ids": tokens[one["label"]]} for one in batches]


def test_where_every_position_is_real_each_of_them_counts(tmp_path):
    turned = [one | {"attention_mask": ~one["attention_mask"]} for one in BATCHES]  # ones are padding
    run(tmp_path, turned, mask=None)
    run(tmp_path, turned, mask=None)
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, changed((7, 0), turned), mask=None)


def test_positions_that_are_pooled_count_though_the_model_is_told_that_they_are_padding(tmp_path):
    pooled = [one | {"pool": one["attention_mask"]} for one in BATCHES]
    run(tmp_path, pooled, pooling_mask="pool")
    pooled[3]["pool"] = torch.ones_like(pooled[3]["pool"])
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, pooled, pooling_mask="pool")


@pytest.mark.parametrize("mask", ["attention_mask", "decoder_attention_mask"])
def test_inputs_of_a_decoder_are_compared_by_the_decoders_mask(mask):
    padding = Padding(nn.Identity(), mask)

    def digests(ids, decoder_ids, **more):
        masks = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])} | more
        arguments = {"input_ids": ids, "decoder_input_ids": decoder_ids} | masks
        return Batch(arguments, None, None, None, {}).digests(2, padding).tolist()

    ids = torch.arange(6).view(2, 3)
    other = ids.clone()
    other[0, 2] = 9
    assert digests(ids, ids)[0] != digests(ids, other)[0]
    assert digests(ids, ids)[1] == digests(ids, other)[1]
    assert digests(ids, ids) == digests(other, ids)
    of_decoder = {"decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])}
    assert digests(ids, ids, **of_decoder) == digests(other, other, **of_decoder)


def test_masks_whose_ones_are_padding_leave_nothing_out():
    def digests(ids):
        arguments = {"src": ids, "src_key_padding_mask": torch.tensor([[False, False, True]])}
        padding = Padding(nn.Identity(), "src_key_padding_mask")
        return Batch(arguments, None, None, None, {}).digests(1, padding).tolist()

    assert digests(torch.tensor([[1, 2, 0]])) != digests(torch.tensor([[1, 3, 0]]))


def test_padding_of_arguments_without_names_does_not_count_either(tmp_path):
    def positional(one):
        longest = int(one["attention_mask"].sum(1).max())
        return one["input_ids"][:, :longest], one["attention_mask"][:, :longest], one["id"]

    def cut(size):
        return [batch(slice(at, at + size)) for at in range(0, 15, size)]

    options = {"ids": 2, "keep": ()}
    run(tmp_path, map(positional, cut(3)), **options)
    run(tmp_path, map(positional, cut(5)), **options)
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, map(positional, changed((7, 0), cut(5))), model=small_model(), **options)
