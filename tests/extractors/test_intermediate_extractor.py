"""The original system's extractor: formats, conversion, and what it refuses to save."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import count_hooks
from torch import nn

from activation_extractor import IntermediateExtractor
from activation_extractor.errors import ArgumentError, ArgumentTypeError, ValueNotFoundError

FORMATS = ["full", "mean", "FT", "LT", "custom"]


def expected_of(array: np.ndarray, emb_format: str, axis: int, position: int | None = None) -> np.ndarray:
    if emb_format == "full":
        return array
    if emb_format == "mean":
        return array.mean(axis)
    return np.take(array, {"FT": 0, "LT": -1, "custom": position}[emb_format], axis)


@pytest.fixture
def extractor(stack: nn.Module) -> IntermediateExtractor:
    return IntermediateExtractor(stack, ["h.0"])


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("emb_format", FORMATS)
def test_every_format_works_along_every_axis(extractor, kind, axis, emb_format):
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    given = array if kind == "array" else torch.from_numpy(array)
    result = extractor.emb_reformatting(given, emb_format, axis, custom_position=1)
    assert isinstance(result, type(given))
    np.testing.assert_allclose(np.asarray(result), expected_of(array, emb_format, axis, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "emb_format", "kind"),
    [
        pytest.param(dtype, name, kind)
        for dtype in (np.float16, np.float32, np.float64)
        for name in FORMATS
        for kind in ("tensor", "array")
    ],
)
def test_every_format_keeps_the_dtype(extractor, dtype, emb_format, kind):
    given = np.ones((2, 3, 4), dtype) if kind == "array" else torch.from_numpy(np.ones((2, 3, 4), dtype))
    assert extractor.emb_reformatting(given, emb_format, custom_position=1).dtype == given.dtype


def test_the_default_is_the_full_output_itself(extractor):
    array = np.ones((2, 3))
    assert extractor.emb_reformatting(array) is array


def test_the_sequence_is_axis_1_unless_said_otherwise(extractor):
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(extractor.emb_reformatting(tensor, "LT"), tensor[:, -1])


@pytest.mark.parametrize("position", [-3, -1, 0, 2])
def test_a_custom_position_counts_from_either_end(extractor, position):
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(extractor.emb_reformatting(tensor, "custom", 1, position), tensor[:, position])


def test_a_position_is_a_copy_and_no_view(extractor):
    for given in (torch.ones(2, 3, 4), np.ones((2, 3, 4))):
        extractor.emb_reformatting(given, "FT")[:] = 7
        assert given.max() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_of_half_precision_is_accumulated_in_float32(extractor, dtype):
    tensor = torch.full((1, 60_000, 1), 3.0, dtype=dtype)  # the sum is beyond float16
    result = extractor.emb_reformatting(tensor, "mean")
    assert result.dtype == dtype
    assert result.item() == 3.0
    if dtype == torch.float16:
        from_array = extractor.emb_reformatting(tensor.numpy(), "mean")
        assert from_array.dtype == np.float16
        assert from_array.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mean_of_integers_is_no_integer(extractor, dtype):
    tensor = torch.tensor([[[1], [2]]], dtype=dtype)
    assert extractor.emb_reformatting(tensor, "mean").item() == 1.5
    assert extractor.emb_reformatting(tensor.numpy(), "mean").item() == 1.5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("median",), r"emb_format must be one of full, mean, FT, LT, custom, got 'median'\."),
        (("custom",), r"custom_position must be an integer for emb_format='custom', got None\."),
        (("custom", 1, True), r"custom_position must be an integer for emb_format='custom', got True\."),
        (("custom", 1, 3), r"custom_position must be a position of a sequence of 3, got 3\."),
        (("custom", 1, -4), r"custom_position must be a position of a sequence of 3, got -4\."),
        (("LT", 3), r"sequence_axis must be an axis of shape \(2, 3, 4\), got 3\."),
        (("mean", -4), r"sequence_axis must be an axis of shape \(2, 3, 4\), got -4\."),
    ],
)
@pytest.mark.parametrize("given", [np.ones((2, 3, 4)), torch.ones(2, 3, 4)], ids=["array", "tensor"])
def test_a_format_that_cannot_be_is_an_error(extractor, given, arguments, text):
    with pytest.raises(ArgumentError, match=text):
        extractor.emb_reformatting(given, *arguments)


def test_outputs_must_be_an_array_or_a_tensor(extractor):
    with pytest.raises(ArgumentTypeError, match=r"outputs must be an array or a tensor, got 'list'\."):
        extractor.emb_reformatting([1.0])


@pytest.mark.parametrize("emb_format", ["LT", "FT"])
def test_an_empty_sequence_is_an_error_that_speaks_of_the_sequence(extractor, emb_format):
    with pytest.raises(ArgumentError) as caught:
        extractor.emb_reformatting(np.ones((2, 0, 4)), emb_format)
    assert "custom_position" not in str(caught.value)


def test_the_mean_of_an_empty_sequence_is_an_error(extractor):
    with pytest.raises(ArgumentError):
        extractor.emb_reformatting(torch.ones(2, 0, 4), "mean")


class Gives(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


def collected(make: Any, x: torch.Tensor) -> IntermediateExtractor:
    extractor = IntermediateExtractor(nn.Sequential(Gives(make)), ["0"])
    extractor.register_hooks()
    extractor.model(x)
    extractor.detach_hooks()
    return extractor


def test_gpu_to_cpu_replaces_the_entries_by_arrays(stack, tokens):
    extractor = IntermediateExtractor(stack, ["h.0", "h.1"])
    extractor.register_hooks()
    stack(tokens)
    tensors = dict(extractor.get_outputs())
    for _ in range(2):  # a second time changes nothing
        extractor.gpu_to_cpu()
        for layer, array in extractor.intermediate_outputs.items():
            assert isinstance(array, np.ndarray)
            assert np.array_equal(array, tensors[layer].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_numpy_lacks_becomes_float32(dtype):
    x = torch.tensor([[1.5, -2.0]]).to(dtype)
    extractor = collected(lambda given: given, x)
    extractor.gpu_to_cpu()
    assert extractor.intermediate_outputs["0"].dtype == np.float32
    assert extractor.intermediate_outputs["0"].tolist() == [[1.5, -2.0]]


@pytest.mark.parametrize(
    "make",
    [lambda x: (None, x, x + 1), lambda x: {"a": "text", "b": [x]}, lambda x: [x]],
    ids=["tuple", "dict", "list"],
)
def test_a_structure_becomes_the_array_of_its_first_tensor(make):
    x = torch.randn(2, 3)
    extractor = collected(make, x)
    extractor.gpu_to_cpu()
    assert np.array_equal(extractor.intermediate_outputs["0"], x.numpy())


@pytest.mark.parametrize("value", [None, "text", (None, 3)])
def test_an_output_without_a_tensor_is_an_error_that_names_the_layer(tmp_path, value):
    extractor = collected(lambda x: value, torch.ones(1))
    with pytest.raises(ValueNotFoundError, match="Layer '0' has no tensor to record, its value is of type ") as caught:
        extractor.gpu_to_cpu()
    assert caught.value.layer == "0"
    for move_to_cpu in (True, False):
        with pytest.raises(ValueNotFoundError):
            extractor.save_outputs(tmp_path, "a", move_to_cpu=move_to_cpu, emb_formats=["full"])
    assert list(tmp_path.iterdir()) == []


def test_saving_touches_no_hook(stack, tokens, tmp_path):
    extractor = IntermediateExtractor(stack, ["h.0"])
    extractor.register_hooks()
    stack(tokens)
    extractor.save_outputs(tmp_path, "a")
    assert count_hooks(stack) == 1
    extractor.detach_hooks()
