"""Where the sequence is in a layer's activations: read off modules that say it, asked where it is not known."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from activation_extractor import MemorySink, capture, gradients, inputs, outputs
from activation_extractor.errors import ArgumentError, ArgumentTypeError, SequenceAxisError

BATCH, TIME, FEATURES = 3, 7, 4
ROWS = {"batch first": torch.randn(BATCH, TIME, FEATURES), "time first": torch.randn(TIME, BATCH, FEATURES)}


def reduced(model, layer, *args, reduce="mean", **options):
    """What is reduced of a layer, and the whole of it."""
    with capture(model, layer, reduce={"full": "full", "it": reduce}, **options) as acts:
        model(*args)
    (name,) = acts.names
    return acts[name, "it"], acts[name, "full"]


def assert_mean_over(axis, model, layer, *args, **options):
    mean, whole = reduced(model, layer, *args, **options)
    assert whole.dim() == 3
    torch.testing.assert_close(mean, whole.mean(axis))


def assert_asks(model, layer, *args, axis, **options):
    """The error says what to pass, and passing it works."""
    with pytest.raises(SequenceAxisError, match=r"must have a sequence axis that is known") as caught:
        reduced(model, layer, *args, **options)
    advised = eval(re.search(r"sequence_axis=(\{.*?\})", str(caught.value))[1])
    (value,) = advised.values()
    assert value == axis
    assert_mean_over(axis, model, layer, *args, sequence_axis=advised, **options)


# -- modules with batch_first -----------------------------------------------------------------------------------------


def quietly(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs).eval()


RECURRENT = [nn.LSTM, nn.GRU, nn.RNN]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_layer_says_where_its_sequence_is(kind, batch_first):
    x = ROWS["batch first" if batch_first else "time first"]
    made = kind(4, 5, batch_first=batch_first)
    for model, layer in ((made, ""), (nn.Sequential(made), "0")):
        for wanted in (outputs(layer), inputs(layer), outputs(layer, select=0)):
            assert_mean_over(1 if batch_first else 0, model, wanted, x)
        last, whole = reduced(model, layer, x, reduce="last")
        assert torch.equal(last, whole[:, -1] if batch_first else whole[-1])


def test_a_gradient_has_the_layout_of_its_output():
    model = nn.LSTM(4, 5)
    with capture(model, [gradients(""), ""], reduce="mean") as acts:
        (model(ROWS["time first"])[0] * torch.randn(TIME, BATCH, 5)).sum().backward()
    assert acts[":gradient"].shape == acts[""].shape == (BATCH, 5)


@pytest.mark.parametrize("select", [1, lambda output: output[1][0], "hidden"])
def test_a_recurrent_layers_state_is_no_sequence(select):
    class Named(nn.LSTM):
        def forward(self, x):
            out, state = super().forward(x)
            return {"out": out, "hidden": state[0]} if select == "hidden" else (out, state)

    with pytest.raises(SequenceAxisError, match="must have a sequence axis that is known"):
        reduced(Named(4, 5, batch_first=True), outputs("", select=select), ROWS["batch first"])


def transformer_layers(batch_first):
    kwargs = {"dim_feedforward": 8, "batch_first": batch_first}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, **kwargs), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **kwargs), 2)
    return encoder, decoder, nn.Transformer(4, 2, 1, 1, **kwargs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_say_where_their_sequence_is_and_so_for_what_is_in_them(batch_first):
    x = ROWS["batch first" if batch_first else "time first"]
    axis = 1 if batch_first else 0
    encoder, decoder, both = quietly(lambda: nn.ModuleList(transformer_layers(batch_first)))
    for layer in ("", "layers.1", "layers.0.linear1", "layers.0.norm1", "layers.1.dropout2", "layers.0.self_attn"):
        assert_mean_over(axis, encoder, layer, x)
    for layer in ("", "layers.1", "layers.0.linear1", "layers.1.multihead_attn", inputs("layers.0")):
        assert_mean_over(axis, decoder, layer, x, x)
    assert_mean_over(axis, decoder, inputs("", select="memory"), x, x)
    for layer in ("", "encoder", "decoder.layers.0", "encoder.norm", "decoder.layers.0.linear2"):
        assert_mean_over(axis, both, layer, x, x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_weights_are_batch_first_whatever_the_sequence_is(batch_first):
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    x = ROWS["batch first" if batch_first else "time first"]
    assert_mean_over(1, attention, outputs("", select=1), x, x, x)
    assert_mean_over(1 if batch_first else 0, attention, inputs("", select="key"), x, x, x)


def test_one_sample_without_a_batch_is_an_error():
    for model, x in ((nn.LSTM(4, 5), (7, 4)), (nn.Conv1d(4, 5, 3), (4, 9)), (nn.Conv2d(4, 5, 3), (4, 9, 9))):
        for options in ({"reduce": "mean"}, {"sink": MemorySink()}):
            with pytest.raises(SequenceAxisError, match=r"must have shape \(.*, got shape .* Call the model with a"):
                with capture(model, "", **options):
                    model(torch.randn(x))
        with capture(model, "") as acts:
            model(torch.randn(x))
        assert acts[""].dim() == len(x)


# -- layers beside time-first modules ---------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Everything in it has the time first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, tokens):
        return self.blocks[0](self.head(self.lstm(self.embed(tokens))[0]))


@pytest.mark.parametrize("layer", ["embed", "head", ""])
def test_a_layer_beside_a_time_first_module_asks(layer):
    assert_asks(Tagger(), layer, torch.randint(10, (TIME, BATCH)), axis=0)
    assert_mean_over(0, Tagger(), "lstm", torch.randint(10, (TIME, BATCH)))


def test_a_block_around_time_first_attention_asks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x + self.attention(x, x, x)[0])

    model = nn.Sequential(Block(), Block())
    assert_asks(model, "0", ROWS["time first"], axis=0)
    assert_asks(model, "1.norm", ROWS["time first"], axis=0)


def test_a_tower_beside_a_time_first_module_does_not_ask():
    class Captioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            self.decoder = nn.LSTM(4, 4)

        def forward(self, x):
            return self.decoder(self.encoder(x).transpose(0, 1))

    assert_mean_over(1, Captioner(), "encoder.0", ROWS["batch first"])


# -- convolutions over time -------------------------------------------------------------------------------------------

SIGNAL = torch.randn(BATCH, 4, 9)
OVER_TIME = [
    nn.Conv1d(4, 5, 3, padding=1),
    nn.ConvTranspose1d(4, 5, 3),
    nn.LazyConv1d(5, 3),
    nn.BatchNorm1d(4),
    nn.InstanceNorm1d(4),
    nn.GroupNorm(2, 4),
    nn.MaxPool1d(3),
    nn.AvgPool1d(3),
    nn.AdaptiveAvgPool1d(2),
    nn.ReflectionPad1d(1),
    nn.Upsample(scale_factor=2),
    nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.ReLU()),
    nn.Sequential(nn.ReLU(), nn.Conv1d(4, 5, 3)),
    nn.Sequential(nn.Sequential(nn.Conv1d(4, 5, 3), nn.GELU()), nn.Dropout()),
]


@pytest.mark.parametrize("module", OVER_TIME, ids=repr)
def test_a_convolution_over_time_and_its_kin_have_the_time_last(module):
    for wanted in ("", inputs("")):
        assert_mean_over(2, module.eval(), wanted, SIGNAL)
    assert_mean_over(2, nn.Sequential(module, nn.ReLU()).eval(), "1", SIGNAL)
    assert_mean_over(2, nn.Sequential(nn.ReLU(), module).eval(), "0", SIGNAL)


def test_a_mask_is_one_of_the_time_of_a_convolution():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(9, 9, 3, padding=1)

        def forward(self, x, attention_mask=None):
            return self.conv(x)

    mask, model = torch.ones(BATCH, 9, dtype=torch.int64), Model()
    mask[1, 4:] = 0
    with capture(model, "conv", reduce=["full", "mean"]) as acts:
        model(torch.randn(BATCH, 9, 9), attention_mask=mask)
    whole = acts["conv", "full"]
    torch.testing.assert_close(acts["conv", "mean"][1], whole[1, :, :4].mean(1))
    sink = MemorySink()
    with capture(model, "conv", sink=sink):
        model(torch.randn(BATCH, 9, 9), attention_mask=mask)
    assert sink.steps[0].values["conv", "full"].lengths.tolist() == [9, 4, 9]


class Residual(nn.Module):
    """Of convolutions alone, and what it returns could have any layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))


