"""`compare` with stores on one side or both."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Repeating
from torch import nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, compare, extract, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import MatchError, OverwrittenError, StoreError
from activation_extractor.sinks import Step

SINKS = [SafetensorsSink, NpySink, NpzSink]
MIB = 1 << 20


def store(folder, columns, *, ids=None, make_sink=SafetensorsSink, **options):
    """A store of these columns, all in one step."""
    sink = make_sink(Path(folder), **options)
    first = next(iter(columns.values()))
    rows = len(first.lengths if isinstance(first, Ragged) else first)
    sink.write(Step(0, rows, {(name, "full"): values for name, values in columns.items()}, ids, {}))
    sink.close()
    return open_store(folder)


def ragged(rows):
    rows = list(rows)
    return Ragged(torch.cat(rows), torch.tensor([len(one) for one in rows]))


def differences(found):
    return {row.layer: row.differences for row in found}


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_store_holds_what_the_block_did(stack, tokens, tmp_path, make_sink):
    layers = ["embed", "h.0.norm", "h.0", "h.1"]
    with capture(stack, layers) as acts, torch.no_grad():
        stack(tokens)
    with capture(stack, layers, sink=make_sink(tmp_path / "out")), torch.no_grad():
        stack(tokens)
    written = open_store(tmp_path / "out")
    for found in (compare(acts, written, rtol=0, atol=0), compare(written, acts, rtol=0, atol=0)):
        assert found.ok
        assert {row.max_abs for row in found} == {0.0}
        assert [(row.layer, row.reducer) for row in found] == [(layer, "full") for layer in layers]
    with torch.no_grad():
        stack.h[0].norm.bias += 0.5
    with capture(stack, layers) as changed, torch.no_grad():
        stack(tokens)
    assert compare(written, changed).first_difference == "h.0.norm"


def test_rows_are_matched_by_their_ids_whatever_the_order_and_the_shards(stack, tmp_path):
    batches = {
        index: {"input_ids": torch.randint(0, 50, (2, 5)), "id": [f"r{index}", f"s{index}"]} for index in range(6)
    }
    options = {"ids": "id", "progress": False, "reduce": ["mean", "last"]}
    left = extract(stack, batches.values(), ["h.0", "h.2"], out=tmp_path / "a", rows_per_unit=4, **options)
    turned = [batches[index] for index in (3, 5, 0, 1, 4, 2)]
    right = extract(stack, turned, ["h.0", "h.2"], out=tmp_path / "b", rows_per_unit=2, format="npz", **options)
    assert left.ids != right.ids
    found = compare(left, right)
    assert found.ok, found
    assert len(found) == 4
    assert {row.shapes for row in found} == {((12, 8), (12, 8))}
    with torch.no_grad():
        stack.h[1].mlp.weight.mul_(1.5)
    other = extract(stack, turned, ["h.0", "h.2"], out=tmp_path / "c", **options)
    assert compare(left, other).first_difference == "h.2"


def test_bfloat16_in_safetensors_is_float32_in_npz(tmp_path):
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    left = store(tmp_path / "a", {"a": values, "b": values})
    right = store(tmp_path / "b", {"a": values, "b": values}, make_sink=NpzSink)
    found = compare(left, right)
    assert found.ok
    assert {row.dtypes for row in found} == {(torch.bfloat16, torch.float32)}
    assert {row.max_abs for row in found} == {0.0}
    assert differences(compare(left, right, check_dtype=True)) == {"a": ("dtype",), "b": ("dtype",)}


def test_a_row_in_another_place_differs_without_ids_and_not_with_them(tmp_path):
    values, order = torch.arange(8.0).view(4, 2), [2, 0, 3, 1]
    bare = [store(tmp_path / f"bare{index}", {"a": one}) for index, one in enumerate([values, values[order]])]
    assert differences(compare(*bare)) == {"a": ("values",)}
    named = [
        store(tmp_path / "a", {"a": values}, ids=[0, 1, 2, 3]),
        store(tmp_path / "b", {"a": values[order]}, ids=order),
    ]
    assert compare(*named).ok
    assert differences(compare(named[0], bare[1])) == {"a": ("values",)}  # one side's ids are not enough
    assert compare(named[0], bare[0]).ok


def test_other_ids_are_a_match_error_and_another_number_of_rows_without_ids_another_shape(tmp_path):
    left = store(tmp_path / "a", {"a": torch.ones(2, 1)}, ids=["x", "y"])
    for name, ids, got in [
        ("b", ["x", "z"], "1 id on the left alone, such as 'y'"),
        ("c", "xyz", "1 id on the right alone, such as 'z'"),
    ]:
        right = store(tmp_path / name, {"a": torch.ones(len(ids), 1)}, ids=list(ids))
        with pytest.raises(
            MatchError,
            match=f"^What is compared must have the same row ids on both sides, got {got}. Compare stores of",
        ):
            compare(left, right)
    bare = store(tmp_path / "d", {"a": torch.ones(3, 1)})
    assert differences(compare(left, bare)) == {"a": ("shape",)}


def test_ragged_rows_are_matched_by_their_ids(tmp_path):
    rows = {one: torch.full((length, 2), float(length)) for one, length in zip("abcd", [2, 0, 3, 1], strict=True)}
    left = store(tmp_path / "a", {"a": ragged(rows.values())}, ids=list(rows))
    right = store(tmp_path / "b", {"a": ragged(rows[one] for one in "dbca")}, ids=list("dbca"), make_sink=NpySink)
    assert compare(left, right, rtol=0, atol=0).ok
    rows["c"] = rows["c"] + 1
    changed = store(tmp_path / "c", {"a": ragged(rows[one] for one in "dbca")}, ids=list("dbca"))
    (row,) = compare(left, changed)
    assert (row.differences, row.max_abs, row.shapes[0]) == (("values",), 1.0, (4, None, 2))


def test_ragged_rows_are_a_padded_tensor_when_there_is_no_padding(tmp_path):
    same = torch.arange(12.0).view(2, 3, 2)
    column = store(tmp_path / "a", {"a": ragged(same)})
    assert compare(column, {"a": same}).ok
    assert compare({"a": same}, column).ok
    assert compare(column, {"a": same.numpy()}).ok
    assert compare(column, store(tmp_path / "dense", {"a": same})).ok
    assert differences(compare(column, {"a": same + 1})) == {"a": ("values",)}
    padded = store(tmp_path / "b", {"a": ragged([same[0], same[1, :2]])})
    (row,) = compare(padded, {"a": same})
    assert (row.differences, row.shapes) == (("shape",), ((2, None, 2), (2, 3, 2)))
    assert differences(compare(padded, column)) == {"a": ("shape",)}
    assert compare(padded, {"a": torch.nested.nested_tensor([same[0], same[1, :2]], layout=torch.jagged)}).ok


def test_a_column_that_is_short_of_rows_is_compared_by_ids_with_one_short_of_the_same(tmp_path):
    values = {one: torch.full((1, 2), float(index)) for index, one in enumerate("wxyz")}

    def written(name, ids, short_of, change=0.0):
        sink = SafetensorsSink(tmp_path / name, rows_per_unit=2)
        for index, one in enumerate(ids):
            columns = {("all", "a"): values[one], ("some", "a"): values[one] + 10 + change}
            sink.write(
                Step(index, 1, {key: columns[key] for key in columns if key[0] == "all" or one not in short_of}, [one])
            )
        sink.close()
        return open_store(tmp_path / name)

    left = written("a", "wxyz", short_of="x")
    assert compare(left, written("b", "zxwy", short_of="x")).ok
    assert differences(compare(left, written("c", "zxwy", short_of="x", change=1))) == {"all": (), "some": ("values",)}
    for name, short_of in [("d", "y"), ("e", ""), ("f", "xy")]:
        found = compare(left, written(name, "zxwy", short_of))
        assert differences(found) == {"all": (), "some": ("rows",)}
        assert np.isnan(found[1].max_abs)


def test_layers_that_ran_for_some_batches_only_are_compared(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, deep: bool = False) -> torch.Tensor:
            x = self.always(x)
            return self.rare(x) if deep else x

    model, x = Sometimes(), torch.randn(6, 2)

    def written(name, batches):
        with capture(model, "*", sink=tmp_path / name, missing="skip") as acts, torch.no_grad():
            for rows in batches:
                with acts.step(ids=rows):
                    model(x[rows], deep=rows[0] % 2 == 1)
        return open_store(tmp_path / name)

    left = written("a", [[0, 2], [1, 3], [4], [5]])
    assert left["rare"].rows.tolist() == [2, 3, 5]
    assert compare(left, written("b", [[5, 1], [4], [3], [2, 0]])).ok


def test_each_call_of_a_block_has_its_column(tmp_path):
    model, x = Repeating(), torch.randn(2, 4)
    with capture(model, "layer", calls="all") as acts, torch.no_grad():
        model(x)
    with capture(model, "layer", calls="all", sink=tmp_path / "out"), torch.no_grad():
        model(x)
    found = compare(acts, open_store(tmp_path / "out"))
    assert found.ok
    assert [row.layer for row in found] == ["layer#0", "layer#1", "layer#2"]


def test_what_was_overwritten_is_an_error_rather_than_compared():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with torch.no_grad(), capture(model, "0", copy=False) as acts:
        model(torch.randn(3, 2))
    for sides in [(acts, {"0": torch.ones(3, 2)}), ({"0": torch.ones(3, 2)}, acts)]:
        with pytest.raises(OverwrittenError):
            compare(*sides)


@pytest.mark.parametrize("make_sink", [SafetensorsSink, NpzSink])
def test_a_damaged_shard_is_an_error_that_names_it(tmp_path, make_sink):
    values = torch.randn(100, 4)
    left, right = (store(tmp_path / name, {"a": values}, make_sink=make_sink) for name in "ab")
    (shard,) = (tmp_path / "b" / "shards").iterdir()
    os.truncate(shard, shard.stat().st_size - 8)
    for sides in [(left, right), (right, left), (right, {"a": values})]:
        with pytest.raises(StoreError, match=shard.name):
            compare(*sides)


@pytest.mark.parametrize("is_turned", [False, True])
def test_stores_are_read_a_few_rows_at_a_time(tmp_path, reads, is_turned):
    values, ids = torch.ones(1 << 13, 1 << 10), list(range(1 << 13))  # 32 MiB
    left = store(tmp_path / "a", {"a": values}, ids=ids)
    others = [*ids[4096:], *ids[:4096]] if is_turned else ids
    right = store(tmp_path / "b", {"a": values}, ids=others, unit_bytes=8 * MIB)
    reads.clear()
    assert compare(left, right).ok
    assert 2 * values.nbytes <= sum(reads) < 2 * values.nbytes + 2 * MIB
    assert max(reads) <= 4 * MIB


def test_ragged_columns_are_read_a_few_rows_at_a_time(tmp_path, reads):
    rows = [torch.ones(length, 1 << 8) for length in [4096, 1, 0, 3000, 5000, 2500, 4096, 4096]]
    left = store(tmp_path / "a", {"a": ragged(rows)}, ids=list("abcdefgh"))
    right = store(tmp_path / "b", {"a": ragged(rows[::-1])}, ids=list("hgfedcba"))
    reads.clear()
    assert compare(left, right).ok
    assert max(reads) <= 5000 * (1 << 8) * 4  # the longest row, which is more than a block


def test_only_columns_that_are_compared_are_read(tmp_path, reads):
    columns = {name: torch.ones(1 << 10, 1 << 10) for name in "abc"}  # 4 MiB each
    left = store(tmp_path / "a", columns)
    reads.clear()
    found = compare(left, {"b": columns["b"]}, match={"b": "b"})
    assert [row.layer for row in found] == ["b"]
    assert sum(reads) < 4 * MIB + MIB // 2
    reads.clear()
    found = compare(left, {"b": columns["b"], "c": torch.ones(1 << 10, 1)})
    assert differences(found) == {"a": ("missing on the right",), "b": (), "c": ("shape",)}
    assert sum(reads) < 4 * MIB + MIB // 2  # neither what is missing nor what has another shape
