"""`open_store`: columns, ids and names come back as they went in."""

from __future__ import annotations

import os
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import that_safetensors_reads
from safetensors.torch import load_file
from stores import shards
from torch import nn

from activation_extractor import SafetensorsSink, Store, capture, open_store
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, ArgumentTypeError
from activation_extractor.sinks import Step
from activation_extractor.sinks._step import check_ids


def written(folder: Path, values: dict, *, ids=None, keep=None, rows_per_unit=None, steps=1) -> Store:
    """A store of the given columns, cut into steps of equal rows."""
    sink = SafetensorsSink(folder / "out", rows_per_unit=rows_per_unit)
    rows = len(next(iter(values.values()))) // steps
    for index in range(steps):
        part = slice(index * rows, (index + 1) * rows)
        kept = {name: column[part] for name, column in (keep or {}).items()}
        columns = {key: value[part] for key, value in values.items()}
        sink.write(Step(index, rows, columns, None if ids is None else ids[part], kept))
    sink.close()
    return open_store(folder / "out")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    values = {(name, reducer): torch.randn(6, 3) for name in ("h.0", "h.1") for reducer in ("mean", "last")}
    keep = {"label": torch.arange(6), "weight": torch.randn(6, 2)}
    return written(tmp_path, values, ids=list("abcdef"), keep=keep, rows_per_unit=2, steps=3)


def test_a_store_is_a_mapping_of_columns(store):
    assert (store.names, store.reducers, store.rows) == (["h.0", "h.1"], ["mean", "last"], 6)
    assert list(store) == [("h.0", "mean"), ("h.0", "last"), ("h.1", "mean"), ("h.1", "last")]
    assert len(store) == 4
    assert all(store[key].shape == (6, 3) for key in store)
    assert ("h.0", "max") not in store
    assert "h.0" not in store  # which reducer?
    assert store["h.0", "LT"].numpy().tolist() == store["h.0", "last"].numpy().tolist()


def test_columns_ids_and_kept_columns_are_what_the_shards_hold(store):
    shards = [load_file(path) for path in sorted(store.path.glob("shards/*"))]
    assert len(shards) == 3
    for layer, reducer in store:
        assert torch.equal(store[layer, reducer].torch(), torch.cat([shard[f"{layer}:{reducer}"] for shard in shards]))
    assert store.ids == list("abcdef")
    assert store.keep["label"].torch().tolist() == [0, 1, 2, 3, 4, 5]
    assert store.keep["weight"].shape == (6, 2)
    assert store.nbytes == sum(path.stat().st_size for path in store.path.glob("shards/*"))


