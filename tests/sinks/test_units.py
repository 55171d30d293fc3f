"""Units: steps gathered into the entries of one shard, in the schema that the first ones fix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from activation_extractor._format._codecs import CODECS, NPY, NPZ, SAFETENSORS, Codec
from activation_extractor._format._manifest import make_manifest
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.sinks._schema import Schema
from activation_extractor.sinks._transfer import Transfer
from activation_extractor.sinks._units import Unit

RUN = {"fingerprint": {}, "batches_per_unit": None}


def step(values: dict[tuple[str, str], Any], ids=None, keep=None) -> Step:
    value = next(iter(values.values()))
    rows = len(value.lengths) if isinstance(value, Ragged) else len(value)
    return Step(0, rows, values, ids, keep or {})


def dense(rows: int, start: int = 0) -> dict[tuple[str, str], Tensor]:
    return {("h.0", "mean"): torch.arange(start, start + rows * 2, dtype=torch.float32).reshape(rows, 2)}


def ragged(lengths: list[int], start: int = 0) -> Ragged:
    values = torch.arange(start, start + sum(lengths)).float()[:, None].expand(-1, 4)
    return Ragged(values, torch.tensor(lengths, dtype=torch.int64))


def entries(*steps: Step, codec: Codec = SAFETENSORS) -> dict[str, Tensor]:
    """What goes into the shard of these steps, each entry as one tensor."""
    schema, unit = Schema(codec), Unit(Transfer())
    for one in steps:
        schema, columns = schema.fit(one)
        unit.add(columns, one)
    return {name: torch.cat(list(chunks)) for name, chunks in unit.entries().items()}


def test_steps_of_a_unit_become_one_entry_for_each_column():
    found = entries(
        step(dense(2), ["a", "b"], {"label": torch.tensor([1, 0])}),
        step(dense(1, 4), ["ç"], {"label": torch.tensor([5])}),
    )
    assert found["h.0:mean"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found["#keep:label"].tolist() == [1, 0, 5]
    assert bytes(found["#ids"].tolist()).decode() == "abç"
    assert found["#ids#offsets"].tolist() == [0, 1, 2, 4]
    assert len(found) == 4


def test_a_unit_counts_its_rows_and_the_bytes_of_its_columns():
    unit = Unit(Transfer())
    first = step(dense(2), ["a", "b"], {"label": torch.tensor([1, 0])})
    assert unit.add(Schema(SAFETENSORS).fit(first)[1], first) == 2 * 2 * 4 + 2 * 8
    assert unit.add({"h.0:full": ragged([3, 0])}, Step(1, 2, {}, ["c", "d"])) == 3 * 4 * 4
    assert (unit.rows, unit.nbytes) == (4, 32 + 48)


def test_integer_ids_are_an_integer_tensor_and_no_ids_are_no_entry():
    found = entries(step(dense(2), [7, -(2**63)]), step(dense(1), [2**63 - 1]))
    assert found["#ids"].dtype == torch.int64
    assert found["#ids"].tolist() == [7, -(2**63), 2**63 - 1]
    assert "#ids#offsets" not in found
    assert list(entries(step(dense(2)))) == ["h.0:mean"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_any_texts_are_ids(ids):
    found = entries(*(step(dense(1), [one]) for one in ids))
    assert found["#ids"].dtype == torch.uint8
    assert found["#ids#offsets"].dtype == torch.int64
    joined, offsets = bytes(found["#ids"].tolist()), found["#ids#offsets"].tolist()
    assert [joined[start:stop].decode() for start, stop in pairwise(offsets)] == ids


def test_ragged_rows_lie_one_behind_the_other_with_their_offsets():
    key = ("h.0", "full")
    found = entries(step({key: ragged([2, 0])}), step({key: ragged([3], 2)}), step({key: ragged([0], 5)}))
    assert found["h.0:full"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found["h.0:full#offsets"].tolist() == [0, 2, 2, 5, 5]
    assert len(found) == 2


def test_a_column_short_of_rows_carries_their_numbers():
    found = entries(
        step({**dense(2), ("h.1", "mean"): torch.zeros(2, 3)}),
        step({**dense(2, 4), ("h.2", "full"): ragged([1, 0])}),
        step({**dense(1, 8), ("h.1", "mean"): torch.ones(1, 3)}, keep={"label": torch.tensor([4])}),
    )
    assert found["h.1:mean"].shape == (3, 3)
    assert found["h.1:mean#rows"].tolist() == [0, 1, 4]
    assert found["h.2:full#rows"].tolist() == [2, 3]
    assert found["h.2:full#offsets"].tolist() == [0, 1, 1]
    assert found["#keep:label#rows"].tolist() == [4]
    assert found["h.1:mean#rows"].dtype == torch.int64
    assert "h.0:mean#rows" not in found


def test_steps_without_rows_are_no_rows():
    found = entries(step(dense(0)), step(dense(2), ["a", "b"]), step(dense(0), []))
    assert found["h.0:mean"].tolist() == [[0, 1], [2, 3]]
    assert found["#ids#offsets"].tolist() == [0, 1, 2]
    assert "h.0:mean#rows" not in found


def test_names_are_escaped():
    found = entries(step({("a:b/#", "position(1)"): torch.zeros(1, 2)}, keep={"x#offsets": torch.zeros(1)}))
    assert set(found) == {"a%3Ab%2F%23:position(1)", "#keep:x%23offsets"}


def test_a_schema_says_what_the_columns_are():
    full = Ragged(torch.zeros(3, 4, dtype=torch.bfloat16), torch.tensor([3]))
    values = {("h:0", "full"): full, ("é", "mean"): torch.zeros(1, 2, 3)}
    schema, _ = Schema(SAFETENSORS).fit(step(values, ["a"], {"#": torch.tensor([True])}))
    assert [field.to_json() for field in schema.columns] == [
        {"layer": "h:0", "reducer": "full", "dtype": "bfloat16", "row_shape": [4], "ragged": True},
        {"layer": "é", "reducer": "mean", "dtype": "float32", "row_shape": [2, 3], "ragged": False},
    ]
    assert [field.to_json() for field in schema.keep] == [
        {"name": "#", "dtype": "bool", "row_shape": [], "ragged": False}
    ]
    assert schema.ids == "str"


@pytest.mark.parametrize("codec", [NPY, NPZ], ids=lambda codec: codec.name)
def test_a_schema_says_what_a_column_was_converted_from(codec):
    value = torch.ones(2, 3, dtype=torch.bfloat16)
    ragged = Ragged(value, torch.tensor([2, 0]))
    schema, stored = Schema(codec).fit(step({("h", "mean"): value, ("g", "full"): ragged}))
    assert stored["h:mean"].dtype == torch.float32
    described = [field.to_json() for field in schema.columns]
    assert [(field["dtype"], field["converted_from"]) for field in described] == [("float32", "bfloat16")] * 2
    with pytest.raises(StoreError, match=r"got float32 \(3,\) after bfloat16 \(3,\)"):
        schema.fit(step({("h", "mean"): value.float()}))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_schema_of_a_manifest_is_the_one_that_it_was_made_from(codec):
    values = {("h", "mean"): torch.ones(1, 3, dtype=torch.bfloat16), ("g:", "full"): ragged([2])}
    schema, _ = Schema(codec).fit(step(values, [1], {"label": torch.tensor([1])}))
    again = Schema.of(make_manifest(codec, RUN, schema.columns, schema.keep, schema.ids))
    assert again == schema
    for other in (step({("h", "mean"): torch.ones(1, 4)}, [2]), step(values, ["a"]), step(values)):
        with pytest.raises(StoreError):
            again.fit(other)


def test_a_store_without_ids_stays_without():
    again = Schema.of(make_manifest(SAFETENSORS, RUN, [], [], None))
    with pytest.raises(StoreError, match="'ids' must be given for every step or for none"):
        again.fit(step(dense(1), ["a"]))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.zeros(1, 3), r"float32 \(3,\) after float32 \(2,\)"),
        (torch.zeros(1), r"float32 \(\) after float32 \(2,\)"),
        (torch.zeros(1, 2, dtype=torch.float64), r"float64 \(2,\) after float32 \(2,\)"),
        (Ragged(torch.zeros(1, 2), torch.tensor([1])), r"float32 \(2,\) ragged after float32 \(2,\)"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_a_column_that_changes_is_an_error(value, got, kept):
    base = dense(1)
    before, after = base[("h.0", "mean")], value
    made = [step(base, keep={"k": one}) if kept else step({("h.0", "mean"): one}) for one in (before, after)]
    schema, _ = Schema(SAFETENSORS).fit(made[0])
    name = "#keep:k" if kept else "h.0:mean"
    with pytest.raises(StoreError, match=f"'{name}' must keep one dtype and row shape in a store, got {got}. Reduce"):
        schema.fit(made[1])
    schema.fit(made[0])


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.complex128)])
def test_a_step_that_is_refused_leaves_the_schema_as_it_was(wrong):
    schema, _ = Schema(SAFETENSORS).fit(step({("a", "mean"): torch.zeros(2, 3)}))
    columns = schema.columns
    new = {("new", "mean"): torch.zeros(2, 3), ("a", "mean"): wrong}
    with pytest.raises((StoreError, ArgumentError)):
        schema.fit(step(new, keep={"k": torch.zeros(2)}))
    assert (schema.columns, schema.keep, schema.ids) == (columns, [], None)
    schema.fit(step({("new", "mean"): torch.zeros(2, 5)}))


def test_a_refused_first_step_does_not_fix_the_type_of_the_ids():
    schema = Schema(SAFETENSORS)
    with pytest.raises(ArgumentError):
        schema.fit(step({("a", "mean"): torch.zeros(1, 3, dtype=torch.complex128)}, ["a"]))
    assert schema.fit(step(dense(1), [1]))[0].ids == "int"


@pytest.mark.parametrize("ids", [(["a"], None), (None, ["a"]), ([1], None)])
def test_ids_for_some_steps_only_are_an_error(ids):
    schema, _ = Schema(SAFETENSORS).fit(step(dense(1), ids[0]))
    text = r"'ids' must be given for every step or for none, got some. Give each step its ids."
    with pytest.raises(StoreError, match=text):
        schema.fit(step(dense(1), ids[1]))
    schema.fit(step(dense(1), ids[0]))


@pytest.mark.parametrize(("ids", "got"), [((["a"], [1]), "int after str"), (([1], ["a"]), "str after int")])
def test_ids_that_change_their_type_between_steps_are_an_error(ids, got):
    schema, _ = Schema(SAFETENSORS).fit(step(dense(1), ids[0]))
    with pytest.raises(StoreError, match=f"'ids' must be of one type in a store, got {got}. Convert one of them."):
        schema.fit(step(dense(1), ids[1]))


@pytest.mark.parametrize("empty", [None, []])
def test_a_step_without_rows_says_nothing_about_ids(empty):
    schema = Schema(SAFETENSORS)
    for ids in (empty, ["a"], empty):
        schema, _ = schema.fit(step(dense(1 if ids else 0), ids))
    assert schema.ids == "str"


@pytest.mark.parametrize("kept", [False, True])
def test_a_name_that_is_no_text_is_an_error(kept):
    keep = {"\ud800": torch.zeros(1)} if kept else {}
    values = dense(1) if kept else {("\ud800", "mean"): torch.zeros(1, 2)}
    with pytest.raises(ArgumentError, match="the name of a column must be UTF-8 text, got .*Give the layer another"):
        Schema(SAFETENSORS).fit(step(values, keep=keep))


def test_a_dtype_that_the_format_lacks_is_an_error():
    with pytest.raises(ArgumentError, match="complex128"):
        Schema(SAFETENSORS).fit(step({("a", "mean"): torch.zeros(1, 3, dtype=torch.complex128)}))
