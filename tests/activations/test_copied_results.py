"""Copies and pickles of activations, inside a block and after it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import count_hooks
from torch import nn

from activation_extractor import MemorySink, capture, gradients, inputs
from activation_extractor.errors import ActivationNotFoundError, OverwrittenError, StepError

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda acts: pickle.loads(pickle.dumps(acts))}
OPTIONS = [
    {},
    {"copy": False},
    {"detach": False},
    {"copy": False, "detach": False},
    {"calls": "all"},
    {"calls": "join"},
    {"reduce": ["mean", "max"]},
    {"reduce": {"own": lambda activation, mask: activation[:, 0]}},
    {"mask": lambda layer, activation, mask: mask, "reduce": "mean"},
    {"max_bytes": 10_000},
    {"sink": MemorySink()},
]


def values_of(acts):
    return {key: torch.stack(value) if isinstance(value, list) else value.detach() for key, value in acts.items()}


def assert_equal(acts, expected):
    assert values_of(acts).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in values_of(acts).items())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_holds_what_was_recorded_when_it_was_made_and_no_graph(stack, tokens, copied, options):
    with capture(stack, ["h.1", inputs("h.2")], **options) as acts:
        stack(tokens)
        twin, expected = copied(acts), {key: value.clone() for key, value in values_of(acts).items()}
        stack(tokens.flip(0))
    assert_equal(twin, expected)
    later = copied(acts)
    assert_equal(later, values_of(acts))
    for each in (twin, later):
        assert (each.names, each.reducers, each.pairs) == (acts.names, acts.reducers, acts.pairs)
        assert not any(value.requires_grad for value in each.values() if isinstance(value, torch.Tensor))
    assert repr(later).splitlines()[1:] == repr(acts).splitlines()[1:]  # pickling tensors parts those of one memory
    assert count_hooks(stack) == 0


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_behaves_like_the_activations(stack, tokens, copied, tmp_path):
    with capture(stack, ["h.*", gradients("h.0")]) as acts:
        stack(tokens).sum().backward()
        twin = copied(acts)
        with pytest.raises(StepError, match="a copy of its activations"):
            twin.step()
    assert list(twin) == list(acts)
    assert "h.0" in twin
    with pytest.raises(ActivationNotFoundError, match=r"Close matches: 'h.3'"):
        twin["h.33"]
    twin.save(tmp_path / "twin.safetensors")
    twin.clear()
    assert list(twin) == []
    assert list(acts) == ["h.0", "h.1", "h.2", "h.3", "h.0:gradient"]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_value_that_was_overwritten_is_not_copied(copied):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with capture(model, "*", copy=False) as acts:
        model(torch.ones(2, 4))
        with pytest.raises(OverwrittenError, match="layer '0'"):
            copied(acts)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_copy_and_one_without_values_work(stack, tokens, copied):
    with capture(stack, "h.1") as acts:
        assert list(copied(acts)) == []
        stack(tokens)
    assert torch.equal(copied(copied(acts))["h.1"], acts["h.1"])
