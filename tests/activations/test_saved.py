"""Files that `Activations.save` wrote, read again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Repeating
from releases import that_safetensors_reads
from safetensors import SafetensorError, safe_open
from torch import nn

from activation_extractor import capture, compare
from activation_extractor.activations._saved import SavedActivations, saved_entry, saved_key
from activation_extractor.errors import ArgumentError, StoreError

SUFFIXES = ["safetensors", "npz"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.uint64, torch.bool]


def record(model, data, layers="**", **options):
    with capture(model, layers, **options) as acts, torch.no_grad():
        model(data)
    return acts


def saved(acts, folder, suffix="safetensors"):
    acts.save(folder / f"acts.{suffix}")
    return SavedActivations(folder / f"acts.{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_come_back_in_the_order_in_which_their_layers_ran(stack, tokens, tmp_path, suffix):
    acts = record(stack, tokens)
    assert list(acts) != sorted(acts)
    found = saved(acts, tmp_path, suffix)
    assert list(found) == [(name, None) for name in acts]
    assert len(found) == len(acts) == 13
    for name in acts:
        assert torch.equal(found[name, None], acts[name])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_what_is_read_is_new_memory_each_time(stack, tokens, tmp_path, suffix):
    acts = record(stack, tokens, "h.0")
    found = saved(acts, tmp_path, suffix)
    found["h.0", None].zero_()
    assert torch.equal(found["h.0", None], acts["h.0"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_several_reducers_are_told_apart(stack, tokens, tmp_path, suffix):
    acts = record(stack, tokens, ["h.1", "h.0"], reduce=["mean", "last"])
    found = saved(acts, tmp_path, suffix)
    assert list(found) == list(acts) == [(name, one) for name in ("h.0", "h.1") for one in ("mean", "last")]
    assert all(torch.equal(found[key], acts[key]) for key in acts)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_call_is_a_value_by_itself(tmp_path, suffix):
    acts = record(Repeating(), torch.randn(2, 4), "layer", calls="all")
    found = saved(acts, tmp_path, suffix)
    assert list(found) == [(f"layer#{call}", None) for call in range(3)]
    assert all(torch.equal(found[f"layer#{call}", None], acts["layer"][call]) for call in range(3))
    assert compare(acts, found, rtol=0, atol=0).ok


def test_a_safetensors_file_tells_its_order_in_its_metadata(stack, tokens, tmp_path):
    acts = record(stack, tokens, reduce=["mean", "last"])
    acts.save(tmp_path / "acts.safetensors")
    with safe_open(tmp_path / "acts.safetensors", framework="np") as file:
        order = json.loads(file.metadata()["order"])
        assert order == [f"{name}:{reducer}" for name, reducer in acts]
        assert sorted(order) == sorted(file.keys())
        for entry, key in zip(order, acts, strict=True):
            assert np.array_equal(file.get_tensor(entry), acts[key].numpy())


@pytest.mark.parametrize("dtype", that_safetensors_reads(DTYPES), ids=str)
def test_safetensors_keeps_a_dtype_and_npz_as_far_as_numpy_has_it(tmp_path, dtype):
    model, value = nn.Sequential(nn.Identity()), torch.tensor([[0, 1], [1, 0]]).to(dtype)
    acts = record(model, value, "0")
    assert saved(acts, tmp_path)["0", None].dtype == dtype
    has_none = dtype in (torch.bfloat16, torch.float8_e4m3fn)
    assert saved(acts, tmp_path, "npz")["0", None].dtype == (torch.float32 if has_none else dtype)
    for suffix in SUFFIXES:
        assert compare(acts, SavedActivations(tmp_path / f"acts.{suffix}"), rtol=0, atol=0).ok


@pytest.mark.parametrize(
    ("dtype", "release"),
    [(torch.complex64, "0.7"), (torch.float8_e4m3fnuz, "0.8"), (torch.float8_e5m2fnuz, "0.8")],
    ids=str,
)
def test_a_file_that_this_safetensors_is_too_old_for_is_an_error_that_says_which_one_reads_it(
    tmp_path, monkeypatch, dtype, release
):
    def refuse(path, framework):  # as it does
        raise SafetensorError("Error while deserializing header: InvalidHeaderDeserialization")

    acts = record(nn.Sequential(nn.Identity()), torch.ones(2, 3).to(dtype), "0")
    acts.save(tmp_path / "acts.safetensors")
    monkeypatch.setattr("activation_extractor.activations._saved.safe_open", refuse)
    monkeypatch.setattr("safetensors.__version__", "0.6.2")
    with pytest.raises(StoreError) as caught:
        SavedActivations(tmp_path / "acts.safetensors")
    assert str(caught.value).endswith(
        "got Error while deserializing header: InvalidHeaderDeserialization from safetensors 0.6.2. It holds a dtype "
        f"that safetensors reads since {release}: pip install 'safetensors>={release}'"
    )
    monkeypatch.setattr("safetensors.__version__", "0.8.0-rc.1")
    with pytest.raises(StoreError, match=r"Give it a file that Activations\.save wrote"):
        SavedActivations(tmp_path / "acts.safetensors")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)
@given(NAMES, st.none() | NAMES, st.none() | st.integers(0, 10**6))
def test_any_name_comes_back(name, reducer, call):
    expected = name if call is None else f"{name}#{call}"
    entry = saved_entry((name, reducer), call)
    assert saved_key(entry) == (expected, reducer)
    assert not set("/\\\0") & set(entry)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names_come_back_from_a_file(tmp_path, suffix):
    names = ["../x", "a:b", "a#1", "%41", "größe", "a b", ".", "..", "x.npy", "a\nb", '"', "", "__metadata__x"]
    model = nn.Sequential(*(nn.Identity() for _ in names))
    acts = record(model, torch.ones(1, 2), {name: str(index) for index, name in enumerate(names)})
    found = saved(acts, tmp_path, suffix)
    assert list(found) == [(name, None) for name in names]
    assert compare(acts, found).ok


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_compared_with_activations_and_files(stack, tokens, tmp_path, suffix):
    acts = record(stack, tokens, ["h.0.norm", "h.0", "h.1"], reduce=["mean", "last"])
    found = saved(acts, tmp_path, suffix)
    assert compare(acts, found, rtol=0, atol=0).ok
    assert compare(found, found).ok
    with torch.no_grad():
        stack.h[0].norm.bias += 1
    changed = record(stack, tokens, ["h.0.norm", "h.0", "h.1"], reduce=["mean", "last"])
    assert compare(found, changed).first_difference == "h.0.norm"
    assert compare(changed, found).first_difference == "h.0.norm"


def test_a_reducer_that_a_file_does_not_tell_is_that_of_the_block(stack, tokens, tmp_path):
    acts = record(stack, tokens, "h.0", reduce="mean")
    assert [row.reducer for row in compare(saved(acts, tmp_path), acts)] == ["mean"]


def test_an_absent_key_is_a_key_error_and_another_suffix_an_argument_error(stack, tokens, tmp_path):
    found = saved(record(stack, tokens, "h.0"), tmp_path)
    with pytest.raises(KeyError):
        found["h.1", None]
    assert ("h.0", "mean") not in found
    with pytest.raises(ArgumentError, match=r"^path must end in .safetensors or .npz, or be a store, got '.*a.pt'\.$"):
        SavedActivations(tmp_path / "a.pt")
