from __future__ import annotations

import pickle
import threading
import time
import warnings

import engine_models
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from engine_models import rows_of
from PIL import Image
from small_runs import MASK, TOKENS, batch, small_model
from torch import nn

from activation_extractor import extract, outputs, weighted_mean
from activation_extractor.runs import Columns

LAYERS, REDUCERS = ["h.0", "h.1"], ["mean", "last"]
SMALL = "engine_models:small"


def stored(path, rows=slice(0, 8), *, model=None, layers=LAYERS, **options):
    store = extract(
        model or small_model(), [batch(rows)], layers, out=path, ids="id", keep="label", progress=False, **options
    )
    return {f"{layer}:{reducer}": store[layer, reducer].numpy() for layer, reducer in store.pairs}


def made(**options) -> Columns:
    return Columns(SMALL, LAYERS, **{"reduce": REDUCERS, "keep": "label"} | options)


def as_arrow(columns: dict) -> pa.Table:
    return pa.table({name: list(values) if np.ndim(values) > 1 else values for name, values in columns.items()})


def as_tensors_of_arrow(columns: dict) -> pa.Table:
    tokens, mask = columns["input_ids"], columns["attention_mask"].astype(np.uint8)
    tensors = {"input_ids": pa.FixedShapeTensorArray.from_numpy_ndarray(tokens)}
    tensors["attention_mask"] = pa.FixedShapeTensorArray.from_numpy_ndarray(mask)
    return pa.table({**columns, **tensors})


def as_frame(columns: dict) -> pd.DataFrame:
    return pd.DataFrame({name: list(values) for name, values in columns.items()}, index=range(7, 15))


def as_lists(columns: dict) -> dict:
    return {name: values.tolist() for name, values in columns.items()}


def as_tensors(columns: dict) -> dict:
    return {**columns, "input_ids": TOKENS[:8], "attention_mask": list(MASK[:8])}


def read_only(columns: dict) -> dict:
    for values in columns.values():
        values.setflags(write=False)
    return columns


def whole(activation, mask):
    """What `full` gives, padding too: a tensor of the same shape for each row."""
    return activation


def numbers(column) -> np.ndarray:
    """A column of any kind, by the kind's own means."""
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks().to_numpy_ndarray()
    return np.stack(list(column)) if isinstance(column, pd.Series) else column


