"""How rows lie to each other, against numpy and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activation_extractor import capture, open_store
from activation_extractor.errors import ArgumentError
from activation_extractor.plots._similarity import (
    cka_matrix,
    common_rows,
    principal_components,
    read_norms,
    read_rows,
)

quick = settings(max_examples=40, deadline=None)
shapes = st.tuples(st.integers(3, 12), st.integers(1, 15), st.integers(1, 15), st.integers(0, 10**6))


def pair(shape):
    rows, first, second, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (first, second)]


def linear_cka(x, y):
    return float(cka_matrix([x, y])[0, 1])


def plain_cka(x, y):
    """Kornblith et al. 2019, as a formula."""
    x, y = (one.numpy() - one.numpy().mean(0) for one in (x, y))
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@quick
@given(shapes)
def test_cka_is_the_papers_formula_symmetric_and_between_0_and_1(shape):
    x, y = pair(shape)
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)
    assert 0 <= linear_cka(x, y) <= 1


@quick
@given(shapes, st.floats(1e-3, 1e3))
def test_cka_ignores_rotation_scale_and_shift(shape, factor):
    x, y = pair(shape)
    rotation, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=torch.float64))
    moved = factor * x @ rotation + 5
    assert linear_cka(x, moved) == pytest.approx(1, abs=1e-9)
    assert linear_cka(moved, y) == pytest.approx(linear_cka(x, y), abs=1e-9)


@pytest.mark.parametrize("width", [2, 40])  # by features, by Gram matrices
def test_a_matrix_holds_the_cka_of_each_pair(width):
    layers = [torch.randn(10, width + more) for more in range(3)]
    expected = [[plain_cka(x.double(), y.double()) for y in layers] for x in layers]
    np.testing.assert_allclose(cka_matrix(layers).numpy(), expected, atol=1e-9)
    assert cka_matrix(layers).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_the_size_of_numbers_does_not_matter(scale):
    x, y = pair((9, 4, 5, 0))
    assert linear_cka(x * scale, y) == pytest.approx(linear_cka(x, y))
    scores, shares = principal_components(x * scale)
    torch.testing.assert_close(scores / scale, principal_components(x)[0])
    torch.testing.assert_close(shares, principal_components(x)[1])


def test_a_constant_has_no_cka_and_no_components():
    constant = torch.full((7, 3), 0.1, dtype=torch.float64)
    assert np.isnan(linear_cka(constant, torch.randn(7, 2)))
    scores, shares = principal_components(constant)
    assert not scores.any()
    assert not shares.any()


def test_other_rows_than_those_of_the_first_layer_are_an_error():
    with pytest.raises(ArgumentError, match=r"layer must have shape \(4, features\), got \(5, 2\)\. Take"):
        linear_cka(torch.ones(4, 2), torch.ones(5, 2))
    with pytest.raises(ArgumentError, match="Each layer must have shape"):
        cka_matrix([torch.ones(4)])


@quick
@given(shapes)
def test_components_are_those_of_numpys_svd(shape):
    rows, _ = pair(shape)
    scores, shares = principal_components(rows)
    left, values, _ = np.linalg.svd(rows.numpy() - rows.numpy().mean(0), full_matrices=False)
    count = min(2, len(values))
    expected = (left * values)[:, :count]
    np.testing.assert_allclose(scores[:, :count].abs(), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(shares[:count], (values**2 / (values**2).sum())[:count], atol=1e-9)
    assert scores.shape == (len(rows), 2)
    assert not scores[:, count:].any()
    assert (scores.gather(0, scores.abs().argmax(0, keepdim=True)) >= 0).all()


def test_the_same_rows_give_the_same_picture_also_when_mirrored():
    rows = torch.randn(30, 6)
    scores, _ = principal_components(rows)
    assert torch.equal(scores, principal_components(rows.clone())[0])
    torch.testing.assert_close(scores.abs(), principal_components(-rows)[0].abs())


def store_of(folder, *steps):
    """A store of what a layer that changes nothing is given, step by step."""
    model = nn.Sequential(nn.Identity())
    with capture(model, "0", sink=folder, reduce="full") as acts:
        for step in steps:
            with acts.step():
                model(step)
    return open_store(folder)


def test_a_sample_is_even_and_reads_only_its_rows(tmp_path):
    given_rows = torch.randn(100, 5)
    column = store_of(tmp_path, given_rows)["0"]
    (indices,), total = common_rows([column], 5)
    assert total == 100
    assert indices.tolist() == [0, 25, 50, 74, 99]
    assert torch.equal(read_rows(column, indices), given_rows[indices])


def test_rows_are_shared_by_columns_that_lack_different_ones():
    class Short:
        dtype, row_shape, is_ragged = torch.float32, (2,), False

        def __init__(self, rows):
            self.rows = torch.tensor(rows)

    indices, total = common_rows([Short([0, 2, 3, 5]), Short([5, 1, 2, 3])], 2)
    assert total == 3
    assert [one.tolist() for one in indices] == [[1, 3], [2, 0]]  # rows 2 and 5


def test_rows_of_positions_are_averaged_and_their_norms_are_of_positions(tmp_path):
    given_rows = torch.randn(4, 3, 5)
    column = store_of(tmp_path, given_rows)["0"]
    every = torch.arange(4)
    torch.testing.assert_close(read_rows(column, every), given_rows.mean(1))
    torch.testing.assert_close(read_norms(column, every).float(), given_rows.norm(dim=2).flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_dtype_is_read(tmp_path, dtype):
    given_rows = (torch.randn(6, 2, 2, 2) * 9).to(dtype)
    column = store_of(tmp_path, given_rows)["0"]
    rows = read_rows(column, torch.arange(6))
    torch.testing.assert_close(rows.double(), given_rows.flatten(1).double())
    torch.testing.assert_close(read_norms(column, torch.arange(6)), given_rows.flatten(1).double().norm(dim=1))


def test_a_sample_of_no_rows_is_an_error(tmp_path):
    column = store_of(tmp_path, torch.ones(2, 2))["0"]
    with pytest.raises(ArgumentError, match="max_rows must be positive, got 0"):
        common_rows([column], 0)
