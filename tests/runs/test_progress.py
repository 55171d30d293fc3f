"""The progress bar."""

from __future__ import annotations

import sys

import pytest

from activation_extractor.errors import ArgumentTypeError, MissingExtraError
from activation_extractor.runs import _progress
from activation_extractor.runs._progress import Progress


@pytest.mark.parametrize("is_shown", [True, False, None])
def test_batches_pass_through_in_order(is_shown, capsys):
    bar = Progress([1, 2, 3], is_shown)
    seen = []
    for batch in bar:
        seen.append(batch)
        bar.show(stored_rows=0, rows=10 * batch, nbytes=2048)
    assert seen == [1, 2, 3]
    assert ("3/3" in capsys.readouterr().err) == (is_shown is not False)


def test_what_is_printed_behind_a_bar_that_did_not_end_has_a_line_of_its_own(capsys):
    with pytest.raises(ValueError, match="in the middle"):
        for _ in Progress([1, 2], True):
            raise ValueError("in the middle")
    assert capsys.readouterr().err.endswith("\n")


class Counted(list):
    total_rows = 40


def test_a_bar_of_rows_goes_as_far_as_their_number(capsys, clock):
    bar = Progress(Counted([1, 2]), True)
    for number in bar:
        bar.show(stored_rows=10, rows=15 * number - 5, nbytes=2048)
    shown = capsys.readouterr().err
    assert " 0/40" in shown
    assert "35/40" in shown
    assert shown.endswith("\n")
    with pytest.raises(ValueError, match="in the middle"):
        for _ in Progress(Counted([1, 2]), True):
            raise ValueError("in the middle")
    assert capsys.readouterr().err.endswith("\n")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    monkeypatch.setenv("COLUMNS", "200")  # or a long bar is cut
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_the_bar_shows_rows_their_rate_and_bytes(capsys, clock):
    bar = Progress([1], True)
    for _ in bar:
        clock[0] += 2
        bar.show(stored_rows=0, rows=10, nbytes=2048)
    assert "10 rows, 5 rows/s, 2.0 KiB" in capsys.readouterr().err


def test_rows_of_an_earlier_run_count_as_rows_but_not_in_the_rate(capsys, clock):
    bar = Progress([1, 2], True)
    for number in bar:
        clock[0] += 2
        bar.show(stored_rows=30, rows=10 * (number - 1), nbytes=2048)
    assert "40 rows (30 from earlier), 5 rows/s, 2.0 KiB" in capsys.readouterr().err


def test_no_time_passed_is_no_error(capsys, clock):
    bar = Progress([1], True)
    for _ in bar:
        bar.show(stored_rows=0, rows=0, nbytes=0)
    assert "0 rows" in capsys.readouterr().err


@pytest.mark.parametrize("is_shown", ["yes", 1, 0])
def test_progress_must_be_true_false_or_none(is_shown):
    with pytest.raises(ArgumentTypeError, match="progress must be True, False or None, got "):
        Progress([], is_shown)


def test_without_tqdm_a_bar_that_was_asked_for_is_an_error_and_otherwise_there_is_none(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtraError, match=r"progress=True needs tqdm, which is not installed\.") as caught:
        Progress([], True)
    assert caught.value.extra == "cli"
    assert isinstance(caught.value, ImportError)
    assert list(Progress([1, 2], None)) == [1, 2]
    assert capsys.readouterr().err == ""
