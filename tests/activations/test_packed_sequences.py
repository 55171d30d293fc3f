"""Packed sequences: whole as torch has them, and row by row wherever rows or positions are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from activation_extractor import MemorySink, capture, gradients, inputs, open_store

X, LENGTHS = torch.randn(3, 5, 4), torch.tensor([3, 5, 1])


class Packed(nn.Module):
    def __init__(self, *, batch_first=True):
        super().__init__()
        self.rnn, self.batch_first = nn.LSTM(4, 6, batch_first=batch_first), batch_first

    def forward(self, x, lengths):
        x = x if self.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packed_rows_are_reduced_over_their_own_positions_in_the_order_of_the_batch(batch_first, mode):
    model = Packed(batch_first=batch_first)
    with mode(), capture(model, ["rnn", inputs("rnn")], reduce=["mean", "first", "last", "max"]) as acts:
        whole = model(X, LENGTHS)
    for name, values in (("rnn", whole), ("rnn:input", X)):
        rows = [row[:length] for row, length in zip(values, LENGTHS, strict=True)]
        torch.testing.assert_close(acts[name, "mean"], torch.stack([row.mean(0) for row in rows]))
        torch.testing.assert_close(acts[name, "max"], torch.stack([row.amax(0) for row in rows]))
        assert torch.equal(acts[name, "first"], torch.stack([row[0] for row in rows]))
        assert torch.equal(acts[name, "last"], torch.stack([row[-1] for row in rows]))


def test_packed_rows_are_stored_row_by_row(tmp_path):
    model, sink = Packed(), MemorySink()
    for target in (sink, tmp_path / "out"):
        with torch.no_grad(), capture(model, "rnn", reduce=["full", "mean"], sink=target):
            whole = model(X, LENGTHS)
    assert sink.steps[0].rows == 3
    column = open_store(tmp_path / "out")["rnn", "full"]
    for index, length in enumerate(LENGTHS):
        torch.testing.assert_close(torch.as_tensor(column[index]), whole[index, :length])


def test_without_a_reducer_a_packed_sequence_is_its_data_and_so_are_gradients():
    model = Packed()
    with capture(model, ["rnn", gradients("rnn")]) as acts:
        model(X, LENGTHS).sum().backward()
    data = model.rnn(pack_padded_sequence(X, LENGTHS, batch_first=True, enforce_sorted=False))[0].data
    assert torch.equal(acts["rnn"], data.detach())
    assert torch.equal(acts["rnn:gradient"], torch.ones_like(data))