class OwnForward(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_block_of_convolutions_asks_and_so_do_activations_beside_them():
    model = nn.Sequential(Residual(), Residual()).eval()
    assert_asks(model, "0", SIGNAL, axis=2)
    assert_asks(model, "0.act", SIGNAL, axis=2)
    with pytest.raises(SequenceAxisError, match="or 1 where it is"):
        reduced(OwnForward(4, 4, 3), "", SIGNAL.transpose(1, 2))


def test_a_block_with_a_convolution_among_linear_layers_has_the_features_last():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.conv, self.out = nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.conv(self.into(x).transpose(1, 2)).transpose(1, 2))

    for layer in ("", "into", "out"):
        assert_mean_over(1, Mixer(), layer, ROWS["batch first"])
    assert_mean_over(2, Mixer(), "conv", ROWS["batch first"])


# -- sequence_axis= ---------------------------------------------------------------------------------------------------


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


@pytest.mark.parametrize("sink", [None, MemorySink()])
def test_convolutions_and_their_head_are_captured_together(sink):
    model, x = Images(), torch.randn(BATCH, 3, 8, 8)
    axes = {"conv*": (2, 3), "fc": None}
    with capture(model, "*", reduce=["mean", "last", "max"], sequence_axis=axes, sink=sink) as acts:
        logits = model(x)
    for reducer in ("mean", "last", "max"):
        assert torch.equal(acts["fc", reducer], logits)
        assert acts["conv2", reducer].shape == (BATCH, 4)
    with capture(model, "conv1") as whole:
        model(x)
    torch.testing.assert_close(acts["conv1", "mean"], whole["conv1"].mean((2, 3)))