def test_shards_are_listed_in_the_order_of_the_rows_without_being_opened(store, monkeypatch):
    files = sorted(store.path.glob("shards/*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", pytest.fail)
        listed = [(shard.path, shard.rows, shard.nbytes) for shard in store.shards]
    assert listed == [(path, 2, path.stat().st_size) for path in files]


def test_first_ids_need_the_first_shard_alone(store):
    for path in sorted(store.path.glob("shards/*"))[1:]:
        path.unlink()
    assert list(islice(store.iter_ids(), 2)) == ["a", "b"]


def test_ids_of_a_store_without_ids_are_numbers_one_by_one_too(tmp_path):
    assert list(written(tmp_path, {("h.0", "mean"): torch.zeros(3, 2)}).iter_ids()) == [0, 1, 2]


def test_the_fingerprint_is_what_the_values_depend_on(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.begin({"mask": "attention_mask"})
    sink.write(Step(0, 1, {("h.0", "mean"): torch.zeros(1, 2)}))
    sink.close()
    assert open_store(tmp_path / "out").fingerprint == {"mask": "attention_mask"}


def test_a_notebook_shows_the_table_that_repr_shows(tmp_path):
    store = written(tmp_path, {("<b>", "mean"): torch.zeros(2, 3), ("h.1", "mean"): torch.ones(2, 3).bfloat16()})
    title, *rows = repr(store).split("\n")
    html = store._repr_html_().split("\n")
    assert html[1] == f"<caption>{title.replace(chr(39), '&#x27;')}</caption>"
    lines = ["layer shape dtype", "<b> (2, 3) float32", "h.1 (2, 3) bfloat16"]
    assert [" ".join(row.split()) for row in rows] == lines
    assert html[2:-1] == [
        "<tr><th>layer</th><th>shape</th><th>dtype</th></tr>",
        "<tr><td>&lt;b&gt;</td><td>(2, 3)</td><td>float32</td></tr>",
        "<tr><td>h.1</td><td>(2, 3)</td><td>bfloat16</td></tr>",
    ]


def test_one_reducer_need_not_be_said(tmp_path):
    store = written(tmp_path, {("h.0", "mean"): torch.zeros(2, 3), ("h.1", "mean"): torch.ones(2, 3)})
    assert list(store) == ["h.0", "h.1"]
    assert store["h.1"].numpy().tolist() == store["h.1", "mean"].numpy().tolist() == [[1, 1, 1]] * 2
    assert store.ids == [0, 1]  # row numbers where none were given
    assert store.keep == {}


def test_rows_without_ids_are_numbered_through_all_shards(tmp_path):
    store = written(tmp_path, {("a", "mean"): torch.zeros(6, 1)}, steps=3, rows_per_unit=2)
    assert len(list(store.path.glob("shards/*"))) == 3
    assert store.ids == [0, 1, 2, 3, 4, 5]


def test_an_integer_id_comes_back_as_an_integer(tmp_path):
    store = written(tmp_path, {("a", "mean"): torch.zeros(4, 1)}, ids=[7, -3, 2**63 - 1, 0], steps=2, rows_per_unit=2)
    assert store.ids == [7, -3, 2**63 - 1, 0]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (("h.O", "mean"), r"Nothing is recorded under 'h\.O'\. Close matches: '"),
        ("zebra", r"Nothing is recorded under 'zebra'\. There is 'h\.0', 'h\.1'\."),
        ("h.0", r"A key must say which reducer is meant \('mean', 'last'\), got 'h\.0'\. Write \['h\.0', 'mean'\]\."),
        (("h.0", "max"), r"A reducer in a key must be one of 'mean', 'last', got 'max'\."),
        (3, "Nothing is recorded under 3"),
    ],
)
def test_a_key_that_is_not_there_is_an_error_with_advice(store, key, text):
    with pytest.raises(ActivationNotFoundError, match=text) as caught:
        store[key]
    assert isinstance(caught.value, KeyError)
    assert store["h.0", "mean"].shape == (6, 3)  # as the text advises


def test_a_repr_shows_columns_and_rows(store):
    text = repr(store)
    assert "of 6 rows" in text
    assert "h.1 last (6, 3) float32" in " ".join(text.split())


HOSTILE = [
    "ünïcödé.日本.🙂",
    "../../etc/passwd",
    "/absolute",
    "a:b#c%d\\e",
    "%3A",
    "name:input",
    "x#0",
    "__metadata__",
    "#ids",
    "#keep:label",
    "a\nb\tc",
    "nul\0l",
    '"quoted"',
    " ",
    "long" * 200,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_comes_back_as_it_went_in_and_makes_no_path(tmp_path, name):
    keep = {name: torch.tensor([3, 4])}
    store = written(tmp_path, {(name, name): torch.tensor([[1.0], [2.0]])}, ids=[name, name + "2"], keep=keep)
    assert store.names == [name]
    assert store.reducers == [name]
    assert store.ids == [name, name + "2"]
    assert store[name, name].numpy().tolist() == [[1], [2]]
    assert {key: column.numpy().tolist() for key, column in store.keep.items()} == {name: [3, 4]}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    (shard,), (journal,) = shards(tmp_path / "out"), (tmp_path / "out/journal").iterdir()
    assert files == {"out/manifest.json", f"out/shards/{shard.name}", f"out/journal/{journal.name}"}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.text(), min_size=1, max_size=4, unique=True), st.lists(st.text(), min_size=2, max_size=2, unique=True)
)
def test_any_names_and_ids_come_back(names, ids):
    with tempfile.TemporaryDirectory() as folder:
        values = {(name, "mean"): torch.full((2, 1), float(index)) for index, name in enumerate(names)}
        store = written(Path(folder), values, ids=ids)
        assert store.names == names
        assert store.ids == ids
        assert [store[name].numpy()[0, 0] for name in names] == list(range(len(names)))


def test_an_id_that_is_no_text_is_a_clear_error():
    with pytest.raises(ArgumentError, match="ids must be UTF-8 text or fit 64 bits"):
        check_ids(["\ud800"])


@pytest.mark.parametrize(
    "dtype",
    that_safetensors_reads(
        [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]
    ),
)
def test_a_column_keeps_its_dtype(tmp_path, dtype):
    values = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    column = written(tmp_path, {("a", "full"): values})["a"]
    (shard,) = (tmp_path / "out").glob("shards/*")
    assert load_file(shard)["a:full"].dtype == dtype
    for part in (column.torch(), column[0:3], column[[0, 1, 2]]):
        assert part.dtype == dtype
        assert part.to(torch.complex64).tolist() == values.to(torch.complex64).tolist()
    has_numpy = dtype not in (torch.bfloat16, torch.float8_e4m3fn)
    assert np.asarray(column).dtype == (values.numpy().dtype if has_numpy else np.float32)
    assert column.dtype == dtype