KINDS = {
    "a dict of arrays": (dict, dict),
    "a dict of arrays that nobody may write to": (read_only, dict),
    "a dict of lists": (as_lists, dict),
    "a dict of tensors": (as_tensors, dict),
    "a table of lists": (as_arrow, pa.Table),
    "a table of tensors": (as_tensors_of_arrow, pa.Table),
    "a batch of records": (lambda columns: as_arrow(columns).to_batches()[0], pa.Table),
    "a table in chunks": (lambda columns: pa.concat_tables([as_arrow(columns)[:3], as_arrow(columns)[3:]]), pa.Table),
    "a part of a table": (lambda columns: as_arrow(rows_of(slice(0, 20)))[:8], pa.Table),
    "a frame": (as_frame, pd.DataFrame),
    "a frame of Arrow": (lambda columns: as_arrow(columns).to_pandas(types_mapper=pd.ArrowDtype), pd.DataFrame),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_every_kind_give_what_extract_stores_in_the_same_kind(tmp_path, kind):
    convert, returned = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = made()(convert(rows_of()))
    assert isinstance(out, returned)
    names = out.column_names if isinstance(out, pa.Table) else list(out)
    assert names == ["id", "label", *(f"{layer}:{reducer}" for layer in LAYERS for reducer in REDUCERS)]
    for name, values in stored(tmp_path, reduce=REDUCERS).items():
        np.testing.assert_array_equal(numbers(out[name]), values, strict=True)
    assert [str(row_id) for row_id in out["id"]] == [f"row {number}" for number in range(8)]
    if isinstance(out, pd.DataFrame) and kind == "a frame":
        assert list(out.index) == list(range(7, 15))


def test_tables_hold_tensors_of_a_fixed_shape_that_parquet_keeps(tmp_path):
    import pyarrow.parquet as pq

    norms = {"whole": whole, "norm": lambda activation, mask: activation.norm(dim=(1, 2))}
    columns = Columns(SMALL, "h.0", reduce=norms, columns=["input_ids"], to="arrow")
    pq.write_table(columns(rows_of()), tmp_path / "rows.parquet")
    schema = pq.read_schema(tmp_path / "rows.parquet")
    assert schema.field("h.0:whole").type == pa.fixed_shape_tensor(pa.float32(), (6, 8))
    assert schema.field("h.0:norm").type == pa.float32()
    read = pq.read_table(tmp_path / "rows.parquet")
    expected = columns(as_lists(rows_of()))
    assert expected.schema == read.schema
    np.testing.assert_array_equal(numbers(read["h.0:whole"]), numbers(expected["h.0:whole"]), strict=True)


def test_ragged_columns_have_an_array_or_a_list_a_row(tmp_path):
    store = extract(small_model(), [batch(slice(0, 8))], "h.0", out=tmp_path, ids="id", keep="label", progress=False)
    columns = Columns(SMALL, "h.0", keep="label")
    for out in (columns(rows_of())["h.0"], columns(as_frame(rows_of()))["h.0"]):
        for row, expected in zip(out, store["h.0"], strict=True):
            np.testing.assert_array_equal(row, expected.numpy(), strict=True)
    table = columns(as_arrow(rows_of()))
    assert table.schema.field("h.0").type.value_type == pa.list_(pa.field("item", pa.float32()), 8)
    assert table["h.0"].to_pylist() == [row.tolist() for row in store["h.0"]]


def test_bfloat16_is_float32_or_its_bits():
    expected = {}
    with torch.inference_mode():
        model = engine_models.in_bfloat16()
        expected = model.h[0](model.embed(TOKENS[:8])).float().numpy()
    columns = {"layers": "h.0", "columns": ["input_ids"], "reduce": whole}
    out = Columns("engine_models:in_bfloat16", **columns)(rows_of())["h.0"]
    np.testing.assert_array_equal(out, expected, strict=True)
    bits = Columns("engine_models:in_bfloat16", bits=True, **columns)
    out = bits(rows_of())["h.0"]
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(torch.from_numpy(out).view(torch.bfloat16).float().numpy(), expected)
    table = bits(as_arrow(rows_of()))
    assert table.schema.field("h.0").type == pa.fixed_shape_tensor(pa.uint16(), (6, 8))
    assert table.schema.field("h.0").metadata[b"dtype"] == b"bfloat16"


@pytest.mark.parametrize("prepare", ["engine_models:padded", engine_models.padded, None])
@pytest.mark.parametrize("kind", [dict, pa.table, pd.DataFrame])
def test_ragged_rows_are_padded_by_prepare(tmp_path, prepare, kind):
    rows = rows_of()
    tokens = [row[is_real] for row, is_real in zip(rows["input_ids"], rows["attention_mask"], strict=True)]
    ragged = kind({"id": rows["id"], "tokens": tokens})
    model = SMALL if prepare else "engine_models:in_pairs"
    out = Columns(model, LAYERS, reduce=REDUCERS, prepare=prepare)(ragged)
    for name, values in stored(tmp_path, reduce=REDUCERS).items():
        np.testing.assert_allclose(numbers(out[name]), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [dict, as_arrow, pd.DataFrame, pa.table])
def test_text_comes_to_prepare_as_strings(kind):
    rows = {"id": [3, 1], "text": ["Let there be light", "Amen"]}
    out = Columns(SMALL, "h.0", reduce="mean", prepare="engine_models:letters", columns="text")(kind(rows))
    assert numbers(out["h.0"]).shape == (2, 8)
    assert [int(row_id) if not hasattr(row_id, "as_py") else row_id.as_py() for row_id in out["id"]] == [3, 1]


def test_images_come_to_prepare_as_they_are_also_where_they_are_alike():
    seen = []
    prepare = lambda given: seen.append(given["image"]) or {"input_ids": torch.ones(2, 3, dtype=torch.int64)}  # noqa: E731
    for sizes in ([(4, 4), (4, 4)], [(4, 4), (2, 3)]):
        images = [Image.new("RGB", size) for size in sizes]
        Columns(SMALL, "h.0", reduce="mean", prepare=prepare)({"id": [1, 2], "image": images})
        assert seen.pop() == images


def test_one_column_may_be_the_models_first_argument_and_others_are_renamed():
    rows = {"id": [1, 2], "tokens": TOKENS[:2].numpy(), "mask": MASK[:2].numpy(), "other": ["a", "b"]}
    alone = Columns(SMALL, "h.0", reduce=whole, columns="tokens")(rows)["h.0"]
    named = Columns(SMALL, "h.0", reduce=whole, columns={"input_ids": "tokens"})(rows)["h.0"]
    np.testing.assert_array_equal(alone, named)
    both = Columns(SMALL, "h.0", reduce="mean", columns={"input_ids": "tokens", "attention_mask": "mask"})(rows)
    first = alone[0][MASK[0].numpy()].mean(0)
    np.testing.assert_allclose(both["h.0"][0], first, rtol=1e-5, atol=1e-6)


def test_layers_are_the_blocks_by_default_and_may_be_any_selection():
    assert list(Columns(SMALL, columns=["input_ids"])(rows_of())) == ["id", "h.0", "h.1"]
    select = {"first": outputs("h.0")}
    assert list(Columns(SMALL, select, columns=["input_ids"])(rows_of())) == ["id", "first"]


def test_fields_of_pooling_are_taken_from_the_arguments(tmp_path):
    weights = np.linspace(0, 1, 48, dtype=np.float32).reshape(8, 6) + MASK[:8].numpy()
    rows = {**rows_of(), "weights": weights * MASK[:8].numpy()}
    out = Columns(SMALL, LAYERS, reduce="weighted_mean", weights="weights", keep="label")(rows)
    fields = {**batch(slice(0, 8)), "weights": torch.from_numpy(rows["weights"])}
    options = {"reduce": "weighted_mean", "weights": "weights", "ids": "id", "keep": "label", "progress": False}
    store = extract(small_model(), [fields], LAYERS, out=tmp_path / "a", **options)
    np.testing.assert_array_equal(out["h.0"], store["h.0"].numpy())
    again = Columns(SMALL, LAYERS, reduce=weighted_mean("weights"), keep="label")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again))(rows)["h.0"], out["h.0"])
    masked = {**rows_of(), "counts": np.ones((8, 6), bool)}
    out = Columns(SMALL, "h.0", reduce="mean", pooling_mask="counts", keep="label")(masked)
    plain = Columns(SMALL, "h.0", reduce="mean", columns=["input_ids"])(rows_of())
    np.testing.assert_array_equal(out["h.0"], plain["h.0"])


