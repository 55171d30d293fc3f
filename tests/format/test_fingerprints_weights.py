"""Digests of weights, structure and inputs: they change with every change that could change a value."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from activation_extractor._format import _digests
from activation_extractor._format._digests import tensor_sum
from activation_extractor._format._fingerprints import inputs_crc32, structure_digest, weights_digest


def digest(**tensors: Tensor) -> str:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return weights_digest(module)


def ramp(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(count) % 2 if dtype == torch.bool else torch.arange(count)).to(dtype)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=50)
def test_one_flipped_bit_changes_the_digest(dtype, count, data):
    tensor = ramp(count, dtype)
    before, raw = digest(w=tensor), tensor.view(torch.uint8).numpy()
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(w=tensor) != before


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(2, 40), st.data())
@settings(deadline=None, max_examples=50)
def test_two_swapped_values_change_the_digest(dtype, count, data):
    values = data.draw(st.lists(st.sampled_from([0, 1, 2, -1, 0.5, 3]), min_size=count, max_size=count))
    tensor = torch.tensor(values, dtype=dtype)
    one, other = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    swapped = tensor.clone()
    swapped[one], swapped[other] = tensor[other].clone(), tensor[one].clone()
    assert (digest(w=swapped) == digest(w=tensor)) == torch.equal(swapped, tensor)


CANCELLING = {
    "swap_of_0_and_2": lambda w: w[:, [4, 1, 2, 3, 0, *range(5, 8)]],
    "all_signs": lambda w: -w,
    "signs_of_a_row": lambda w: torch.cat([-w[:1], w[1:]]),
    "signs_of_a_column": lambda w: torch.cat([w[:, :1], -w[:, 1:2], w[:, 2:]], 1),
    "signs_of_another_column": lambda w: torch.cat([w[:, :3], -w[:, 3:4], w[:, 4:]], 1),
    "rows_swapped": lambda w: w.flip(0),
    "columns_swapped": lambda w: w.flip(1),
}


@pytest.mark.parametrize("change", CANCELLING.values(), ids=CANCELLING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_changes_that_a_plain_sum_would_cancel_change_the_digest(dtype, change):
    weights = torch.tensor([[2, 1, 1, 1, 0, 1, 1, 3], [2, 3, 1, 1, 0, 1, 1, 1]], dtype=dtype)
    assert digest(w=change(weights)) != digest(w=weights)


@pytest.mark.parametrize("distance", [2**power for power in range(13)])
def test_a_one_that_moves_changes_the_digest(distance):
    there, here = torch.zeros(2, 4097, dtype=torch.float64)
    there[0], here[distance] = 1, 1
    assert digest(w=there) != digest(w=here)


def test_the_name_dtype_shape_and_order_of_a_tensor_count():
    zeros = torch.zeros(2, 4)
    others = [
        digest(w=zeros),
        digest(v=zeros),
        digest(w=zeros.int()),
        digest(w=zeros.t()),
        digest(w=zeros.flatten()),
        digest(w=zeros, v=torch.zeros(0)),
        digest(w=zeros[:1], v=zeros[1:]),
        digest(w=torch.ones(1), v=torch.zeros(1)),
        digest(w=torch.zeros(1), v=torch.ones(1)),
    ]
    assert len(set(others)) == len(others)


def test_parameters_and_buffers_of_every_module_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = [weights_digest(model)]
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1] += 1
        before.append(weights_digest(model))
    assert len(set(before)) == len(before) == 8


def test_a_digest_is_the_same_for_a_copy_and_leaves_the_model_as_it_was():
    model, twin = nn.Linear(3, 5), nn.Linear(3, 5)
    twin.load_state_dict(model.state_dict())
    before = {name: (one.data_ptr(), one._version) for name, one in model.named_parameters()}
    assert weights_digest(model) == weights_digest(twin)
    assert {name: (one.data_ptr(), one._version) for name, one in model.named_parameters()} == before
    assert len(weights_digest(model)) == 16
    assert int(weights_digest(model), 16) >= 0


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str
)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31])
def test_the_last_of_any_number_of_values_counts(dtype, count):
    tensor = ramp(count, dtype)
    changed = tensor.clone()
    changed.view(torch.uint8)[-1] ^= 1
    assert digest(w=tensor) == digest(w=tensor.clone())
    assert digest(w=changed) != digest(w=tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        ramp(15).reshape(3, 5).t(),
        ramp(20)[1::3],
        ramp(20, torch.uint8)[3:],
        torch.ones(1).expand(9),
        torch.eye(5).to_sparse(),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        nn.Parameter(ramp(5)),
    ],
    ids=["0d", "empty", "transposed", "strided", "offset", "expanded", "sparse", "conjugated", "parameter"],
)
def test_a_tensor_of_any_kind_counts_by_its_values(tensor):
    summed = int(tensor_sum(tensor))
    plain = tensor.detach().to_dense()
    assert summed == int(tensor_sum(plain.resolve_conj().clone(memory_format=torch.contiguous_format)))
    assert not plain.numel() or summed != int(tensor_sum(plain + 1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_that_wraps_others_counts_by_all_of_them(mode):
    packed = nn.Parameter(TwoTensor(ramp(6), ramp(6) + 1))
    same, other = TwoTensor(ramp(6), ramp(6) + 1), TwoTensor(ramp(6), ramp(6) + 2)
    with mode():
        assert digest(w=packed) == digest(w=same)
        assert digest(w=packed) != digest(w=other)
        assert inputs_crc32(same, 0) != inputs_crc32(other, 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_input_counts_by_its_rows(layout):
    def crc(*sizes, more=0.0):
        return inputs_crc32(torch.nested.nested_tensor([ramp(size) + more for size in sizes], layout=layout), 0)

    assert crc(2, 3) == crc(2, 3)
    assert len({crc(2, 3), crc(3, 2), crc(2, 3, more=1.0)}) == 3


def test_tied_weights_count_under_both_names():
    tied, untied = (nn.ModuleDict({name: nn.Linear(3, 3) for name in "ab"}) for _ in range(2))
    tied["b"].weight = tied["a"].weight
    untied.load_state_dict(tied.state_dict())
    assert weights_digest(tied) == weights_digest(untied)
    with torch.no_grad():
        untied["b"].weight[0, 0] += 1
    assert weights_digest(tied) != weights_digest(untied)


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_the_digest_does_not_depend_on_how_much_is_summed_at_once(monkeypatch, rows):
    torch.manual_seed(0)
    tensor = torch.randn(37 * 4)
    monkeypatch.setattr(_digests, "_ROW_WORDS", 8)
    whole = digest(w=tensor)
    monkeypatch.setattr(_digests, "_ROWS_AT_ONCE", rows)
    assert digest(w=tensor) == whole
    assert len({digest(w=tensor.roll(places)) for places in range(37 * 4)}) == 37 * 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: nn.LayerNorm(4, eps=1e-5), lambda: nn.LayerNorm(4, eps=1e-6)),
        (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
        (lambda: nn.Sequential(nn.GELU()), lambda: nn.Sequential(nn.ReLU())),
        (lambda: nn.GELU(), lambda: nn.GELU(approximate="tanh")),
        (lambda: nn.Sequential(nn.Tanh()), lambda: nn.Sequential(nn.Sigmoid())),
        (lambda: nn.MultiheadAttention(8, 2), lambda: nn.MultiheadAttention(8, 4)),
        (lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu")),
        (lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.TransformerEncoderLayer(8, 2, norm_first=True)),
    ],
    ids=["eps", "dropout", "activation", "approximation", "kind", "heads", "activation_function", "norm_first"],
)
def test_what_a_model_is_beside_its_weights_counts(one, other):
    assert structure_digest(one()) == structure_digest(one())
    assert structure_digest(one()) != structure_digest(other())


def configured(**settings: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(to_dict=lambda: settings)
    return model


def test_the_config_of_a_model_counts_but_not_where_it_came_from():
    plain = structure_digest(configured(heads=2))
    assert plain != structure_digest(configured(heads=4))
    assert plain != structure_digest(nn.Linear(2, 2))
    assert plain == structure_digest(configured(heads=2, transformers_version="5", _name_or_path="here"))
    ordered = [structure_digest(configured(**dict(pairs))) for pairs in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])]
    assert ordered[0] == ordered[1]


@pytest.mark.parametrize("config", [{"heads": 2}, SimpleNamespace(heads=2)])
def test_a_config_of_another_kind_is_no_obstacle(config):
    model = nn.Linear(2, 2)
    model.config = config
    assert len(structure_digest(model)) == 16


INPUTS = [
    {"a": torch.zeros(2, 3)},
    {"b": torch.zeros(2, 3)},
    {"a": torch.zeros(3, 2)},
    {"a": torch.zeros(2, 3, dtype=torch.int32)},
    {"a": torch.zeros(2, 3), "b": None},
    {"a": torch.ones(2, 3)},
    {"a": torch.zeros(0, 3)},
    {"a": np.zeros((2, 3), np.float64)},
    {"a": np.zeros((3, 2), np.float64)},
    {"a": np.zeros((2, 3), np.int64)},
    {"a": np.zeros((2, 3), bool)},
    {"a": np.array(["x", "y"])},
    (torch.tensor([1]), torch.tensor([2])),
    (torch.tensor([2]), torch.tensor([1])),
    ["one", "two"],
    ["two", "one"],
    "one",
    {"a": {"b": [1, (2, "x")]}},
    {"a": {"b": [1, (2, "y")]}},
    (1, 23),
    (12, 3),
    [[1], [2, 3]],
    [[1, 2], [3]],
]


def test_every_difference_between_inputs_changes_their_checksum():
    found = [inputs_crc32(value, 0) for value in INPUTS]
    assert found == [inputs_crc32(value, 0) for value in INPUTS]
    same = [(INPUTS[i], INPUTS[found.index(crc)]) for i, crc in enumerate(found) if found.index(crc) != i]
    assert not same


def test_a_checksum_goes_on_from_the_one_before():
    one, two = torch.tensor([1]), torch.tensor([2])
    assert inputs_crc32(two, inputs_crc32(one, 0)) != inputs_crc32(one, inputs_crc32(two, 0))
    assert inputs_crc32(one, inputs_crc32(one, 0)) != inputs_crc32(one, 0)


def test_a_mapping_of_another_class_is_a_mapping():
    assert inputs_crc32(UserDict(a=torch.ones(2)), 0) == inputs_crc32({"a": torch.ones(2)}, 0)


def test_an_array_that_cannot_be_written_to_is_read_like_any_other():
    array = np.arange(5)
    before = inputs_crc32(array, 0)
    array.flags.writeable = False
    assert inputs_crc32(array, 0) == before


def test_an_array_of_objects_counts_by_what_it_holds():
    words = [np.array(["".join(["a", end]), "c"], dtype=object) for end in "bbz"]
    assert inputs_crc32(words[0], 0) == inputs_crc32(words[1], 0) != inputs_crc32(words[2], 0)


@pytest.mark.parametrize("strided", [False, True])
def test_of_a_large_tensor_words_at_equal_distances_count(monkeypatch, strided):
    monkeypatch.setattr(_digests, "_SAMPLE_BYTES", 64)
    tensor = ramp(33 * 8 + 3, torch.uint8)  # 33 words, of which every fourth counts, and 3 bytes behind them
    large = tensor.repeat_interleave(2)[::2] if strided else tensor
    before = inputs_crc32(large, 0)
    for place, counts in ((0, True), (7, True), (32, True), (32 * 8, True), (33 * 8 + 2, True), (8, False)):
        large[place] += 1
        assert (inputs_crc32(large, 0) != before) == counts, place
        large[place] -= 1
    assert inputs_crc32(large[: 8 * 8], 0) != inputs_crc32(large[: 8 * 8].roll(8), 0)
