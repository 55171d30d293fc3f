"""Tensors made ordinary, as arrays, and the memory that they keep."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from activation_extractor import capture
from activation_extractor._tensors import as_numpy_has, memory_of, numpy_has, ordinary, to_numpy
from activation_extractor.errors import ArgumentError

A = torch.tensor([1.0, 2.0])


def made_under_inference(make) -> torch.Tensor:
    with torch.inference_mode():
        tensor = make()
    assert tensor.is_inference()
    return tensor


def test_an_ordinary_tensor_stays_itself():
    assert ordinary(A) is A


MAKERS = [
    lambda: torch.arange(6.0),
    lambda: torch.arange(6.0).reshape(2, 3).t(),
    lambda: torch.arange(6.0)[2:5],
    lambda: torch.arange(6.0).reshape(2, 3)[:, 1:],
    lambda: torch.arange(3.0).expand(2, 3),
    lambda: torch.empty(0),
    lambda: torch.empty(2, 0, 3),
    lambda: torch.tensor(4.0),
    lambda: torch.arange(6).reshape(2, 3),
    lambda: torch.ones(2, dtype=torch.bfloat16),
    lambda: torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("make", MAKERS)
def test_an_inference_tensor_becomes_ordinary_in_the_same_memory(make):
    tensor = made_under_inference(make)
    plain = ordinary(tensor)
    assert not plain.is_inference()
    assert torch.equal(plain, tensor)
    assert (plain.dtype, plain.device) == (tensor.dtype, tensor.device)
    assert (plain.stride(), plain.storage_offset()) == (tensor.stride(), tensor.storage_offset())
    assert plain.data_ptr() == tensor.data_ptr()


def test_an_inference_tensor_becomes_usable_by_autograd():
    tensor, weight = made_under_inference(lambda: torch.tensor([2.0])), torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        (weight * tensor).sum()
    plain = ordinary(tensor)
    (weight * plain).sum().backward()
    assert torch.equal(weight.grad, plain)
    plain.add_(1)


def test_a_tensor_becomes_ordinary_also_while_inference_mode_is_on():
    with torch.inference_mode():
        assert not ordinary(torch.ones(2)).is_inference()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse.*")
def test_a_sparse_inference_tensor_becomes_ordinary(layout):
    tensor = made_under_inference(lambda: torch.eye(3).to_sparse(layout=layout))
    plain = ordinary(tensor)
    assert not plain.is_inference()
    assert plain.layout is layout
    assert torch.equal(plain.to_dense(), torch.eye(3))
    assert np.array_equal(to_numpy(tensor), np.eye(3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_a_transformer_computes_on_a_nested_tensor_becomes_ordinary():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    padding = torch.tensor([[False, False], [False, True]])
    with torch.inference_mode(), capture(model, "layers.0") as acts:
        model(torch.randn(2, 2, 8), src_key_padding_mask=padding)
    assert not acts["layers.0"].is_inference()


def test_a_parameter_made_under_inference_mode_becomes_ordinary():
    plain = ordinary(made_under_inference(lambda: nn.Parameter(torch.ones(2))))
    assert not plain.is_inference()
    assert torch.equal(plain, torch.ones(2))


class Named(torch.Tensor):
    """A tensor of a type of its own."""


def test_a_tensor_of_another_type_keeps_it():
    plain = ordinary(made_under_inference(lambda: torch.ones(2).as_subclass(Named)))
    assert not plain.is_inference()
    assert type(plain) is Named


LAZY = [lambda: torch.tensor([1 + 2j]).conj(), lambda: torch.tensor([1 + 2j]).conj().imag]


@pytest.mark.parametrize("make", LAZY)
def test_a_lazily_conjugated_inference_tensor_keeps_its_values(make):
    tensor = made_under_inference(make)
    assert torch.equal(ordinary(tensor).resolve_conj().resolve_neg(), tensor.resolve_conj().resolve_neg())


def test_what_a_reducer_conjugates_under_inference_mode_is_right():
    model = nn.Identity()
    with torch.inference_mode(), capture(model, "", reduce=lambda x, mask: x.sum(1).conj()) as acts:
        model(torch.full((1, 2, 1), 1 + 2j))
    assert acts[""].item() == 2 - 4j


# -- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, np.float16),
        (torch.float32, np.float32),
        (torch.float64, np.float64),
        (torch.bfloat16, np.float32),
        (torch.float8_e4m3fn, np.float32),
        (torch.float8_e5m2, np.float32),
        (torch.bool, np.bool_),
        (torch.int8, np.int8),
        (torch.int64, np.int64),
        (torch.uint8, np.uint8),
        (torch.uint16, np.uint16),
        (torch.complex64, np.complex64),
        (torch.complex128, np.complex128),
    ],
)
def test_an_array_has_the_same_values_and_the_dtype_that_numpy_has(dtype, expected):
    tensor = torch.tensor([1.0, 0.0]).to(dtype)
    array = to_numpy(tensor)
    assert array.dtype == expected
    assert array.tolist() == [1, 0]
    assert numpy_has(dtype) is (str(dtype).removeprefix("torch.") == np.dtype(expected).name)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2fnuz], ids=str
)
def test_a_float_that_numpy_lacks_becomes_float32_with_the_same_values(dtype):
    given = torch.tensor([1.0, -0.5, 1.5, 0.0]).to(dtype)
    found = as_numpy_has(given)
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, -0.5, 1.5, 0.0]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex32_becomes_complex64():
    found = as_numpy_has(torch.tensor([1 + 2j, -0.5j]).to(torch.complex32))
    assert found.dtype == torch.complex64
    assert found.tolist() == [1 + 2j, -0.5j]


@pytest.mark.filterwarnings("ignore:.*quantized")
def test_quantized_numbers_become_the_float32_that_they_stand_for():
    quantized = torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.25, 3, torch.quint8)
    assert to_numpy(quantized).tolist() == [0.5, 1.0]
    assert as_numpy_has(quantized).dtype == torch.float32


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "bits8"])
def test_a_dtype_without_a_counterpart_is_refused_by_name(name):
    if not hasattr(torch, name):
        pytest.skip(f"torch.{name} is newer")
    tensor = torch.zeros(2, dtype=torch.uint8).view(getattr(torch, name))
    with pytest.raises(ArgumentError, match=rf"got torch\.{name}. Convert it in a reducer"):
        to_numpy(tensor)


def test_an_array_shares_memory_where_numpy_has_the_dtype():
    tensor = torch.zeros(2)
    to_numpy(tensor)[0] = 5
    assert tensor[0] == 5


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1 - 2j]).conj(),
        torch.tensor([1 - 2j]).conj() + 0,
        torch.tensor([1 + 2j]).requires_grad_(),
        made_under_inference(lambda: torch.tensor([1 + 2j])),
    ],
)
def test_conjugated_differentiable_and_inference_tensors_become_arrays(tensor):
    assert to_numpy(tensor).tolist() == [1 + 2j]


def test_a_half_precision_complex_tensor_becomes_an_array():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.zeros(2, dtype=torch.complex32)
    assert to_numpy(tensor).dtype == np.complex64


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_counted_by_storage():
    base = torch.zeros(10, 10)
    assert memory_of(base) == memory_of(base[3]) == {base.data_ptr(): 400}
    assert memory_of(base.clone()).keys().isdisjoint(memory_of(base))


@pytest.mark.filterwarnings("ignore:.*")
def test_memory_of_a_tensor_that_is_made_of_others_is_theirs():
    base, rows = torch.eye(4), [torch.ones(2, 4), torch.ones(1, 4)]
    sizes = {
        "coo": (base.to_sparse(), 4 * 4 + 2 * 4 * 8),
        "not coalesced": (torch.sparse_coo_tensor(torch.zeros(1, 3), torch.ones(3), (4,)), 3 * 4 + 3 * 8),
        "csr": (base.to_sparse_csr().clone(), 4 * 4 + 4 * 8 + 5 * 8),
        "csc": (base.to_sparse_csc().clone(), 4 * 4 + 4 * 8 + 5 * 8),
        "bsr": (base.to_sparse_bsr((2, 2)).clone(), 2 * 4 * 4 + 2 * 8 + 3 * 8),
        "nested": (torch.nested.nested_tensor(rows), 12 * 4),
        "jagged": (torch.nested.nested_tensor(rows, layout=torch.jagged), 12 * 4 + 3 * 8),
        "quantized": (torch.quantize_per_tensor(base, 0.5, 0, torch.quint8), 16),
        "meta": (base.to("meta"), 64),
        "mkldnn": (base.to_mkldnn(), 64),
    }
    assert {name: sum(memory_of(tensor).values()) for name, (tensor, _) in sizes.items()} == {
        name: nbytes for name, (_, nbytes) in sizes.items()
    }
    sparse = sizes["coo"][0]
    assert memory_of(sparse) == memory_of(sparse.detach())
    assert memory_of(sparse).keys().isdisjoint(memory_of(sparse.clone()))
    assert memory_of(sizes["meta"][0]).keys().isdisjoint(memory_of(base.to("meta")))