def test_floats_of_python_become_what_torch_makes_of_them_and_others_stay():
    seen = []

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            seen.append(x.dtype)
            return self.layer(x)

    columns = Columns(Seeing, "layer", columns="x")
    columns({"id": [1, 2], "x": [[1.5, 2.0], [3.0, 4.0]]})
    columns({"id": [1, 2], "x": [1.5, 2.0]})
    columns({"id": [1, 2], "x": np.array([[1.5], [2.0]])})
    columns({"id": [1, 2], "x": [np.array([1.5]), np.array([2.0])]})
    columns(pa.table({"id": [1, 2], "x": pa.array([[1.5], [2.0]], pa.list_(pa.float32()))}))
    columns({"id": [1, 2], "x": [[1], [2]]})
    columns({"id": [1, 2], "x": np.array([[1.5], [2.0]], ">f4")[::-1]})
    f, d = torch.float32, torch.float64
    assert seen == [f, f, d, d, f, torch.int64, f]
    times = []
    prepared = Columns(Seeing, "layer", prepare=lambda given: times.append(given["x"]) or torch.ones(1, 1))
    prepared({"id": [1], "x": [1732720000.123]})
    assert times[0].dtype == np.float64


def test_a_batch_without_rows_gives_columns_without_rows():
    columns = made()
    for kind in (dict, as_arrow, as_frame):
        convert = (lambda rows: as_frame(rows_of()).iloc[:0]) if kind is as_frame else kind
        empty = convert(rows_of(slice(0, 0))) if kind is not as_arrow else as_arrow(rows_of())[:0]
        assert list(columns(empty)["id"]) == []
        columns(kind(rows_of()))
        out = columns(empty)
        if kind is as_arrow:
            assert out.schema == columns(as_arrow(rows_of())).schema
        elif kind is dict:
            assert {name: (values.dtype, values.shape[1:]) for name, values in out.items()} == {
                name: (values.dtype, values.shape[1:]) for name, values in columns(rows_of()).items()
            }
        else:
            assert list(out) == list(columns(as_frame(rows_of())))