def test_the_first_pattern_counts_and_other_layers_are_as_by_default():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    model[1].forward = lambda value: value[0]
    x = ROWS["time first"]
    assert_mean_over(2, model, "0", x, sequence_axis={"0": 2, "*": 1})
    assert_mean_over(0, model, "0", x, sequence_axis={"1": 2})
    for axis in (1, {"**": 1}, {"*": -2}):
        assert_mean_over(1, model, "0", x, sequence_axis=axis)


@pytest.mark.parametrize(
    ("axis", "kind", "text"),
    [
        ({"cnov*": 1}, ArgumentError, "a pattern in sequence_axis must match a layer of the model, got 'cnov*'."),
        ({3: 1}, ArgumentTypeError, "sequence_axis must map layer patterns to integers, tuples of integers or None"),
        ({"fc": {"x": 1}}, ArgumentTypeError, "sequence_axis must map layer patterns to integers"),
        ({"fc": "1"}, ArgumentTypeError, "sequence_axis must be an integer or a tuple of integers, got '1'."),
    ],
)
def test_a_pattern_is_checked_at_the_door(axis, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        capture(Images(), "*", sequence_axis=axis)


@pytest.mark.parametrize("axis", [(2, 3), {"conv*": (2, 3)}, {"fc": None}])
def test_calls_are_joined_along_one_axis(axis):
    with pytest.raises(ArgumentError, match="must name one axis with calls='join'"):
        capture(Images(), "*", calls="join", sequence_axis=axis)


def test_calls_of_a_time_first_layer_are_joined_in_time():
    model = nn.LSTM(4, 4)
    with capture(model, "", calls="join", reduce=["full", "mean"]) as acts:
        model(torch.randn(5, BATCH, 4))
        model(torch.randn(2, BATCH, 4))
    assert acts["", "full"].shape == (7, BATCH, 4)
    torch.testing.assert_close(acts["", "mean"], acts["", "full"].mean(0))


def test_a_store_has_a_row_for_each_sample_of_a_time_first_layer():
    sink = MemorySink()
    model = nn.Sequential(nn.GRU(4, 5))
    with capture(model, "0", reduce=["full", "mean"], sink=sink) as acts:
        model(ROWS["time first"])
    (step,) = sink.steps
    assert step.rows == BATCH
    assert step.values["0", "full"].lengths.tolist() == [TIME] * BATCH
    assert acts["0", "mean"].shape == (BATCH, 5)
