"""What a store's columns are: later steps are stored as they come only where nothing has to be converted or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_extractor._format._codecs import NPY, NPZ, SAFETENSORS, Codec
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import StoredDtypeError, StoreError, TensorKindError
from activation_extractor.sinks._schema import Schema
from activation_extractor.sinks._step import Step

KEY = ("layer", "mean")
EACH_CODEC = pytest.mark.parametrize("codec", [SAFETENSORS, NPY, NPZ], ids=lambda codec: codec.name)
PLAIN = torch.arange(6.0).reshape(2, 3)
COMPLEX = torch.complex(PLAIN, PLAIN + 1)


def step(value: Any, **keep: Any) -> Step:
    return Step(0, 2, {KEY: value}, None, keep)


def after(first: Any, second: Any, codec: Codec = SAFETENSORS) -> Any:
    """What is stored of a second step."""
    schema, _ = Schema(codec).fit(step(first))
    same, columns = schema.fit(step(second))
    assert same == schema
    return columns["layer:mean"]


@EACH_CODEC
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PLAIN, PLAIN.clone().requires_grad_()),
        (PLAIN, torch.nn.Parameter(PLAIN, requires_grad=False)),
        (PLAIN, PLAIN.to_sparse()),
        (COMPLEX, COMPLEX.conj()),
        (PLAIN, COMPLEX.conj().imag),
        (PLAIN, PLAIN.t().contiguous().t()),
        (PLAIN.bfloat16(), PLAIN.bfloat16()),
        (PLAIN, torch.empty(0, 3)),
    ],
    ids=["graph", "parameter", "sparse", "conjugated", "negated", "strided", "bfloat16", "empty"],
)
def test_a_later_step_is_stored_in_the_same_plain_form(codec: Codec, first: Tensor, second: Tensor) -> None:
    stored, expected = after(first, second, codec), codec.convert(second)
    assert type(stored) is Tensor
    assert stored.layout is torch.strided
    assert not any((stored.requires_grad, stored.is_conj(), stored.is_neg()))
    assert stored.dtype is expected.dtype
    assert torch.equal(stored, expected)


@EACH_CODEC
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PLAIN, PLAIN.double()),
        (PLAIN, PLAIN.bfloat16()),
        (PLAIN.bfloat16(), PLAIN),
        (PLAIN, PLAIN[:, :2]),
        (PLAIN, PLAIN[:, :, None]),
        (PLAIN, Ragged(PLAIN, torch.tensor([1, 1]))),
        (Ragged(PLAIN, torch.tensor([1, 1])), PLAIN),
    ],
    ids=["dtype", "narrower", "wider", "width", "axes", "ragged", "no longer ragged"],
)
def test_a_later_step_of_another_kind_is_refused(codec: Codec, first: Any, second: Any) -> None:
    with pytest.raises(StoreError, match="keep one dtype and row shape"):
        after(first, second, codec)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [lambda: PLAIN.to("meta"), lambda: torch.nested.as_nested_tensor([PLAIN, PLAIN])])
def test_a_later_step_without_plain_numbers_is_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(TensorKindError):
        after(PLAIN, make())


def test_a_later_step_is_checked_for_values_too_large_for_the_dtype_that_is_stored() -> None:
    codec = SAFETENSORS.storing(torch.float16)
    assert after(PLAIN, PLAIN, codec).dtype is torch.float16
    with pytest.raises(StoredDtypeError):
        after(PLAIN, PLAIN + 1e6, codec)


def test_a_store_that_another_dtype_was_asked_for_does_not_go_on_in_its_own() -> None:
    schema, _ = Schema(SAFETENSORS).fit(step(PLAIN))
    with pytest.raises(StoreError, match="keep one dtype"):
        replace(schema, codec=SAFETENSORS.storing(torch.float16)).fit(step(PLAIN))


def test_what_needs_no_conversion_is_asked_once() -> None:
    asked: list[Tensor] = []

    def convert(tensor: Tensor, *about: Any) -> Tensor:
        asked.append(tensor)
        return SAFETENSORS.convert(tensor, *about)

    schema = Schema(replace(SAFETENSORS, convert=convert))
    for _ in range(3):
        schema, columns = schema.fit(step(PLAIN, label=torch.arange(2)))
    assert len(asked) == 2
    assert columns["layer:mean"] is PLAIN
