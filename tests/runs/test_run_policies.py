"""Where units of a data set end: by batches, and in the order of the data set."""

from __future__ import annotations

import pytest

from activation_extractor.runs._run_policies import BatchPolicy, OrderPolicy
from activation_extractor.sinks._transfer import Transfer
from activation_extractor.sinks._units import Unit

MIB = 2**20
UNIT = Unit(Transfer())  # run policies count batches themselves


@pytest.mark.parametrize(
    ("rows_per_unit", "rows", "nbytes", "batches"),
    [
        (7, 2, 1, 4),  # rounded up
        (1, 2, 1, 1),
        (None, 2, 16 * MIB, 4),
        (None, 2, 24 * MIB, 2),  # rounded down
        (None, 2, 65 * MIB, 1),
        (None, 1000, 1, 4),
        (None, 5000, 1, 1),
    ],
)
def test_the_first_batch_decides_how_many_make_a_unit(rows_per_unit, rows, nbytes, batches):
    policy = BatchPolicy(rows_per_unit)
    assert not policy.is_full(UNIT)
    policy.begin_batch(None)
    policy.choose_size(rows, nbytes)
    assert policy.stored_size == {"batches_per_unit": batches}
    for _ in range(batches - 1):
        assert not policy.is_full(UNIT)
        policy.begin_batch(None)
    assert policy.is_full(UNIT)
    policy.begin_unit()
    assert not policy.is_full(UNIT)


def test_batches_without_rows_before_the_first_one_with_rows_are_of_its_unit():
    policy = BatchPolicy(2)
    for _ in range(3):
        policy.begin_batch(None)
    policy.choose_size(2, 1)
    assert policy.size == 3


@pytest.mark.parametrize(
    ("rows_per_unit", "rows", "nbytes", "least_rows"),
    [(7, 2, 1, 7), (None, 2, 16 * MIB, 8), (None, 2, 65 * MIB, 1), (None, 1000, 1, 4096), (None, 5000, 1, 4096)],
)
def test_in_order_the_first_batch_decides_how_many_rows_a_unit_has_at_least(rows_per_unit, rows, nbytes, least_rows):
    policy = OrderPolicy(rows_per_unit)
    assert policy.stored_size == {"batches_per_unit": None}
    policy.choose_size(rows, nbytes)
    assert policy.stored_size == {"batches_per_unit": None, "least_rows_per_unit": least_rows}


def test_in_order_a_unit_is_full_without_gaps_alone():
    policy, found = OrderPolicy(2), []
    policy.choose_size(1, 1)
    for places in ([1], [3], [0], [2]):
        policy.begin_batch(places)
        found.append(policy.is_full(UNIT))
    assert found == [False, False, False, True]
