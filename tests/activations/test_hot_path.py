"""Hooks that share one function: each layer's own state, errors and early stops, and masks that nothing binds."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
import weakref

import pytest
import torch
from models import BlockStack, Repeating, count_hooks
from pooling import assert_mean_over
from torch import nn

from activation_extractor import MemorySink, capture
from activation_extractor._hooks._taps import Attached
from activation_extractor.errors import LayerNotRunError, MaskError, TransformedCallError, ValueNotFoundError

RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
LEFT = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
ALL = torch.ones(2, 5, dtype=torch.int64)
KINDS = [{}, {"copy": False}, {"reduce": "mean"}, {"reduce": lambda activation, mask: activation[:, 0]}]
EACH_KIND = pytest.mark.parametrize("options", KINDS, ids=["copy", "reference", "ours", "users"])


def mean_of(model, layer, *args, **kwargs):
    """A layer's whole activation and its mean, each by a hook of the fast kind."""
    with torch.no_grad(), capture(model, layer) as whole, capture(model, layer, reduce="mean") as acts:
        model(*args, **kwargs)
    return whole[layer], acts[layer]


@pytest.mark.parametrize("sink", [None, MemorySink()])
def test_a_reduced_layer_that_runs_several_times_warns_once_and_its_last_value_is_kept(sink):
    model, x = Repeating(), torch.randn(2, 3, 4)
    with pytest.warns(UserWarning, match="'layer' ran several times") as caught:
        with torch.no_grad(), capture(model, "layer", reduce="mean", sink=sink) as acts:
            expected = model(x).mean(1)
            assert sink or torch.equal(acts["layer"], expected)
            model(x)
    assert len(caught) == 1
    assert torch.equal(acts["layer"], expected)


@EACH_KIND
def test_a_forward_that_failed_does_not_count_as_the_next_ones_first_call(stack, tokens, options):
    with capture(stack, "h.0", mask=None, **options):
        handle = stack.h[1].register_forward_pre_hook(lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stack(tokens)
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stack(tokens)


@EACH_KIND
def test_a_block_goes_on_after_its_results_were_cleared(stack, tokens, options):
    with capture(stack, "h.*", **options) as acts:
        stack(tokens)
        acts.clear()
        assert (len(acts), acts.nbytes, list(acts)) == (0, 0, [])
        stack(tokens[:1])
        assert [len(acts[name]) for name in acts] == [1] * 4


@EACH_KIND
def test_a_shallow_copy_of_a_layer_and_a_deep_one_of_the_model_record_nothing(stack, tokens, options):
    x = stack.embed(tokens)
    with capture(stack, "h.0", missing="skip", mask=None, **options) as acts:
        copy.copy(stack.h[0])(x)
        twin = copy.deepcopy(stack)
        twin(tokens)
        assert count_hooks(twin) == 0
    assert len(acts) == 0


@EACH_KIND
def test_results_keep_neither_the_model_nor_the_graph(options):
    model, alive = BlockStack(), []

    def watch(module, args, output):
        output.register_hook(lambda gradient: None)
        alive.append(weakref.ref(next(iter(output._backward_hooks.values()))))

    alive.append(weakref.ref(model.h[0]))
    handle = model.h[3].mlp.register_forward_hook(watch)
    with capture(model, "h.*", **options) as acts:
        model(torch.zeros(1, 2, dtype=torch.long))
    handle.remove()
    del model
    assert [one() for one in alive] == [None, None]
    assert not any(acts[name].requires_grad for name in acts)


def test_a_reducer_that_writes_to_what_it_is_given_cannot_spoil_a_gradient():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())  # whose backward needs what it returned

    def overwrite(activation, mask):
        return activation.zero_()[:, 0]

    x = torch.randn(2, 3, 4)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    with capture(model, "1", reduce=["mean", overwrite]):
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


def test_a_reduced_call_inside_a_transform_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TransformedCallError), capture(model, "0", reduce="mean"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(2, 3, 4))


def test_what_is_to_be_reduced_may_be_part_of_a_structure_and_has_to_be_there():
    model, x = nn.Sequential(nn.LSTM(4, 4, batch_first=True)), torch.randn(2, 3, 4)
    with capture(model, "0", reduce="mean") as acts:
        output, _ = model(x)
    torch.testing.assert_close(acts["0"], output.detach().mean(1))
    model[0].forward = lambda x: None
    with pytest.raises(ValueNotFoundError), capture(model, "0", reduce="mean"):
        model(x)


@pytest.mark.parametrize("call", [((), {"ids": 1}), ((1, 2, 3), {}), ((1,), {"input_ids": 2})])
def test_a_wrong_call_raises_the_models_own_error(stack, call):
    args, kwargs = call
    with pytest.raises(TypeError) as bare:
        stack(*args, **kwargs)
    with pytest.raises(TypeError) as caught, capture(stack, "h.0", reduce="mean", sink=MemorySink(), stop_early=True):
        stack(*args, **kwargs)
    assert str(caught.value) == str(bare.value)


@EACH_KIND
def test_the_forward_stops_once_captures_of_each_kind_are_served(stack, tokens, options):
    late = []
    stack.h[3].register_forward_hook(lambda *call: late.append(1))
    for early, other in (("h.0", "h.2"), ("h.2", "h.0")):
        with capture(stack, other, **options) as served, capture(stack, early, stop_early=True, **options) as acts:
            assert stack(tokens) is None
        assert (len(served), len(acts), late) == (1, 1, [])


