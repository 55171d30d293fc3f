"""Layers combined as one column: right for every reducer, or an error; nothing else is kept."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack, Repeating
from torch import nn

from activation_extractor import (
    MemorySink,
    blocks,
    capture,
    combined,
    extract,
    gradients,
    inputs,
    open_store,
    positions,
    span,
    weighted_mean,
)
from activation_extractor.errors import (
    ArgumentError,
    ArgumentTypeError,
    CombinationError,
    DuplicateLayerError,
    LayerNotFoundError,
    LayerNotRunError,
    OtherRunError,
)
from activation_extractor.reducers._reducers import resolve_reducers

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TOKENS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
NAMES = ["h.0", "h.2", "h.3"]


def norm(activation, mask):
    return activation.norm(dim=-1).amax(1)


REDUCERS = {
    "mean": "mean",
    "first": "first",
    "last": "last",
    "max": "max",
    "ends": positions(0, -1),
    "span": span(0, 2),
    "top": span(0, 2, "max"),
    "weighted": weighted_mean(torch.arange(1.0, 11).reshape(2, 5)),
    "norm": norm,
    "full": "full",
}


def by_hand(values, how):
    return torch.stack(values).mean(0) if how == "mean" else torch.cat(values, -1)


@pytest.mark.parametrize("how", ["mean", "concat"])
@pytest.mark.parametrize("mask", [LEFT, LEFT.flip(1), None])
def test_every_reducer_gives_what_it_gives_of_the_combined_activation(stack, how, mask):
    with capture(stack, {"some": combined(NAMES, how)}, reduce=REDUCERS) as acts:
        stack(TOKENS, mask)
    with capture(stack, NAMES) as plain:
        stack(TOKENS, mask)
    whole = by_hand([plain[name] for name in NAMES], how)
    assert acts.names == ["some"]
    assert set(acts) == {("some", name) for name in REDUCERS}
    for name, reducer in resolve_reducers(REDUCERS).items():
        expected = reducer(whole, None if mask is None else mask.bool())
        assert torch.allclose(acts["some", name], expected, atol=1e-6), name


@settings(deadline=None, max_examples=40)
@given(
    how=st.sampled_from(["mean", "concat"]),
    order=st.permutations([f"h.{number}" for number in range(4)]),
    count=st.integers(1, 4),
    reducers=st.sets(st.sampled_from(sorted(REDUCERS)), min_size=1, max_size=3),
    has_plain=st.booleans(),
    detach=st.booleans(),
    copies=st.booleans(),
    calls=st.sampled_from(["last", "all", "join"]),
)
def test_any_layers_in_any_order_beside_others_under_any_options(
    how, order, count, reducers, has_plain, detach, copies, calls
):
    torch.manual_seed(0)
    model, names = BlockStack().eval(), order[:count]
    chosen = {name: REDUCERS[name] for name in sorted(reducers)}
    layers = [{"some": combined(names, how)}, *(["h.1"] if has_plain else [])]
    with capture(model, layers, reduce=chosen, detach=detach, copy=copies, calls=calls) as acts:
        model(TOKENS, LEFT)
        early = {key: acts[key] for key in acts}
    with capture(model, "h.*") as plain:
        model(TOKENS, LEFT)
    whole = by_hand([plain[name] for name in names], how)
    assert set(acts.names) == {"some", *(["h.1"] if has_plain else [])}
    for name, reducer in resolve_reducers(chosen).items():
        value = acts["some", name]
        value = value[0] if calls == "all" else value
        assert torch.allclose(value, reducer(whole, LEFT.bool()), atol=1e-6), name
        assert value.requires_grad != detach
        before = early[("some", name) if len(chosen) > 1 else "some"]
        assert torch.equal(before[0] if calls == "all" else before, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mean_is_accumulated_in_float32_and_comes_in_the_dtype_of_the_layers(dtype):
    model = nn.Sequential(*(nn.Identity() for _ in range(3)))
    x = torch.full((2, 3, 4), 1.001).to(dtype)
    with capture(model, {"all": combined("*", "mean")}, reduce=["full", "mean"]) as acts:
        model(x)
    assert acts["all", "full"].dtype == acts["all", "mean"].dtype == dtype
    assert torch.equal(acts["all", "full"], x)


def test_integers_have_a_mean_in_float32_and_stay_integers_side_by_side():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.arange(24).reshape(2, 3, 4)
    for reduce in ("full", "first"):
        layers = {"mean": combined("*", "mean"), "both": combined("*", "concat")}
        with capture(model, layers, reduce=reduce) as acts:
            model(x)
        assert acts["mean"].dtype == torch.float32
        assert acts["both"].dtype == torch.int64
        assert torch.equal(acts["mean"].long(), x if reduce == "full" else x[:, 0])


def test_sides_and_names_are_the_selection_s_own(stack):
    x = TOKENS
    layers = {"in": combined(inputs("h.*"), "mean"), "grads": combined(gradients("h.*"), "concat")}
    with capture(stack, [layers, inputs(["h.0", "h.1"])]) as acts:
        stack(x).sum().backward()
    assert acts.names == ["h.0:input", "h.1:input", "in:input", "grads:gradient"]
    assert acts["grads:gradient"].shape == (2, 5, 32)
    with capture(stack, [inputs("h.*"), gradients("h.*")]) as plain:
        stack(x).sum().backward()
    assert torch.allclose(acts["in:input"], torch.stack([plain[f"h.{n}:input"] for n in range(4)]).mean(0))
    assert torch.equal(acts["grads:gradient"], torch.cat([plain[f"h.{n}:gradient"] for n in range(4)], -1))


def test_members_have_no_values_of_their_own_and_what_they_held_is_let_go(stack):
    held = []
    stack.h[2].register_forward_hook(lambda module, args, output: held.append(weakref.ref(output)))
    with capture(stack, {"some": combined("h.*", "mean")}, reduce=["full", "max"]) as acts:
        stack(TOKENS)
    assert acts.nbytes == 2 * 5 * 8 * 4 + 2 * 8 * 4
    for key in [("some[h.0]", "full"), ("some[h.0]", ""), ("some", ""), ("h.0", "full")]:
        assert key not in acts
        with pytest.raises(KeyError):
            acts[key]
    gc.collect()
    assert held[0]() is None


def test_reading_again_gives_the_same_tensor_and_a_new_forward_another(stack):
    with capture(stack, {"some": combined("h.*", "mean")}) as acts:
        stack(TOKENS)
        first = acts["some"]
        assert acts["some"] is first
        stack(TOKENS.flip(1))
        assert not torch.equal(acts["some"], first)
    assert acts["some"] is acts["some"]


def test_the_order_is_that_in_which_values_came(stack):
    layers = [{"early": combined(["h.0", "h.1"], "mean"), "late": combined(["h.3", "h.0"], "concat")}, "h.2", "embed"]
    with capture(stack, layers) as acts:
        stack(TOKENS)
        assert acts.names == ["embed", "early", "h.2", "late"]
    assert acts.names == ["embed", "early", "h.2", "late"]


# -- what cannot be combined ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.conv, self.low = (
            nn.Linear(4, 4),
            nn.Linear(4, 6),
            nn.Conv1d(4, 4, 1),
            nn.Identity(),
        )

    def forward(self, x):
        self.low(x.half())
        return self.wide(self.narrow(x)), self.conv(x)


@pytest.mark.parametrize("reduce", ["full", "mean", "max", norm])
def test_other_shapes_and_dtypes_are_an_error_that_names_the_layers(reduce):
    for names, how, text in [
        (["narrow", "wide"], "mean", r"have one shape, got \(2, 4(, 4)?\) of 'narrow' and \(2, (4, )?6\) of 'wide'"),
        (["narrow", "low"], "mean", "have one dtype, got float32 of 'narrow' and float16 of 'low'"),
        (["low", "narrow"], "concat", "have one dtype, got float16 of 'low' and float32 of 'narrow'"),
    ]:
        model = Mixed()
        with pytest.raises(CombinationError, match=f"The layers combined as 'x' must {text}"):
            with capture(model, {"x": combined(names, how)}, reduce=reduce, sequence_axis={"low": 1}):
                model(torch.rand(2, 4, 4))


def test_layers_of_other_layouts_are_not_taken_for_each_other():
    model = Mixed()
    for how, kind in (("mean", "axis of the sequence"), ("concat", "axis of features")):
        with pytest.raises(CombinationError, match=f"have one {kind}, got "):
            with capture(model, {"x": combined(["narrow", "conv"], how)}):
                model(torch.rand(2, 4, 4))
    with capture(model, {"x": combined(["narrow", "conv"], "concat")}, reduce="mean") as acts:
        model(x := torch.rand(2, 4, 4))  # reduced, each in its own layout
    assert torch.allclose(acts["x"], torch.cat([model.narrow(x).mean(1), model.conv(x).mean(2)], -1), atol=1e-6)


def test_convolutions_go_side_by_side_in_their_channels():
    model = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 5, 3, padding=1))
    x = torch.rand(2, 3, 7)
    with capture(model, {"x": combined("*", "concat")}) as acts:
        model(x)
    assert torch.equal(acts["x"], torch.cat([model[0](x), model(x)], 1))
    images = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1))
    x = torch.rand(2, 3, 6, 6)
    with capture(images, {"x": combined("*", "concat")}, sequence_axis=(2, 3), reduce=["full", "mean", norm]) as acts:
        images(x)
    whole = torch.cat([images[0](x), images(x)], 1)
    assert torch.equal(acts["x", "full"], whole)
    assert torch.allclose(acts["x", "mean"], whole.mean((2, 3)), atol=1e-6)
    assert torch.allclose(acts["x", "norm"], whole.norm(dim=1).flatten(1).amax(1), atol=1e-6)
    with capture(images, {"x": combined("0", "mean")}) as acts:  # a mean needs to know no axes
        images(x)
    assert torch.equal(acts["x"], images[0](x))


def test_layers_with_other_padding_are_not_reduced_as_one():
    config = tf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model, ids = tf.T5Model(config).eval(), torch.tensor([[5, 6, 7], [5, 0, 0]])
    layers, whole = {"x": combined(["encoder.block.0", "decoder.block.0"], "mean")}, torch.ones_like(ids)

    def run(mask):
        with capture(model, layers, reduce=["max", "first"]) as acts:
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=whole)
        return acts

    got = "others in 'decoder.block.0' than in 'encoder.block.0'"
    with pytest.raises(CombinationError, match=f"have the same real positions, got {got}"):
        run(ids != 0)
    assert run(whole.clone())["x", "max"].shape == (2, 8)  # the same ones, in another mask


def test_a_layer_that_did_not_run_is_named_and_may_be_skipped(branching):
    layers = {"x": combined(["first", "second"], "mean")}
    with pytest.raises(LayerNotRunError, match=r"did not run in the step: 'second' \("):
        with capture(branching, layers):
            branching(torch.rand(2, 4))
    with capture(branching, layers, missing="skip") as acts:
        branching(torch.rand(2, 4))
    assert len(acts) == 0
    assert "x" not in acts
    with pytest.raises(KeyError, match="Nothing"):
        acts["x"]


@pytest.fixture
def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both=False):
            return self.second(self.first(x)) if both else self.first(x)

    return Branching()


def test_values_of_two_forwards_are_never_combined(branching):
    with pytest.raises(LayerNotRunError, match="'second'"):
        with capture(branching, {"x": combined(["first", "second"], "mean")}):
            branching(torch.rand(2, 4), both=True)
            branching(torch.rand(2, 4))


def test_a_layer_that_runs_several_times_counts_as_ever():
    model = nn.Sequential(Repeating(), nn.Linear(4, 4))
    x = torch.rand(2, 4)
    layers = {"x": combined(["0.layer", "1"], "concat")}
    with pytest.warns(UserWarning, match="ran several times"), capture(model, layers) as acts:
        y = model(x)
    assert torch.equal(acts["x"], torch.cat([model[0](x), y], -1))
    with pytest.raises(CombinationError, match="run equally often, got 3 calls of '0.layer' and 1 of '1'"):
        with capture(model, layers, calls="all"):
            model(x)


def test_calls_are_combined_one_by_one_or_joined(stack):
    layers = {"x": combined(["h.0", "h.3"], "concat")}

    def run(layers, **options):
        with capture(stack, layers, **options) as acts:
            stack(TOKENS, LEFT)
            stack(TOKENS.flip(0), LEFT)
        return acts

    parts, plain = run(layers, calls="all", reduce=["full", norm]), run(["h.0", "h.3"], calls="all")
    whole = [torch.cat([plain["h.0"][call], plain["h.3"][call]], -1) for call in range(2)]
    assert all(map(torch.equal, parts["x", "full"], whole))
    assert all(map(torch.equal, parts["x", "norm"], [norm(one, None) for one in whole]))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (combined("h.*", "mean"), ArgumentTypeError, "what is combined must have a name of its own"),
        ({"a": combined(combined("h.*", "mean"), "mean")}, ArgumentTypeError, "must have a name of its own"),
        ({"a": combined("g.*", "mean")}, LayerNotFoundError, "No layer matches 'g.*'"),
        ({"a": combined([], "mean")}, ArgumentError, "the layers combined as 'a' must be at least one"),
        ([{"a": combined("h.*", "mean")}, {"a": combined("h.0", "mean")}], DuplicateLayerError, "twice"),
        ([{"h.0": combined("h.*", "mean")}, "h.0"], DuplicateLayerError, "'h.0' for two things, of which one is"),
        ({"a": combined(["h.0", "h.0"], "mean")}, DuplicateLayerError, "twice"),
        ({3: combined("h.*", "mean")}, ArgumentTypeError, "a new name in layers must be a string"),
    ],
)
def test_what_cannot_be_selected_is_refused_at_the_door(stack, wrong, error, text):
    with pytest.raises(error, match=text.replace("*", r"\*")):
        capture(stack, wrong)


def test_how_is_one_of_two_words():
    with pytest.raises(ArgumentError, match="how of combined must be 'mean' or 'concat', got 'sum'"):
        combined("h.*", "sum")


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "concat"])
def test_a_data_set_is_stored_resumed_and_compared(stack, tmp_path, how):
    batches = [{"input_ids": TOKENS, "attention_mask": LEFT}, {"input_ids": TOKENS.flip(0), "attention_mask": LEFT}]
    options = {"reduce": ["full", "max", "mean"], "out": tmp_path / "out", "rows_per_unit": 2, "progress": False}
    layers = {"some": combined(blocks(stack), how)}
    store = extract(stack, batches, [layers, "h.1"], **options)
    assert store.names == ["h.1", "some"]
    with torch.no_grad(), capture(stack, blocks(stack)) as plain:
        stack(TOKENS, LEFT)
    whole = by_hand([plain[name] for name in blocks(stack)], how)
    assert [len(row) for row in store["some", "full"]] == [3, 5, 3, 5]
    assert torch.allclose(store["some", "full"][0], whole[0, 2:])
    assert torch.allclose(store["some", "max"][0], whole[0, 2:].amax(0))
    assert torch.allclose(store["some", "mean"][1], whole[1].mean(0), atol=1e-6)
    extract(stack, batches, [layers, "h.1"], **options)
    for other in (combined(blocks(stack), "mean" if how == "concat" else "concat"), combined(["h.0", "h.1"], how)):
        with pytest.raises(OtherRunError, match="layers|reducers"):
            extract(stack, batches, [{"some": other}, "h.1"], **options)


def test_each_step_of_a_sink_has_its_own(stack):
    sink = MemorySink()
    with capture(stack, {"some": combined("h.*", "mean")}, sink=sink, reduce=["full", "max"]) as acts:
        stack(TOKENS, LEFT)
        first = acts["some", "max"]
        stack(TOKENS.flip(0), LEFT)
        with acts.step():
            stack(TOKENS, LEFT)
    assert torch.equal(sink["some", "max"][:2], first)
    assert torch.equal(sink["some", "max"][4:], first)
    assert len(sink.steps) == 3
    assert torch.equal(acts["some", "max"], first)


def test_stop_early_waits_for_the_last_member(stack):
    ran = []
    stack.h[3].register_forward_hook(lambda *_: ran.append(1))
    with capture(stack, {"x": combined(["h.2", "h.0"], "mean")}, stop_early=True) as acts:
        assert stack(TOKENS) is None
    assert not ran
    assert acts["x"].shape == (2, 5, 8)


def test_under_inference_mode_values_are_ordinary_tensors(stack):
    with torch.inference_mode(), capture(stack, {"x": combined("h.*", "mean")}, reduce=["full", "max"]) as acts:
        stack(TOKENS)
    assert not any(acts["x", name].is_inference() for name in ("full", "max"))
    torch.nn.Linear(8, 1)(acts["x", "full"]).sum().backward()
    assert len(copy.deepcopy(acts)) == 2


def test_a_store_of_a_block_has_the_column_alone(stack, tmp_path):
    with capture(stack, {"x": combined("h.*", "concat")}, reduce="last", sink=tmp_path / "out"):
        stack(TOKENS, LEFT)
    assert open_store(tmp_path / "out").names == ["x"]
    assert open_store(tmp_path / "out")["x"].shape == (2, 32)
