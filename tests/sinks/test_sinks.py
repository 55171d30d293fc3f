"""Sinks: what `capture` hands them, and what the store sink writes, read back with safetensors itself."""

from __future__ import annotations

import pytest
import torch
from models import count_hooks
from safetensors.torch import load_file
from stores import LEFT, RIGHT, shards

from activation_extractor import MemorySink, Sink, capture
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.sinks import Step


def test_each_forward_is_a_step_and_a_step_block_groups_several(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", reduce="mean", calls="all", sink=sink) as acts:
        stack(tokens)
        with acts.step():
            stack(tokens)
            stack(tokens)
        stack(tokens)
    assert [step.index for step in sink.steps] == [0, 1, 2]
    assert [step.rows for step in sink.steps] == [2, 2, 2]
    assert [len(step.values) for step in sink.steps] == [1, 2, 1]


def test_the_memory_sink_gives_the_rows_of_all_steps(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.*", reduce=["mean", "last"], sink=sink) as acts:
        for ids, batch in ((["a", "b"], tokens), (["c"], tokens[:1])):
            with acts.step(ids=ids, keep={"label": torch.ones(len(ids))}):
                last = stack(batch)
    assert sink.ids == ["a", "b", "c"]
    assert sink["h.3", "mean"].shape == (3, 8)
    assert torch.equal(sink["h.3", "last"][2], last[0, -1])
    assert sink.steps[0].keep["label"].tolist() == [1, 1]
    with pytest.raises(KeyError):
        sink["h.4", "mean"]


@pytest.mark.parametrize("mask", [LEFT, RIGHT, None], ids=["left", "right", "no_mask"])
@pytest.mark.parametrize("place", ["memory", "store"])
def test_whole_activations_keep_the_real_tokens_only(stack, tokens, tmp_path, mask, place):
    sink = MemorySink() if place == "memory" else tmp_path / "out"
    with capture(stack, "h.3", sink=sink):
        result = stack(tokens, attention_mask=mask)
        second = stack(tokens[1:], attention_mask=None)
    expected = [row if mask is None else row[mask[index].bool()] for index, row in enumerate(result)] + [second[0]]
    if place == "memory":
        rows = sink["h.3", "full"]
    else:
        (shard,) = shards(tmp_path / "out")
        entries = load_file(shard)
        assert entries["h.3:full"].shape == (sum(map(len, expected)), 8)
        rows = torch.split(entries["h.3:full"], entries["h.3:full#offsets"].diff().tolist())
    assert len(rows) == 3
    assert all(torch.equal(row, other) for row, other in zip(rows, expected, strict=True))


def test_activations_hold_the_latest_step_as_copies(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.3", reduce="mean", sink=sink) as acts:
        stack(tokens)
        stack(tokens[:1])
        assert acts["h.3"].shape == (1, 8)
        acts["h.3"].zero_()
    assert acts["h.3"].abs().max() > 0
    assert sink["h.3", "mean"].abs().max() > 0


@pytest.mark.parametrize("later", [False, True])
def test_a_sink_of_ones_own_gets_ordinary_tensors_and_is_closed(stack, tokens, later):
    class Log(Sink):
        reads_later = later

        def __init__(self) -> None:
            self.log = []

        def write(self, step: Step) -> None:
            self.log.append(step)

        def close(self) -> None:
            self.log.append("closed")

    sink = Log()
    with capture(stack, "h.3", reduce="mean", sink=sink), torch.inference_mode():
        stack(tokens)
    step, closed = sink.log
    value = step.values["h.3", "mean"]
    assert closed == "closed"
    assert not value.requires_grad
    assert not value.is_inference()


def test_a_sink_that_only_writes_is_enough(stack, tokens):
    class Last(Sink):
        def write(self, step: Step) -> None:
            self.step = step

    sink = Last()
    with capture(stack, "h.0", sink=sink):
        stack(tokens)
    assert sink.step.rows == 2
    with pytest.raises(TypeError, match="abstract"):
        Sink()


def test_an_error_of_the_sink_reaches_the_user_and_leaves_no_hook(stack, tokens):
    class Full(Sink):
        def write(self, step: Step) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), capture(stack, "h.0", sink=Full()):
        stack(tokens)
    assert count_hooks(stack) == 0


def test_closing_that_fails_after_an_error_of_the_body_is_a_note_on_it(stack):
    class Bad(MemorySink):
        def close(self) -> None:
            raise OSError("disk full")

    with pytest.raises(ValueError, match="body") as caught, capture(stack, "h.0", sink=Bad()):
        raise ValueError("body")
    assert "disk full" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="disk full"), capture(stack, "h.0", sink=Bad()):
        pass


def test_ragged_rows_without_a_mask_have_their_full_length(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", sink=sink, mask=None):
        stack(tokens)
    value = sink.steps[0].values["h.0", "full"]
    assert isinstance(value, Ragged)
    assert value.lengths.tolist() == [5, 5]


def test_a_forward_that_raises_is_no_step(stack, tokens, tmp_path):
    sink = MemorySink()
    with capture(stack, "h.0", sink=sink):
        with pytest.raises(IndexError):
            stack(tokens + 1000)
        stack(tokens)
    assert [step.index for step in sink.steps] == [0]


@pytest.mark.parametrize("sink", [3, object(), MemorySink])
def test_a_sink_must_be_a_sink_or_a_path(stack, sink):
    with pytest.raises(ArgumentTypeError, match="sink must be a Sink or a folder's path, got "):
        capture(stack, "h.0", sink=sink)
