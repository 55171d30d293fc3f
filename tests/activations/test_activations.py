"""The mapping that a block hands out."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from activation_extractor import Activations, capture, open_store
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, StoreError


@pytest.fixture
def acts(stack, tokens) -> Activations:
    with capture(stack, ["h.0", "h.1"]) as recorded:
        stack(tokens)
    return recorded


@pytest.fixture
def pooled(stack, tokens) -> Activations:
    with capture(stack, ["h.0", "h.1"], reduce=["mean", "last"]) as recorded:
        stack(tokens)
    return recorded


def test_with_one_reducer_names_are_the_keys(acts):
    assert list(acts) == ["h.0", "h.1"]
    assert len(acts) == 2
    assert torch.equal(acts["h.0"], acts["h.0", "full"])
    assert "h.0" in acts
    assert "h.9" not in acts
    assert {name: value.shape for name, value in acts.items()} == {"h.0": (2, 5, 8), "h.1": (2, 5, 8)}


def test_with_several_reducers_pairs_are_the_keys(pooled):
    assert list(pooled) == [("h.0", "mean"), ("h.0", "last"), ("h.1", "mean"), ("h.1", "last")]
    assert len(pooled) == 4
    assert torch.equal(pooled["h.0", "LT"], pooled["h.0", "last"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"reduce": "mean"},
        {"reduce": ["mean", "full"]},
        {"calls": "all"},
        {"calls": "join", "reduce": "last"},
        {"to": "cpu"},
    ],
    ids=str,
)
def test_values_come_in_the_order_in_which_layers_ran(stack, tokens, options):
    with capture(stack, ["", "h.1", "h.0", "h.0.mlp", "embed"], **options) as recorded:
        stack(tokens)
    assert recorded.names == ["embed", "h.0.mlp", "h.0", "h.1", ""]
    assert list(dict.fromkeys(name for name, _ in recorded.pairs)) == recorded.names


def test_a_store_keeps_the_order_in_which_layers_ran(stack, tokens, tmp_path):
    with capture(stack, ["h.1", "h.0", "h.0.mlp"], reduce=["mean", "full"], sink=tmp_path / "out"):
        stack(tokens)
    assert open_store(tmp_path / "out").names == ["h.0.mlp", "h.0", "h.1"]


def test_a_layer_that_ran_again_stands_where_its_first_value_came(stack, tokens):
    with capture(stack, "h.[01]") as recorded:
        stack(tokens)
        stack.h[0](torch.ones(1, 2, 8))
    assert list(recorded) == ["h.0", "h.1"]


def test_pairs_tell_the_reducer_also_where_there_is_one(acts, pooled):
    assert acts.pairs == [("h.0", "full"), ("h.1", "full")]
    assert acts.reducers == ["full"]
    assert pooled.pairs == list(pooled)
    assert pooled.reducers == ["mean", "last"]


def test_it_is_read_only(acts):
    with pytest.raises(TypeError):
        acts["h.0"] = torch.zeros(1)


def test_a_wrong_key_is_an_error_that_helps(acts, pooled):
    for mapping, key, text in [
        (acts, "h.00", "Nothing is recorded under 'h.00'. Close matches: 'h.0'."),
        (acts, "zzz", "Nothing is recorded under 'zzz'. There is 'h.0', 'h.1'."),
        (acts, ("h.0", "mean"), "A reducer in a key must be one of 'full', got 'mean'. Ask for it with reduce=."),
        (
            pooled,
            "h.0",
            "A key must say which reducer is meant ('mean', 'last'), got 'h.0'. Write ['h.0', 'mean'].",
        ),
    ]:
        with pytest.raises(ActivationNotFoundError) as caught:
            mapping[key]
        assert str(caught.value) == text
        assert isinstance(caught.value, KeyError)


def test_it_shows_itself_as_a_table(pooled, acts):
    assert repr(pooled) == (
        "Activations: 4 tensors, 256 B\n"
        "  layer  reducer  shape   dtype    device\n"
        "  h.0    mean     (2, 8)  float32  cpu\n"
        "  h.0    last     (2, 8)  float32  cpu\n"
        "  h.1    mean     (2, 8)  float32  cpu\n"
        "  h.1    last     (2, 8)  float32  cpu"
    )
    acts.clear()
    assert repr(acts) == "Activations: 0 tensors, 0 B"


def test_a_notebook_shows_the_same_table(pooled, acts):
    assert pooled._repr_html_().split("\n") == [
        "<table>",
        "<caption>Activations: 4 tensors, 256 B</caption>",
        "<tr><th>layer</th><th>reducer</th><th>shape</th><th>dtype</th><th>device</th></tr>",
        "<tr><td>h.0</td><td>mean</td><td>(2, 8)</td><td>float32</td><td>cpu</td></tr>",
        "<tr><td>h.0</td><td>last</td><td>(2, 8)</td><td>float32</td><td>cpu</td></tr>",
        "<tr><td>h.1</td><td>mean</td><td>(2, 8)</td><td>float32</td><td>cpu</td></tr>",
        "<tr><td>h.1</td><td>last</td><td>(2, 8)</td><td>float32</td><td>cpu</td></tr>",
        "</table>",
    ]
    assert "<tr><td>h.0</td><td>(2, 5, 8)</td><td>float32</td><td>cpu</td></tr>" in acts._repr_html_()


def test_numpy_gives_arrays_by_the_same_keys(acts, stack, tokens):
    arrays = acts.numpy()
    assert list(arrays) == list(acts)
    np.testing.assert_array_equal(arrays["h.0"], acts["h.0"].numpy())
    with capture(stack, "h.0", calls="all") as several:
        stack(tokens)
        stack(tokens)
    assert [array.shape for array in several.numpy()["h.0"]] == [(2, 5, 8)] * 2


def test_numpy_turns_bfloat16_into_float32():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    with torch.inference_mode(), capture(model, "0") as acts:
        model(torch.randn(2, 4).bfloat16())
    array = acts.numpy()["0"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, acts["0"].float().numpy())


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_saving_writes_a_file_that_its_own_library_reads(pooled, acts, tmp_path, suffix):
    for mapping, names in [(acts, ["h.0", "h.1"]), (pooled, ["h.0:mean", "h.0:last", "h.1:mean", "h.1:last"])]:
        path = tmp_path / f"acts.{suffix}"
        mapping.save(path)
        read = safetensors.torch.load_file(path) if suffix == "safetensors" else dict(np.load(path))
        assert sorted(read) == sorted(names)
        for name, key in zip(names, mapping, strict=True):
            np.testing.assert_array_equal(np.asarray(read[name]), mapping[key].numpy())
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saving_keeps_bfloat16_in_safetensors(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    with torch.inference_mode(), capture(model, "0", calls="all") as acts:
        model(torch.randn(2, 4).bfloat16())
        model(torch.randn(2, 4).bfloat16())
    acts.save(tmp_path / "acts.safetensors")
    read = safetensors.torch.load_file(tmp_path / "acts.safetensors")
    assert sorted(read) == ["0#0", "0#1"]
    assert torch.equal(read["0#1"], acts["0"][1])


def test_saving_escapes_names_that_could_be_mistaken(tmp_path):
    model = nn.ModuleDict({"a/b:c#1": nn.Linear(4, 4)})
    with capture(model, {"../x": "a/b:c#1"}) as acts:
        model["a/b:c#1"](torch.randn(2, 4))
    acts.save(tmp_path / "acts.npz")
    assert list(np.load(tmp_path / "acts.npz")) == ["..%2Fx"]


def test_saving_elsewhere_is_a_clear_error(acts, tmp_path):
    with pytest.raises(ArgumentError, match=r"path must end in .safetensors or .npz, got '.*acts.pt'"):
        acts.save(tmp_path / "acts.pt")
    with pytest.raises(StoreError, match="must be writable, got No such file or directory"):
        acts.save(tmp_path / "missing" / "acts.npz")


def test_skipped_layers_are_simply_not_there(stack, tokens):
    stack.spare = nn.Linear(8, 8)
    with capture(stack, ["h.0", "spare"], missing="skip", reduce=["mean", "last"]) as acts:
        stack(tokens)
    assert list(acts) == [("h.0", "mean"), ("h.0", "last")]
    assert len(acts) == 2
