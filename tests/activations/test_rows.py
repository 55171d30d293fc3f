"""The rows of a step are those of its batch, and the rows of joined calls go on from call to call."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers as tf
from torch import nn

from activation_extractor import MemorySink, blocks, capture, extract
from activation_extractor.errors import OtherRunError, SequenceAxisError, StepError
from activation_extractor.reducers._calls import CallArguments

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


class Turned(nn.Module):
    """Its layers have the sequence first, and no module says so."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens).transpose(0, 1)).transpose(0, 1))


class Named(Turned):
    def forward(self, input_ids):
        return super().forward(input_ids)


class Folding(nn.Module):
    """Makes two rows of each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.cat([x, x]))


# -- the rows of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "full"])
def test_a_store_does_not_get_a_row_for_each_time_step(reduce, tmp_path):
    text = f"A step must have the rows of its batch, got 5 in ('layer', '{reduce}') beside 2 in the model's call. "
    with pytest.raises(StepError, match=re.escape(text)):
        extract(Turned(), [{"tokens": IDS}], "layer", reduce=reduce, out=tmp_path / "a")
    store = extract(Turned(), [{"tokens": IDS}], "layer", reduce=reduce, out=tmp_path / "b", sequence_axis={"layer": 0})
    assert store.rows == 2


def test_rows_are_compared_also_in_a_step_of_ones_own():
    model, sink = Turned(), MemorySink()
    with pytest.raises(StepError, match="must have the rows of its batch"):
        with capture(model, "layer", reduce="mean", sink=sink) as acts, acts.step():
            model(IDS)
    with capture(model, ["layer", "head"], reduce="mean", sequence_axis={"layer": 0}, sink=sink) as acts, acts.step():
        model(IDS)
    assert [step.rows for step in sink.steps] == [2]


def test_a_model_that_makes_several_rows_of_one_needs_an_id_for_each():
    model, x, sink = Folding(), torch.randn(3, 4, 8), MemorySink()
    with pytest.raises(StepError, match="ids= if a sample has several rows"):
        with capture(model, "layer", reduce="mean", sink=sink):
            model(x)
    with capture(model, "layer", reduce="mean", sink=sink) as acts, acts.step(ids=range(6)):
        model(x)
    assert sink.steps[0].rows == 6


@pytest.mark.parametrize("sequence_axis", [None, 0])
def test_a_model_with_the_time_first_has_its_rows_second(sequence_axis):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(50, 8), nn.LSTM(8, 8)

        def forward(self, tokens):
            return self.lstm(self.embed(tokens))

    model, sink = Tagger(), MemorySink()
    with capture(model, "lstm", reduce="mean", sink=sink, sequence_axis=sequence_axis):
        model(IDS.T.contiguous())
    assert sink.steps[-1].rows == 2


@pytest.mark.parametrize(
    ("kwargs", "rows", "either"),
    [
        ({"x": torch.ones(3, 4)}, {3}, {3, 4}),
        ({"x": torch.ones(3, 4), "y": torch.ones(2, 4)}, set(), {4}),
        ({"x": torch.ones(3, 4), "position_ids": torch.ones(1, 4), "attention_mask": torch.ones(4, 4)}, {3}, {3, 4}),
        ({"x": torch.ones(3, 4), "prompt": torch.ones(1, 7)}, {3}, {3}),
        ({"x": torch.ones(1, 4)}, {1}, {1, 4}),
        ({"features": {"x": torch.ones(3, 4)}}, {3}, {3, 4}),
        ({"x": torch.ones(3), "n": 3}, set(), set()),
    ],
)
def test_a_call_tells_its_rows_where_its_tensors_agree(kwargs, rows, either):
    call = CallArguments({}, (), kwargs)
    assert call.rows() == rows
    assert call.rows(may_be_second=True) == either


@pytest.mark.parametrize("options", [{}, {"max_bytes": 10**6}, {"calls": "all"}])
def test_without_a_sink_a_sequence_that_comes_first_is_seen_where_the_batch_is_known(options):
    model = Named()
    with pytest.raises(SequenceAxisError, match=r"must have the 2 rows of the batch first, got shape \(5, 2, 8\)"):
        with capture(model, "layer", reduce="mean", **options):
            model(input_ids=IDS)
    for axis in ({"layer": 0}, {"layer": 1}):
        with capture(model, ["layer", "head"], reduce="mean", sequence_axis=axis, **options):
            model(input_ids=IDS)


def test_windows_of_a_batch_are_rows_of_their_own_in_memory():
    config = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    model = tf.SwinModel(config).eval()
    with torch.no_grad(), capture(model, "encoder.layers.0.blocks.0.attention", reduce="mean") as acts:
        model(torch.randn(2, 3, 32, 32))
    (value,) = acts.values()
    assert len(value) == 2 * 16


# -- joined calls -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config).eval()


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    config = tf.BartConfig(**sizes, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None)
    return tf.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rows_that_beam_search_reorders_are_not_joined(gpt2, mode):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    for model, layers in ((gpt2, blocks(gpt2)), (bart(), "model.decoder.layers.0")):
        with pytest.raises(
            StepError, match="must keep its rows in order when calls are joined, got rows of '.*' that beam"
        ):
            with mode(), capture(model, layers, calls="join"):
                model.generate(IDS, num_beams=4, **options)
        for more in ({"num_beams": 1}, {"num_beams": 1, "do_sample": True, "num_return_sequences": 3}):
            with mode(), capture(model, layers, calls="join") as acts:
                model.generate(IDS, **{**options, **more})
                model.generate(IDS, **{**options, **more})
            assert len(acts)
        with mode(), capture(model, layers, calls="all"):
            model.generate(IDS, num_beams=4, **options)


def test_a_layer_that_runs_once_beside_a_beam_search_is_joined():
    model = bart()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad(), capture(model, "model.encoder.layers.0", calls="join", reduce="mean") as acts:
        model.generate(IDS, **options)
    assert acts["model.encoder.layers.0"].shape == (2, 16)


class InParts(nn.Module):
    """Runs its layer on parts of the batch, or of the sequence."""

    def __init__(self, sizes, axis):
        super().__init__()
        self.layer, self.sizes, self.axis = nn.Linear(8, 8), sizes, axis

    def forward(self, x):
        return torch.cat([self.layer(part) for part in x.split(self.sizes, self.axis)], self.axis)


@pytest.mark.parametrize("sizes", [2, 1, 3, [1, 3]])
def test_parts_of_the_batch_are_not_joined_as_if_they_were_parts_of_the_sequence(sizes):
    model, x = InParts(sizes, 0), torch.randn(4, 6, 8)
    for reduce in ("full", "mean"):
        with pytest.raises(
            StepError, match="must hold whole batches when calls are joined, got 'layer' on parts of a batch of 4 rows"
        ):
            with capture(model, "layer", calls="join", reduce=reduce):
                model(x)
    with capture(model, "layer", calls="all") as acts:
        model(x)
    torch.testing.assert_close(torch.cat(acts["layer"]), model(x).detach())


def test_parts_of_the_sequence_are_joined_and_so_are_forwards_of_other_batches():
    model, x = InParts(2, 1), torch.randn(4, 6, 8)
    with capture(model, "layer", calls="join") as acts:
        model(x)
    torch.testing.assert_close(acts["layer"], model(x).detach())
    small = InParts(6, 1)
    with capture(small, "layer", calls="join") as acts:
        small(x)
        small(x)
    assert acts["layer"].shape == (4, 12, 8)


def test_calls_of_different_shapes_are_not_joined_and_the_error_names_the_layer():
    model = nn.Sequential(nn.Linear(8, 8))
    for reduce in ("full", "mean"):
        with capture(model, "0", calls="join", reduce=reduce) as acts:
            model(torch.randn(2, 5, 8))
            model(torch.randn(3, 5, 8))
        message = "must give calls that go on from each other when they are joined, got shapes (2, 5, 8) and (3, 5, 8)"
        with pytest.raises(StepError, match=f"{re.escape(message)} of '0'. Pass calls='all'"):
            acts["0"]
        assert "0" in repr(acts)


@pytest.mark.parametrize("tokens", [6, 2])  # guesses are rejected between forwards, and in the last one alone
def test_positions_that_speculative_decoding_rejects_are_not_joined(gpt2, tokens):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 3}
    with torch.no_grad(), pytest.raises(StepError, match="must keep all positions.*'transformer.h.0' that the cache"):
        with capture(gpt2, "transformer.h.0", calls="join", reduce="mean") as acts:
            gpt2.generate(ids, **options)
        acts["transformer.h.0"]
    sink = MemorySink()
    with torch.no_grad(), pytest.raises(StepError, match="must keep all positions"):
        with capture(gpt2, "transformer.h.0", calls="join", sink=sink) as acts, acts.step():
            gpt2.generate(ids, **options)
    assert not sink.steps


def test_a_cache_that_goes_on_or_is_cropped_after_the_sequence_is_joined(gpt2):
    takes = inspect.signature(gpt2.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
    with torch.no_grad(), capture(gpt2, "transformer.h.0", calls="join") as acts:
        first = gpt2(IDS[:, :2])
        cache = first.get("cache", first.get("past_key_values"))
        gpt2(IDS[:, 2:3], **{name: cache})
        gpt2(IDS[:, 3:4], **{name: cache})
        cache.crop(-3)  # to use the first position again, later
    with torch.no_grad(), capture(gpt2, "transformer.h.0") as whole:
        gpt2(IDS[:, :4])
    torch.testing.assert_close(acts["transformer.h.0"], whole["transformer.h.0"])


def test_an_encoder_has_the_rows_of_its_own_call_beside_a_beam_search():
    model, sink = bart(), MemorySink()
    for mask in ("attention_mask", None):
        with torch.no_grad(), capture(model, "model.encoder.layers.0", reduce="mean", sink=sink, mask=mask) as acts:
            with acts.step():
                model.generate(IDS, max_new_tokens=3, num_beams=4, do_sample=False)
        assert sink.steps[-1].rows == 2


def test_axes_by_pattern_are_part_of_what_a_store_was_made_with(tmp_path):
    model, axes = Turned(), {"layer": 0}
    batches = [{"tokens": IDS}]
    for _ in range(2):
        store = extract(model, batches, ["layer", "head"], reduce="mean", out=tmp_path, sequence_axis=axes)
        assert store.rows == 2
    with pytest.raises(OtherRunError, match="sequence_axis"):
        extract(model, batches, ["layer", "head"], reduce="mean", out=tmp_path, sequence_axis={"layer": 1})
