"""How the benchmark suite measures: turns, clocks, ratios, and the interval of a median."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks.measure import Case, Rounds, Seconds, measure, median_interval, time_system


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # ranks as in tables of the sign test at 5 %, two-sided
    [(6, 1, 6), (9, 2, 8), (15, 4, 12), (17, 5, 13), (25, 8, 18), (31, 10, 22), (101, 41, 61)],
)
def test_the_interval_of_a_median_is_between_the_ranks_of_the_sign_test(count: int, low: int, high: int) -> None:
    values = [float(value) for value in range(count, 0, -1)]
    spread = median_interval(values)
    assert (spread.median, spread.low, spread.high) == ((count + 1) / 2, low, high)


def test_few_values_give_their_whole_range() -> None:
    assert median_interval([2.0]) == median_interval([2.0, 2.0, 2.0])
    spread = median_interval([3.0, 1.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 15, generator=generator).exp() - 1  # skewed; its median is 0
    spreads = [median_interval(sample.tolist()) for sample in samples]
    held = sum(spread.low <= 0 <= spread.high for spread in spreads) / len(spreads)
    assert 0.95 <= held <= 0.98


def test_a_median_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        median_interval([])


def test_ratios_are_those_of_what_is_added_to_the_floor_of_the_same_round() -> None:
    rounds = Rounds(
        floor=[Seconds(1.0, 10.0), Seconds(2.0, 10.0)],
        reference=[Seconds(2.0, 12.0), Seconds(4.0, 14.0)],
        ours=[Seconds(4.0, 13.0), Seconds(5.0, 12.0)],
    )
    assert rounds.ratios("wall") == [3.0, 1.5]
    assert rounds.ratios("cpu") == [1.5, 0.5]
    assert rounds.added("ours", "wall") == [3.0, 3.0]


def test_a_reference_may_have_a_floor_of_its_own() -> None:
    rounds = Rounds(
        floor=[Seconds(1.0, 1.0)],
        reference_floor=[Seconds(3.0, 3.0)],
        reference=[Seconds(4.0, 5.0)],
        ours=[Seconds(2.5, 2.0)],
    )
    assert (rounds.ratios("wall"), rounds.ratios("cpu")) == ([1.5], [0.5])


def test_of_two_references_the_longer_one_counts_in_each_round() -> None:
    rounds = Rounds(
        reference=[Seconds(2.0, 1.0), Seconds(4.0, 1.0)],
        second_reference=[Seconds(3.0, 0.5), Seconds(3.0, 0.5)],
        ours=[Seconds(6.0, 1.0), Seconds(6.0, 1.0)],
    )
    assert rounds.ratios("wall") == [2.0, 1.5]
    assert rounds.ratios("cpu") == [2.0, 1.0]


def test_without_a_floor_whole_times_are_compared() -> None:
    rounds = Rounds(reference=[Seconds(2.0, 2.0)], ours=[Seconds(5.0, 3.0)])
    assert (rounds.ratios("wall"), rounds.ratios("cpu")) == ([2.5], [1.5])


def test_a_reference_that_noise_swallowed_counts_against_us() -> None:
    rounds = Rounds([Seconds(2.0, 2.0)], [], [Seconds(1.0, 1.0)], [Seconds(3.0, 3.0)])
    assert rounds.ratios("wall") == [math.inf]


def test_systems_take_turns_and_the_order_is_reversed_each_round() -> None:
    seen: list[str] = []
    ours, reference, floor = (noted(name, seen) for name in ("ours", "reference", "floor"))
    case = Case("case", "about", ours, reference, floor=floor, calls=1, loops=2)
    measure(case, 3)
    warm_up, first, second, third = (seen[start : start + 3] for start in range(0, 12, 3))
    assert first == third == warm_up == ["floor", "reference", "ours"]
    assert second == ["ours", "reference", "floor"]


def test_cpu_time_is_that_of_the_timed_runs_alone() -> None:
    @contextmanager
    def sleeping_outside() -> Iterator[Any]:
        sum(range(3_000_000))
        yield lambda: None

    assert time_system(sleeping_outside, 10).cpu < 1e-3


def noted(name: str, seen: list[str]) -> Any:
    @contextmanager
    def system() -> Iterator[Any]:
        seen.append(name)
        yield int

    return system
