"""A value belongs to one forward of the model: the last one of the block, or of its step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from activation_extractor import MemorySink, capture, gradients, inputs, outputs
from activation_extractor.errors import LayerNotRunError, StepError

EACH_KIND = pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"reduce": "max", "sequence_axis": 1, "mask": None},
        {"reduce": lambda activation, mask: activation.sum(1), "sequence_axis": 1, "mask": None},
        {"to": "cpu"},
        {"max_bytes": 2**20},
    ],
    ids=["copy", "reference", "ours", "users", "to", "max_bytes"],
)
X, Y = torch.randn(5, 4), torch.randn(2, 4)


class Net(nn.Module):
    """Two layers and a head, which a forward may skip; `extra` is run by no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, skip=False):
        hidden = self.body(x)
        return hidden if skip else self.head(hidden)


def values(result: torch.Tensor, options) -> torch.Tensor:
    if "reduce" not in options:
        return result
    return result.amax(1) if options["reduce"] == "max" else result.sum(1)


def kept(acts, name):
    return [*acts[name]] if isinstance(acts[name], list) else acts[name]


# -- calls by hand ----------------------------------------------------------------------------------------------------


@EACH_KIND
def test_a_call_by_hand_behind_a_forward_does_not_replace_its_value(options):
    model = Net()
    with capture(model, "head", **options) as acts:
        expected = model(X)
        model.head(Y)
        assert torch.equal(acts["head"], values(expected, options))
    assert torch.equal(acts["head"], values(expected, options))


@EACH_KIND
def test_a_call_by_hand_before_a_forward_is_replaced_by_it(options):
    model = Net()
    with capture(model, "head", **options) as acts:
        model.head(Y)
        expected = model(X)
    assert torch.equal(acts["head"], values(expected, options))


@pytest.mark.parametrize("calls", ["all", "join"])
def test_calls_by_hand_are_no_calls_of_a_layer_that_a_forward_runs(calls):
    model = Net()
    with capture(model, "head", calls=calls, sequence_axis=0) as acts:
        model.head(Y)
        first = model(X)
        model.head(Y)
        second = model(Y)
    expected = [first, second] if calls == "all" else torch.cat([first, second])
    assert all(map(torch.equal, kept(acts, "head"), expected))


def test_inputs_and_parts_follow_the_same_rule():
    model = Net()
    layers = [inputs("head"), outputs({"doubled": "head"}, select=lambda value: value * 2)]
    with capture(model, layers) as acts:
        expected = model(X)
        model.head(Y)
    assert torch.equal(acts["head:input"], model.body(X))
    assert torch.equal(acts["doubled"], expected * 2)


def test_a_gradient_belongs_to_the_forward_and_not_to_a_call_by_hand():
    model = Net()
    with capture(model, gradients("head")) as acts:
        loss = model(X).sum() + model.head(Y).sum() * 3
        loss.backward()
    assert torch.equal(acts["head:gradient"], torch.ones(5, 3))


def test_a_layer_that_is_called_by_hand_alone_did_not_run():
    model = Net()
    with pytest.raises(LayerNotRunError, match="'extra' .called by hand, outside of the model's own forward") as caught:
        with capture(model, ["head", "extra"]) as acts:
            model(X)
            model.extra(X)
            assert acts.names == ["head"]
    assert list(caught.value.reasons) == ["extra"]


def test_parts_that_are_called_alone_count_where_no_forward_runs():
    model = Net()
    with capture(model, ["body", "head"]) as acts:
        model.head(model.body(X))
        expected = model.head(model.body(Y))
    assert torch.equal(acts["head"], expected)
    assert len(acts["body"]) == 2


def test_another_model_that_shares_a_layer_replaces_nothing():
    model = Net()
    other = nn.Sequential(nn.Linear(4, 4), model.head)
    with capture(model, "head") as acts:
        other(Y)
        expected = model(X)
        other(Y)
    assert torch.equal(acts["head"], expected)


def test_a_step_keeps_what_its_forwards_gave_beside_calls_by_hand():
    model, sink = Net(), MemorySink()
    with capture(model, ["head", "body"], sink=sink) as acts:
        with acts.step():
            expected = model(X)
            model(X, skip=True)
            model.head(X)
        with acts.step():
            alone = model.head(model.body(Y))
    assert torch.equal(sink.steps[0].values["head", "full"], expected)
    assert torch.equal(sink.steps[1].values["head", "full"], alone)


# -- layers that the last forward skipped -----------------------------------------------------------------------------


@EACH_KIND
def test_a_layer_that_the_last_forward_skipped_did_not_run(options):
    model = Net()
    text = "'head' .run in an earlier forward of the block, not in the last"
    with pytest.raises(LayerNotRunError, match=text), capture(model, ["body", "head"], **options) as acts:
        model(X)
        assert acts.names == ["body", "head"]
        model(Y, skip=True)
        assert acts.names == ["body"]


def test_a_layer_that_the_last_forward_skipped_may_be_left_out():
    model = Net()
    with capture(model, ["body", "head"], missing="skip") as acts:
        model(X)
        assert len(acts["head"]) == 5
        model(Y, skip=True)
    assert acts.names == ["body"]
    assert "head" not in acts


