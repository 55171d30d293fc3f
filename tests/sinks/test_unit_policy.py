"""Where units end: by rows, and by bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from activation_extractor.sinks._unit_policy import UnitPolicy


def unit(rows: int, nbytes: int) -> SimpleNamespace:
    return SimpleNamespace(rows=rows, nbytes=nbytes)


@pytest.mark.parametrize(
    ("rows", "nbytes", "is_full"), [(0, 0, False), (4095, 9, False), (4096, 0, True), (1, 9, False), (1, 10, True)]
)
def test_without_a_number_of_rows_bytes_or_4096_rows_fill_a_unit(rows, nbytes, is_full):
    assert UnitPolicy(10, None).is_full(unit(rows, nbytes)) == is_full


@pytest.mark.parametrize(("rows", "is_full"), [(5000, False), (5001, True), (6000, True)])
def test_a_number_of_rows_counts_alone(rows, is_full):
    assert UnitPolicy(10, 5001).is_full(unit(rows, 11)) == is_full