def test_a_bf16_model_gives_a_bf16_store(stack, tokens, tmp_path):
    model = stack.bfloat16()
    with capture(model, "h.3", reduce=["mean", "last"], sink=tmp_path / "out"):
        result = model(tokens)
    store = open_store(tmp_path / "out")
    assert store["h.3", "last"].dtype == torch.bfloat16
    assert torch.equal(store["h.3", "last"].torch(), result[:, -1])
    assert store["h.3", "last"].numpy().dtype == np.float32


def test_a_short_column_carries_the_rows_that_it_has(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rarely = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor, is_rare: bool) -> torch.Tensor:
            return self.rarely(self.always(x)) if is_rare else self.always(x)

    model = Sometimes()
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=4)
    with capture(model, "*", sink=sink, missing="skip") as acts:
        for number, is_rare in enumerate([False, True, False, False, True, True, True]):
            with acts.step(ids=[2 * number, 2 * number + 1]):
                model(torch.full((2, 3), float(number)), is_rare)
    store = open_store(tmp_path / "out")
    column = store["rarely"]
    assert column.rows.tolist() == [2, 3, 8, 9, 10, 11, 12, 13]
    assert [store.ids[row] for row in column.rows] == column.rows.tolist()
    assert column.torch()[:, 0].tolist() == [1, 1, 4, 4, 5, 5, 6, 6]
    assert store["always"].rows.tolist() == list(range(14))
    assert store.rows == 14
    shards = [load_file(path) for path in sorted(store.path.glob("shards/*"))]
    assert ["rarely:full#rows" in shard for shard in shards] == [True, False, False, False]
    assert ["rarely:full" in shard for shard in shards] == [True, False, True, True]


def test_calls_that_differ_in_number_become_columns_with_their_rows(stack, tokens, tmp_path):
    with capture(stack, "h.3", reduce="last", calls="all", sink=tmp_path / "out") as acts:
        for calls in (1, 3, 2):
            with acts.step():
                for _ in range(calls):
                    stack(tokens)
    store = open_store(tmp_path / "out")
    assert store.names == ["h.3#0", "h.3#1", "h.3#2"]
    assert [store[name].rows.tolist() for name in store.names] == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 3]]


def test_what_is_still_being_written_opens_to_its_finished_units(tmp_path):
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=2)
    for index in range(3):
        sink.write(Step(index, 1, {("a", "mean"): torch.full((1, 1), float(index))}, [index], {}))
    sink._writer.finish()  # the first unit is on the disk, the second under way
    for stray in (".00000001.safetensors.tmp", "._00000000.safetensors", "notes.txt"):
        (tmp_path / "out/shards" / stray).write_bytes(b"half")
    assert open_store(tmp_path / "out").ids == [0, 1]
    sink.close()
    assert open_store(tmp_path / "out").ids == [0, 1, 2]


def test_rows_are_looked_up_by_id(store):
    assert store.row_of("c") == 2
    assert store.rows_of(["f", "a", "f"]) == [5, 0, 5]
    assert store.rows_of([]) == []
    assert torch.equal(store["h.0", "mean"][store.rows_of(["b", "e"])], store["h.0", "mean"].torch()[[1, 4]])


@pytest.mark.parametrize("row_id", ["g", 2, [1], None])
def test_an_id_that_is_not_there_is_an_error(store, row_id):
    with pytest.raises(ActivationNotFoundError, match=r"^No row has the id .*\. There is 'a', 'b', 'c' and 3 more\.$"):
        store.row_of(row_id)


def test_an_id_that_is_nearly_there_is_hinted_at(tmp_path):
    store = written(tmp_path, {("a", "mean"): torch.zeros(2, 1)}, ids=["P12345", "Q6GZX4"])
    with pytest.raises(ActivationNotFoundError, match=r"No row has the id 'P1234'\. Close matches: 'P12345'\."):
        store.row_of("P1234")


@pytest.mark.parametrize("one", ["ab", b"ab"])
def test_one_id_in_place_of_several_is_an_error(store, one):
    with pytest.raises(ArgumentTypeError, match=r"row_ids must be several ids, got b?'ab'\. Use row_of for one\."):
        store.rows_of(one)
