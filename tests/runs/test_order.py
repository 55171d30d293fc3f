"""Rows that come in another order than that of their data set, and stand in it in the store."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import BlockStack
from safetensors.torch import load_file

from activation_extractor import extract, length_batches, open_store
from activation_extractor.errors import ArgumentError, ArgumentTypeError, OtherRunError, StepError
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import RowItems


def make_rows(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


def batches(rows, plan, *, is_numbered=True):
    for batch in plan:
        tokens = torch.nn.utils.rnn.pad_sequence([rows[row] for row in batch], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(rows[row])) for row in batch], batch_first=True).long()
        names = {"id": [f"row {row}" for row in batch]} if is_numbered else {}
        yield {"input_ids": tokens, "attention_mask": mask, "place": batch, "length": mask.sum(1), **names}


OPTIONS = {"order": "place", "keep": "length", "reduce": ["mean", "full"], "progress": False}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    window=st.integers(1, 12),
    tokens=st.integers(5, 40),
    unit=st.integers(1, 12),
    has_ids=st.booleans(),
    lost=st.integers(0, 30),
)
def test_rows_stand_in_the_order_of_the_data_set_and_a_lost_unit_comes_back_the_same(
    tmp_path_factory, lengths, window, tokens, unit, has_ids, lost
):
    out, model, rows = tmp_path_factory.mktemp("order") / "out", BlockStack().eval(), make_rows(lengths)
    plan = length_batches(lengths, max_tokens=tokens, window_rows=window)

    def run():
        made = batches(rows, plan, is_numbered=has_ids)
        return extract(model, made, "h.1", out=out, rows_per_unit=unit, ids="id" if has_ids else None, **OPTIONS)

    store = run()
    assert store.ids == [f"row {row}" if has_ids else row for row in range(len(rows))]
    assert store.keep["length"][:].tolist() == lengths
    assert store["h.1", "full"].lengths().tolist() == lengths
    layer = torch.nn.Sequential(model.embed, model.h[0], model.h[1])
    for row, tokens_of_row in enumerate(rows):
        alone = layer(tokens_of_row[None])[0]
        torch.testing.assert_close(store["h.1", "full"][row], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(store["h.1", "mean"][row], alone.mean(0), atol=1e-5, rtol=1e-5)

    shards = sorted((out / "shards").iterdir())
    gone = shards[lost % len(shards)]
    before = gone.read_bytes()
    gone.unlink()
    run()
    assert gone.read_bytes() == before


def test_a_unit_has_its_range_of_rows_whatever_order_they_come_in(tmp_path):
    lengths = [5, 1, 3, 4, 2, 9, 1, 1]
    plan = length_batches(lengths, batch_size=1, window_rows=4)
    made = batches(make_rows(lengths), plan, is_numbered=False)
    extract(BlockStack(), made, "h.0", out=tmp_path / "out", rows_per_unit=3, **OPTIONS)
    shards = sorted((tmp_path / "out/shards").iterdir())
    assert [len(load_file(shard)["#keep:length"]) for shard in shards] == [3, 3, 2]
    assert load_file(shards[0])["#keep:length"].tolist() == lengths[:3]


def test_a_store_in_another_order_is_another_run(tmp_path):
    model, made = BlockStack(), list(batches(make_rows([3, 1, 2]), [[0, 2, 1]]))
    extract(model, made, "h.0", out=tmp_path / "out", ids="id", **OPTIONS)
    changed = [{**batch, "place": [0, 1, 2]} for batch in made]
    with pytest.raises(OtherRunError, match="id 'row 2' in place of 'row 1' in row 1"):
        extract(model, changed, "h.0", out=tmp_path / "out", ids="id", **OPTIONS)


def test_layers_that_run_for_some_rows_keep_their_rows(tmp_path):
    class Sometimes(BlockStack):
        def forward(self, input_ids, attention_mask=None):
            x = self.h[0](self.embed(input_ids))
            return self.h[1](x) if len(input_ids) == 1 else x

    rows = make_rows([4, 4, 9])
    made = batches(rows, [[2], [0, 1]])
    store = extract(Sometimes(), made, ["h.0", "h.1"], out=tmp_path / "out", missing="skip", ids="id", **OPTIONS)
    assert store["h.1", "mean"].rows.tolist() == [2]
    assert store["h.0", "mean"].rows.tolist() == [0, 1, 2]
    assert store["h.1", "full"].lengths().tolist() == [9]


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([[0, 0]], r"order must hold each place once, got 0\."),
        ([[0, 1], [1, 2]], r"order must hold each place once, got 1\."),
        ([[0, 2]], r"order must hold place 1 where it holds place 2, got \[0, 2\]\. Sort rows within windows"),
        ([[1, 2]], r"order must hold place 0 where it holds place 2, got \[1, 2\]\."),
        ([[-1, 0]], r"order must hold each place once, got -1\."),
    ],
)
def test_places_that_are_none_of_a_data_set_are_an_error(tmp_path, places, text):
    made = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "place": one} for one in places]
    with pytest.raises(ArgumentError, match=text):
        extract(BlockStack(), made, "h.0", out=tmp_path / "out", order="place", reduce="mean", progress=False)
    assert not list((tmp_path / "out").glob("shards/*.safetensors"))


@pytest.mark.parametrize("places", [["a", "b"], [0.0, 1.0], [True, False], torch.tensor([0.0, 1.0])])
def test_places_are_integers(places):
    with pytest.raises(ArgumentTypeError, match="order must hold the place of each row, counted from 0, got "):
        RowItems(None, None).places(Batch({}, None, places, None, {}))


@pytest.mark.parametrize("places", [[1, 0], torch.tensor([1, 0]), np.array([1, 0])])
def test_places_come_in_any_sequence_of_integers(places):
    assert RowItems(None, None).places(Batch({}, None, places, None, {})) == [1, 0]


def test_a_place_without_a_row_is_an_error(tmp_path):
    made = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "place": [0, 1, 2]}]
    with pytest.raises(
        StepError, match=r"A step must have the rows of its batch, got 2 rows for a batch of 3\. Give each row an id"
    ):
        extract(BlockStack(), made, "h.0", out=tmp_path / "out", order="place", reduce="mean", progress=False)


def test_order_names_an_entry(tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"order must name a field of the batches, got 3\."):
        extract(BlockStack(), [], "h.0", out=tmp_path / "out", order=3)


def test_an_ordered_store_opens_without_ids_only_when_it_is_whole(tmp_path):
    lengths = [1, 2, 3, 4]
    made = batches(make_rows(lengths), length_batches(lengths, batch_size=1, window_rows=1), is_numbered=False)
    extract(BlockStack(), made, "h.0", out=tmp_path / "out", rows_per_unit=1, **OPTIONS)
    (tmp_path / "out/shards/00000001.safetensors").unlink()
    for journal in (tmp_path / "out/journal").iterdir():
        journal.unlink()
    with pytest.raises(OSError, match="1 of 4 missing: '00000001'"):
        open_store(tmp_path / "out")
    assert open_store(tmp_path / "out", partial=True).ids == [0, 2, 3]