def test_it_is_pickled_without_the_model_which_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv(engine_models.SEEN, str(tmp_path))
    from activation_extractor.runs import _column_worker

    monkeypatch.setattr(_column_worker, "_MODELS", {})
    columns = made()
    size = len(pickle.dumps(columns))
    assert size < 1000
    out = columns(rows_of())
    again = pickle.loads(pickle.dumps(columns))
    assert len(pickle.dumps(columns)) == size
    np.testing.assert_array_equal(again(rows_of())["h.0:mean"], out["h.0:mean"])
    assert len(list(tmp_path.iterdir())) == 1
    assert repr(again) == repr(columns) == "Columns('engine_models:small', ['h.0', 'h.1'])"


def test_several_threads_build_one_model_and_each_gets_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setenv(engine_models.SEEN, str(tmp_path))
    from activation_extractor.runs import _column_worker

    monkeypatch.setattr(_column_worker, "_MODELS", {})
    one, other, results = made(), made(), {}

    def run(number):
        start = number * 5
        results[number] = (one if number % 2 else other)(rows_of(slice(start, start + 5)))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(list(tmp_path.iterdir())) == 1
    for number, out in results.items():
        expected = made()(rows_of(slice(number * 5, number * 5 + 5)))
        np.testing.assert_array_equal(out["h.1:mean"], expected["h.1:mean"])


def test_threads_that_meet_in_one_model_take_turns():
    model = small_model()
    model.embed.register_forward_hook(lambda *_: time.sleep(0.02))
    columns, results = Columns(model, LAYERS, reduce=REDUCERS, keep="label", pooling_mask="counts"), {}

    def run(number):
        rows = rows_of(slice(number * 5, number * 5 + 5))
        results[number] = columns({**rows, "counts": rows["attention_mask"]})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number in range(8):
        expected = made()(rows_of(slice(number * 5, number * 5 + 5)))
        np.testing.assert_array_equal(results[number]["h.1:mean"], expected["h.1:mean"])


def test_a_model_may_be_given_and_keeps_its_mode():
    model = small_model()
    model.train()
    out = Columns(model, "h.0", reduce="mean", columns=["input_ids"])(rows_of())
    assert model.training
    assert all(module.training for module in model.modules())
    np.testing.assert_array_equal(
        out["h.0"], Columns(SMALL, "h.0", reduce="mean", columns=["input_ids"])(rows_of())["h.0"]
    )


def test_without_ids_rows_are_those_of_the_batch():
    out = Columns(SMALL, "h.0", ids=None, columns=["input_ids"])(rows_of())
    assert list(out) == ["h.0"]


def test_ids_of_any_column_are_handed_back_as_id_with_their_type():
    table = pa.table({"key": pa.array([4, 2], pa.int32()), "input_ids": TOKENS[:2].tolist()})
    out = Columns(SMALL, "h.0", ids="key", keep="key")(table)
    assert out.column_names == ["id", "key", "h.0"]
    assert out.schema.field("id").type == pa.int32()


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch):
    model = small_model()
    model.register_forward_pre_hook(_refuse_large, with_kwargs=True)
    with pytest.warns(UserWarning, match="does not fit into memory"):
        out = Columns(model, LAYERS, reduce=REDUCERS, keep="label")(rows_of())
    np.testing.assert_allclose(out["h.0:mean"], made()(rows_of())["h.0:mean"], rtol=1e-5, atol=1e-6)


def _refuse_large(module, args, arguments):
    if len(arguments["input_ids"]) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
