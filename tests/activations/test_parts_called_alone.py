"""A part that is called alone after a forward has run it, as `generate` calls an encoder: said, and not mixed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from activation_extractor import MemorySink, capture, gradients, inputs
from activation_extractor.errors import LayerNotRunError

TOKENS = torch.tensor([[5, 6, 7, 1], [8, 9, 4, 1]])
LAYERS = ["encoder.block.1", "decoder.block.1"]
ERROR = "'encoder.block.1' .run in an earlier forward of the block and called alone after it, .* a block of its own for"
WARNING = "Layer 'encoder.block.1' was called alone, .* Enter a block of its own for each"
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 8, "d_kv": 4, "num_layers": 2, "num_heads": 2, "d_ff": 8, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def forward(model, tokens=TOKENS):
    model(input_ids=tokens, decoder_input_ids=torch.tensor([[0, 7]] * len(tokens)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, skip=False):
        hidden = self.body(x)
        return hidden if skip else self.head(hidden)


@pytest.mark.parametrize("options", [{}, {"copy": False}, {"reduce": "mean"}, {"to": "cpu"}])
@pytest.mark.parametrize("side", [lambda layers: layers, inputs])
def test_a_forward_and_then_generate_say_that_each_needs_a_block(options, side):
    model = t5()
    if side is inputs:
        options = {**options, "sequence_axis": 1}
    with pytest.raises(LayerNotRunError, match=ERROR), capture(model, side(LAYERS), **options) as acts:
        with torch.no_grad():
            forward(model)
            assert len(acts.names) == 2
            model.generate(TOKENS[:1], **OPTIONS)


def test_what_the_error_advises_works():
    model = t5()
    with torch.no_grad():
        with capture(model, LAYERS) as first:
            forward(model)
        with capture(model, LAYERS) as second:
            model.generate(TOKENS[:1], **OPTIONS)
        with capture(model.encoder, "block.1") as alone:
            model.encoder(TOKENS[:1])
    assert len(first["encoder.block.1"]) == 2
    assert torch.equal(second["encoder.block.1"], alone["block.1"])


@pytest.mark.parametrize("calls", ["all", "join"])
def test_calls_that_are_kept_together_lack_the_one_alone_and_a_warning_says_so(calls):
    model = t5()
    with torch.no_grad(), pytest.warns(UserWarning, match=WARNING) as caught:
        with capture(model, LAYERS, calls=calls):
            forward(model)
            model.generate(TOKENS, **OPTIONS)
            forward(model)
    assert [str(one.filename) for one in caught] == [__file__]


def test_a_step_of_both_is_warned_of_and_steps_of_each_are_not():
    model, sink = t5(), MemorySink()
    with torch.no_grad(), warnings.catch_warnings(), capture(model, LAYERS, sink=sink) as acts:
        warnings.simplefilter("error")
        with acts.step():
            forward(model)
        with acts.step():
            model.generate(TOKENS, **OPTIONS)
        with pytest.warns(UserWarning, match=WARNING) as caught:
            with acts.step():
                forward(model)
                model.generate(TOKENS, **OPTIONS)
        assert [str(one.filename) for one in caught] == [__file__]
    assert len(sink.steps) == 3


@pytest.mark.parametrize("calls", ["last", "all", "join"])
def test_what_belongs_together_is_neither_refused_nor_warned_of(calls):
    model, net, x = t5(), Net(), torch.randn(5, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with capture(model, LAYERS, calls=calls):
            model.generate(TOKENS, **OPTIONS)
        with capture(model, LAYERS, calls=calls) as acts:
            model.generate(TOKENS, **OPTIONS)
            acts[LAYERS[0]], acts[LAYERS[1]]
            forward(model)
        with capture(net, "head", calls=calls, sequence_axis=0) as acts:
            for _ in range(3):
                net(x)
                assert len(acts["head"])
                net.head(net.body(x))
        with capture(net, ["body", "head"], calls=calls, sequence_axis=0, missing="skip") as acts:
            net(x)
            assert len(acts["head"])
            net.body(x)
            net(x, skip=True)
        with capture(net, ["body", "head"], calls="all") as acts:
            net(x)
            net(x, skip=True)


def test_gradients_follow_the_same_rule():
    net, x = Net(), torch.randn(5, 4)
    with pytest.raises(LayerNotRunError, match="'head' .run in an earlier forward of the block and called alone after"):
        with capture(net, gradients("head")) as acts:
            net(x).sum().backward()
            acts["head:gradient"]
            net.head(x).sum().backward()
            net(x, skip=True)
    with pytest.warns(UserWarning, match="Layer 'head' was called alone"), capture(net, gradients("head"), calls="all"):
        net(x).sum().backward()
        net.head(x).sum().backward()
        net(x, skip=True)
