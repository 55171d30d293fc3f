"""The coefficients of scale.md are measured by a command that runs."""

from __future__ import annotations

import pytest

from benchmarks import scale


@pytest.mark.parametrize("part", scale.PARTS)
def test_each_part_is_measured_at_its_smallest_size(part, capsys):
    scale.main(["--small", "--part", part])
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith(part) and ": " in line for line in lines)


def test_what_is_counted_for_a_unit_is_what_writing_one_takes(capsys):
    scale.main(["--small", "--part", "calls"])
    (writing,) = [line for line in capsys.readouterr().out.splitlines() if "writing" in line]
    assert "'link': 1.0" in writing
    assert "'fsync': 3.0" in writing