def test_an_interrupt_between_any_two_calls_of_attaching_leaves_no_hook(stack):
    def interrupted(after):
        left = iter(range(after))

        def count(frame, event, arg):
            if frame.f_code is Attached.add.__code__ and event in ("call", "c_return") and next(left, None) is None:
                raise KeyboardInterrupt

        try:
            sys.setprofile(count)
            with capture(stack, ["h.0", "h.1"], missing="skip"):
                sys.setprofile(None)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    after = 0
    while interrupted(after):
        assert count_hooks(stack) == 0
        after += 1
    assert after >= 4


def test_an_argument_of_any_name_reaches_a_model_that_is_cut_short():
    model = nn.Sequential(nn.Identity())
    model.forward = lambda x, call=None, opened=None, watchers=None: model[0](x)
    with capture(model, "0", stop_early=True):
        model(torch.ones(2), call=1, opened=2, watchers=3)


def test_results_can_be_copied_inside_the_block(stack, tokens):
    with capture(stack, "h.0") as acts:
        stack(tokens)
        twin = copy.deepcopy(acts)
    assert torch.equal(twin["h.0"], acts["h.0"])


def test_a_call_without_a_mask_says_nothing_about_the_next_one_or_about_a_layer_alone(stack, tokens):
    with torch.no_grad(), capture(stack, "h.0", reduce="mean") as acts, capture(stack, "h.0") as whole:
        for mask in (None, RIGHT, None, LEFT):
            stack(tokens, mask)
            assert_mean_over(ALL if mask is None else mask, (whole["h.0"], acts["h.0"]))
    with pytest.raises(LayerNotRunError), capture(stack, "h.0", reduce="mean"):
        with pytest.raises(IndexError):
            stack(torch.tensor([[99]]))
        with pytest.raises(MaskError, match="ran outside of such a call"):
            stack.h[0](torch.zeros(2, 5, 8))


def test_a_model_that_calls_itself_is_masked_by_its_outer_call(tokens):
    class Again(BlockStack):
        def forward(self, input_ids, attention_mask=None, again=True):
            return self(input_ids, again=False) if again else super().forward(input_ids)

    assert_mean_over(LEFT, mean_of(Again().eval(), "h.0", tokens, LEFT))


def test_a_mask_is_found_among_arguments_of_any_form(tokens):
    class Any(BlockStack):
        def forward(self, *args, **kwargs):
            return super().forward(args[0]["input_ids"])

    class Both(BlockStack):
        def forward(self, input_ids, attention_mask, /, **others):
            return super().forward(input_ids)

    features = {"input_ids": tokens, "attention_mask": RIGHT}
    assert_mean_over(RIGHT, mean_of(Any().eval(), "h.0", features, "more"))
    assert_mean_over(RIGHT, mean_of(Both().eval(), "h.0", tokens, RIGHT))
    bound = BlockStack().eval()
    bound.forward = functools.partial(bound.forward, tokens)
    assert_mean_over(RIGHT, mean_of(bound, "h.0", RIGHT))


def test_a_decoders_mask_alone_leaves_the_encoder_without_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Identity(), nn.Identity()

        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return self.encoder(x), self.decoder(x)

    for layer, expected in (("encoder", ALL), ("decoder", LEFT)):
        values = mean_of(Pair(), layer, torch.randn(2, 5, 3), decoder_attention_mask=LEFT)
        assert_mean_over(expected, values)


def test_layers_with_masks_of_their_own_lose_their_own_padding_on_the_way_to_a_sink(stack, tokens):
    sink, masks = MemorySink(), {"h.0": LEFT, "h.1": RIGHT, "h.2": ALL, "h.3": None}
    with capture(stack, "h.*", mask=masks, sink=sink), capture(stack, "h.*") as whole:
        stack(tokens)
    for name, mask in masks.items():
        real = (ALL if mask is None else mask).bool()
        assert all(map(torch.equal, sink[name, "full"], (row[one] for row, one in zip(whole[name], real, strict=True))))


class Takes(BlockStack):
    """Takes a dict, whose mask it makes itself, or what models keep between calls."""

    def forward(self, features, attention_mask=None, *mems, cache=None, options=None):
        if isinstance(features, dict):
            features["attention_mask"], features = RIGHT, features["input_ids"]
        return super().forward(features)


def test_a_mask_that_the_model_adds_to_its_features_counts(tokens):
    assert_mean_over(RIGHT, mean_of(Takes().eval(), "h.0", {"input_ids": tokens}))


def test_whole_activations_in_memory_never_look_into_arguments(tokens):
    class TensorDict(dict):  # tensordict's own has no `in` either
        def __contains__(self, name):
            raise NotImplementedError

    model = Takes()
    with capture(model, "h.0") as acts:
        model(TensorDict(input_ids=tokens))
    assert len(acts) == 1


def test_a_cache_in_star_arguments_is_a_cache(tokens):
    assert_mean_over(RIGHT, mean_of(Takes().eval(), "h.0", tokens, torch.cat([ALL, RIGHT], 1), object()))


def test_a_setting_that_is_called_cache_is_no_cache(tokens):
    with pytest.raises(MaskError, match="must have shape"):
        mean_of(Takes().eval(), "h.0", tokens, torch.cat([ALL, RIGHT], 1), options={"cache": False})


def test_an_additive_mask_is_called_one_also_in_a_cached_step(tokens):
    additive = torch.cat([torch.full((2, 3), -1e4), torch.zeros(2, 5)], 1)
    with pytest.raises(MaskError, match="an additive mask"):
        mean_of(Takes().eval(), "h.0", tokens, additive, cache=object())
