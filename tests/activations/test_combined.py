"""Layers combined as one column: right for every reducer, or an error; nothing else is kept."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack
from torch import nn

from activation_extractor import (
    capture,
    combined,
    gradients,
    inputs,
    positions,
    span,
    weighted_mean,
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