def test_a_gradient_of_an_earlier_forward_is_not_that_of_the_last():
    model = Net()
    with pytest.raises(LayerNotRunError, match="'head' .run in an earlier forward of the block, not in the last"):
        with capture(model, gradients(["head"])) as acts:
            model(X).sum().backward()
            assert len(acts["head:gradient"]) == 5
            model(Y, skip=True).sum().backward()


def test_a_layer_that_was_replaced_in_the_block_did_not_run():
    model = Net()
    with pytest.raises(LayerNotRunError, match="'head' .another module took its place since the block began"):
        with capture(model, "head") as acts:
            model(X)
            assert len(acts["head"]) == 5
            model.head = nn.Linear(4, 3)
            model(Y)


def test_a_layer_that_was_replaced_behind_the_last_forward_keeps_its_value():
    model = Net()
    with capture(model, "head") as acts:
        expected = model(X)
        model.head = nn.Linear(4, 3)
    assert torch.equal(acts["head"], expected)


def test_a_forward_that_failed_leaves_no_value_of_the_one_before():
    model = Net()
    with pytest.raises(LayerNotRunError, match="'head' .run in an earlier forward"), capture(model, "head"):
        model(X)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 7))


# -- forwards that replace others -------------------------------------------------------------------------------------


def test_a_loop_over_batches_in_one_block_says_what_it_loses():
    model = Net()
    text = r"ran 10 times in this block, and the values of 9 of these forwards were replaced before they were read"
    with pytest.warns(UserWarning, match=text) as caught, capture(model, "head") as acts:
        for _ in range(10):
            model(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(acts["head"]) == 5


def test_what_is_read_kept_or_stored_is_not_lost():
    model, read = Net(), []
    with capture(model, "head") as acts, capture(model, "body", calls="all"), capture(model, "body", sink=MemorySink()):
        for _ in range(3):
            model(X)
            read.append(acts["head"])
    assert len({value.data_ptr() for value in read}) == 3


@pytest.mark.filterwarnings("ignore:The model ran")
def test_a_loop_that_fails_is_not_said_to_lose_anything():
    model = Net()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ZeroDivisionError), capture(model, "head"):
        warnings.simplefilter("always")
        model(X)
        model(X)
        raise ZeroDivisionError
    assert not caught


def test_a_forward_that_is_tried_again_is_not_lost():
    model = Net()
    with capture(model, "body") as acts:
        with pytest.raises(RuntimeError):
            model.head.weight.data = model.head.weight.data[:, :2]
            model(X)
        model(X, skip=True)
    assert len(acts["body"]) == 5


# -- models of transformers -------------------------------------------------------------------------------------------


def test_generate_keeps_the_last_token_and_the_encoder_that_it_called_alone():
    sizes = {"d_model": 8, "vocab_size": 20, "max_position_embeddings": 32}
    heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, encoder_ffn_dim=8, decoder_ffn_dim=8)).eval()
    tokens, options = torch.randint(4, 20, (2, 7)), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with capture(model, ["model.encoder.layers.1", "model.decoder.layers.1"]) as acts:
        model.generate(tokens[:1], **options)
        assert len(acts["model.decoder.layers.1"]) == 1
        model.generate(tokens, **options)
    assert acts["model.encoder.layers.1"].shape == (2, 7, 8)
    assert acts["model.decoder.layers.1"].shape == (2, 1, 8)
    with torch.no_grad(), capture(model.model.encoder, "layers.1") as alone:
        model.model.encoder(tokens)
    assert torch.equal(acts["model.encoder.layers.1"], alone["layers.1"])


def test_all_calls_of_a_generation_are_kept():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=32)).eval()
    tokens = torch.randint(4, 20, (2, 5))
    with capture(model, "transformer.h.1", calls="join") as acts:
        model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert acts["transformer.h.1"].shape == (2, 8, 8)


def test_towers_that_are_called_alone_are_kept_each():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = (
        {**small, "vocab_size": 20, "max_position_embeddings": 9},
        {**small, "image_size": 4, "patch_size": 2},
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).eval()
    with capture(model, ["text_model.encoder.layers.0", "vision_model.encoder.layers.0"]) as acts:
        model.get_text_features(torch.randint(0, 20, (3, 6)))
        model.get_image_features(torch.randn(2, 3, 4, 4))
    assert [tuple(value.shape) for value in acts.values()] == [(3, 6, 8), (2, 5, 8)]


def test_what_is_joined_is_joined_again_when_other_calls_count():
    model = Net()
    with capture(model, ["head", gradients("head")], calls="join", sequence_axis=0) as acts:
        model.head(Y)
        assert len(acts["head"]) == 2
        expected = model(Y)
        assert torch.equal(acts["head"], expected)
        expected.sum().backward(retain_graph=True)
        assert torch.equal(acts["head:gradient"], torch.ones(2, 3))
        (expected * 3).sum().backward()
        assert torch.equal(acts["head:gradient"], torch.full((2, 3), 3.0))


@EACH_KIND
def test_a_model_that_is_compiled_in_place_between_two_forwards_is_an_error(options):
    model = Net()
    with pytest.raises(StepError, match="compiled in place since"), capture(model, "head", **options):
        model(X)
        model.compile(backend="eager")
        model(Y)
    model = Net()
    with capture(model, "head", **options) as acts:
        expected = model(X)
        model.compile(backend="eager")
    assert torch.equal(acts["head"], values(expected, options))
