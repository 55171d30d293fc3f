"""What is known of the units of a store before they are opened, in arrays."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activation_extractor._format._headers import Extent
from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._shards import Shard
from activation_extractor._format._unit_table import UnitTable
from activation_extractor.errors import StoreError

REGULAR = frozenset({"a:b", "#keep:c"})
WRITERS = ["", "20261127T071303804156-8e738939-", "20261127T071303804157-00000000-"]


def table(units: dict[str, int], counts: dict[str, dict[str, int]] | None = None) -> UnitTable:
    records = [
        JournalRecord(unit, rows, 100 + rows, f"{at:08x}", (counts or {}).get(unit))
        for at, (unit, rows) in enumerate(units.items())
    ]
    return UnitTable("/out/shards/", ".npz", list(units), records, REGULAR)


def shard(unit: str, rows: int, seal: str, entries=("a:b", "#keep:c")) -> Shard:
    extents = {name: Extent(Path("x"), 0, torch.float32, (rows, 2), 0, 0) for name in entries}
    return Shard(Path("x"), rows, {"unit": unit, "seal": seal}, extents)


@given(st.dictionaries(st.tuples(st.sampled_from(WRITERS), st.integers(0, 99_999_999)), st.integers(0, 9)))
def test_names_rows_and_sizes_come_back_also_from_a_pickle(found):
    units = {f"{writer}{number:08d}": rows for (writer, number), rows in sorted(found.items())}
    for one in (table(units), pickle.loads(pickle.dumps(table(units)))):
        assert len(one) == len(units)
        assert [one.path(at) for at in range(len(one))] == [f"/out/shards/{unit}.npz" for unit in units]
        assert one.numbers.tolist() == [int(unit[-8:]) for unit in units]
        assert one.rows.tolist() == [*units.values()]
        assert one.nbytes.tolist() == [100 + rows for rows in units.values()]
        assert one.starts.tolist() == [0, *np.cumsum([*units.values()])]
        for at, (unit, rows) in enumerate(units.items()):
            one.check(shard(unit, rows, f"{at:08x}"))
            with pytest.raises(StoreError, match="agree with the journal"):
                one.check(shard(unit, rows + 1, f"{at:08x}"))
            with pytest.raises(StoreError, match="agree with the journal"):
                one.check(shard(unit, rows, "ffffffff"))


@pytest.mark.parametrize("seal", ["", "0", "00000000 ", "0000 000", "0x000000", "0000000G", "000000001", "-0000001"])
def test_text_that_is_no_checksum_agrees_with_no_shard(seal):
    one = UnitTable("", ".npz", ["00000000"], [JournalRecord("00000000", 3, 9, seal)], REGULAR)
    with pytest.raises(StoreError, match="agree with the journal"):
        one.check(shard("00000000", 3, "00000000"))


def test_a_unit_that_is_not_in_it_is_not_compared():
    table({"00000003": 3}).check(shard("00000004", 9, "ffffffff"))
    table({"00000003": 3}).check(shard("20261127T071303804156-8e738939-00000003", 9, "ffffffff"))


def test_columns_that_differ_by_unit_are_where_they_have_rows():
    units = {f"{number:08d}": 3 for number in range(4)}
    one = table(units, {"00000001": {"a:b": 2, "x:y": 1}, "00000003": {"#keep:c": 0}})
    for again in (one, pickle.loads(pickle.dumps(one))):
        assert again.entries == ["x:y"]
        held = again.of_entry("a:b")
        assert (held.which.tolist(), held.counts.tolist(), held.starts.tolist()) == ([0, 1, 2], [3, 2, 3], [0, 3, 5, 8])
        assert again.of_entry("x:y").which.tolist() == [1]
        assert again.of_entry("no:such").starts.tolist() == [0]
        again.check(shard("00000000", 3, "00000000"))
        with pytest.raises(StoreError, match="agree with the journal"):
            again.check(shard("00000000", 3, "00000000", ["a:b"]))


def test_units_that_are_alike_share_what_says_where_their_rows_are():
    one = table({f"{number:08d}": 3 for number in range(4)})
    assert one.of_entry("a:b") is one.of_entry("#keep:c")
    assert one.of_entry("a:b").which is None


def test_a_hundred_thousand_units_take_less_than_a_megabyte_in_a_pickle():
    generator = np.random.default_rng(0)
    rows, seals = generator.integers(1, 4097, 100_000), generator.integers(0, 2**32, 100_000)
    units = [f"{number:08d}" for number in range(100_000)]
    known = zip(units, rows.tolist(), seals.tolist(), strict=True)
    records = [JournalRecord(unit, count, 900 + 7 * count, f"{seal:08x}") for unit, count, seal in known]
    assert len(pickle.dumps(UnitTable("/out/shards/", ".npz", units, records, REGULAR))) < 1_000_000
