"""The original system's base class: hooks on request, outputs in their own structure."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import count_hooks
from torch import nn

import activation_extractor
from activation_extractor import IntermediateExtractor, IntermediateExtractorBase, capture, inputs
from activation_extractor.errors import ArgumentError, ArgumentTypeError, LayerNotFoundError
from activation_extractor.extractors import intermediateExtractor, intermediateExtractorBase

IMAGES = torch.randn(2, 3, 6, 6)


def test_the_dotted_names_and_the_root_give_the_same_classes():
    assert intermediateExtractorBase.IntermediateExtractorBase is activation_extractor.IntermediateExtractorBase
    assert intermediateExtractor.IntermediateExtractor is activation_extractor.IntermediateExtractor
    assert issubclass(IntermediateExtractor, IntermediateExtractorBase)


def test_outputs_are_those_of_the_layers_by_name(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.0", "h.3"])
    assert extractor.get_outputs() == {}
    extractor.register_hooks()
    result = stack(tokens)
    extractor.detach_hooks()
    assert list(extractor.get_outputs()) == ["h.0", "h.3"]
    assert torch.equal(extractor.get_outputs()["h.3"], result)
    assert torch.equal(extractor.get_outputs()["h.0"], stack.h[0](stack.embed(tokens)))
    assert extractor.get_outputs() is extractor.intermediate_outputs


def test_a_later_call_replaces_the_outputs(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.3"])
    extractor.register_hooks()
    stack(tokens)
    result = stack(tokens[:1])
    extractor.detach_hooks()
    assert torch.equal(extractor.get_outputs()["h.3"], result)


def test_an_output_is_safe_from_the_relu_that_overwrites_it(cnn):
    plain = cnn.norm(cnn.conv(IMAGES))
    extractor = IntermediateExtractorBase(cnn, ["norm", "act"])
    extractor.register_hooks()
    cnn(IMAGES)
    extractor.detach_hooks()
    assert torch.equal(extractor.get_outputs()["norm"], plain)
    assert torch.equal(extractor.get_outputs()["act"], plain.relu())
    assert plain.min() < 0


def test_the_model_computes_the_same_bits_and_gradients_with_hooks(cnn):
    expected = cnn(IMAGES)
    extractor = IntermediateExtractorBase(cnn, ["norm"])
    extractor.register_hooks()
    result = cnn(IMAGES)
    extractor.detach_hooks()
    assert torch.equal(result, expected)
    assert result.requires_grad
    assert not extractor.get_outputs()["norm"].requires_grad


def test_registering_twice_attaches_each_hook_once(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.0", "h.1"])
    extractor.register_hooks()
    extractor.register_hooks()
    assert count_hooks(stack) == 2
    assert len(extractor.hook_handles) == 2


def test_detaching_twice_does_no_harm_and_keeps_foreign_hooks_and_outputs(stack, tokens):
    stack.h[0].register_forward_hook(lambda *_: None)
    extractor = IntermediateExtractorBase(stack, ["h.0", "h.1"])
    extractor.detach_hooks()
    extractor.register_hooks()
    stack(tokens)
    for _ in range(2):
        extractor.detach_hooks()
        assert extractor.hook_handles == []
        assert count_hooks(stack) == 1
    assert list(extractor.get_outputs()) == ["h.0", "h.1"]


def test_hooks_can_be_registered_again_after_detaching(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    extractor.register_hooks()
    extractor.detach_hooks()
    stack(tokens)
    assert extractor.get_outputs() == {}
    extractor.register_hooks()
    stack(tokens)
    assert list(extractor.get_outputs()) == ["h.0"]


def test_a_created_hook_stores_under_the_name_that_it_was_given(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    handle = stack.h[2].register_forward_hook(extractor.create_hook("mine"))
    stack(tokens)
    handle.remove()
    assert list(extractor.get_outputs()) == ["mine"]
    assert count_hooks(stack) == 0


def test_clearing_takes_off_all_forward_hooks_foreign_ones_too(stack, tokens):
    calls = []
    stack.register_forward_hook(lambda *_: calls.append("root"))
    stack.h[1].mlp.register_forward_hook(lambda *_: calls.append("deep"), always_call=True)
    stack.embed.register_forward_hook(lambda *_, **__: calls.append("kwargs"), with_kwargs=True)
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    extractor.register_hooks()
    extractor.clear_all_hooks()
    assert count_hooks(stack) == 0
    assert extractor.hook_handles == []
    stack(tokens)
    assert calls == []
    assert extractor.get_outputs() == {}
    extractor.clear_all_hooks()


def test_clearing_keeps_pre_hooks(stack, tokens):
    calls = []
    stack.h[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    IntermediateExtractorBase(stack, ["h.0"]).clear_all_hooks()
    stack(tokens)
    assert calls == ["pre"]


def test_a_capture_whose_hooks_were_cleared_is_left_without_harm(stack, tokens):
    with capture(stack, "h.0") as acts:
        stack(tokens)
        IntermediateExtractorBase(stack, ["h.0"]).clear_all_hooks()
    assert list(acts) == ["h.0"]
    assert count_hooks(stack) == 0


def test_an_unknown_layer_names_close_matches_and_leaves_no_hook(stack):
    with pytest.raises(
        LayerNotFoundError, match=r"No layer matches 'h\.0\.mpl'\. Close matches: 'h\.0\.mlp'"
    ) as caught:
        IntermediateExtractorBase(stack, ["h.0", "h.0.mpl"])
    assert isinstance(caught.value, LookupError)
    assert count_hooks(stack) == 0
    assert IntermediateExtractorBase(stack, [caught.value.close_matches[0]]).layer_list == ["h.0.mlp"]


def test_no_layers_at_all_is_an_error(stack):
    with pytest.raises(ArgumentError, match=r"layers must select at least one layer, got \[\]"):
        IntermediateExtractorBase(stack, [])


@pytest.mark.parametrize("model", [None, "model", lambda x: x])
def test_a_model_that_is_no_module_is_an_error(model):
    with pytest.raises(ArgumentTypeError, match="model must "):
        IntermediateExtractorBase(model, ["0"])


def test_a_pattern_and_a_single_name_work_as_layer_list(stack):
    assert IntermediateExtractorBase(stack, "h.*").layer_list == ["h.0", "h.1", "h.2", "h.3"]
    assert IntermediateExtractorBase(stack, "h.1").layer_list == ["h.1"]


def test_a_selection_of_inputs_records_inputs_or_is_an_error():
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    try:
        extractor = IntermediateExtractorBase(model, inputs("0"))
    except ArgumentError:
        return
    extractor.register_hooks()
    model(x)
    assert torch.equal(extractor.get_outputs()["0:input"], x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("part", ["", "h.0"])
def test_a_copy_of_the_model_carries_no_hook_and_writes_into_no_output(stack, tokens, copied, part):
    extractor = IntermediateExtractorBase(stack, ["h.0", "h.3"])
    extractor.register_hooks()
    stack(tokens)
    expected = {name: output.clone() for name, output in extractor.get_outputs().items()}
    twin = copied(stack.get_submodule(part))
    assert count_hooks(twin) == 0
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    twin(tokens if part == "" else torch.ones(1, 2, 8))
    assert all(torch.equal(output, expected[name]) for name, output in extractor.get_outputs().items())
    assert count_hooks(stack) == 2
    extractor.detach_hooks()
    assert count_hooks(stack) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_hook_that_a_user_registered_stores_nothing(stack, tokens, copied):
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    handle = stack.h[3].register_forward_hook(extractor.create_hook("mine"))
    stack(tokens)
    output = extractor.get_outputs()["mine"].clone()
    copied(stack)(tokens.flip(0))
    assert torch.equal(extractor.get_outputs()["mine"], output)
    handle.remove()
    assert count_hooks(stack) == 0


def test_a_copy_of_an_extractor_has_hooks_and_outputs_of_its_own(stack, tokens):
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    extractor.register_hooks()
    stack(tokens)
    twin = copy.deepcopy(extractor)
    twin.register_hooks()
    twin.model(tokens.flip(0))
    assert torch.equal(extractor.get_outputs()["h.0"], stack.h[0](stack.embed(tokens)))
    assert torch.equal(twin.get_outputs()["h.0"], stack.h[0](stack.embed(tokens.flip(0))))
    twin.detach_hooks()
    assert count_hooks(twin.model) == 0


def test_hooks_of_others_are_copied_beside_those_of_an_extractor(stack):
    extractor = IntermediateExtractorBase(stack, ["h.0"])
    extractor.register_hooks()
    stack.h[0].register_forward_hook(print)
    with capture(stack, "h.0", missing="skip"):
        assert list(copy.deepcopy(stack).h[0]._forward_hooks.values()) == [print]
    assert list(copy.deepcopy(stack).h[0]._forward_hooks.values()) == [print]
    extractor.detach_hooks()
    assert list(copy.deepcopy(stack).h[0]._forward_hooks.values()) == [print]
