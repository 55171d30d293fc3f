from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from engine_models import rows_of

from activation_extractor.errors import ArgumentError, ArgumentTypeError, LayerNotFoundError, StepError
from activation_extractor.examples import minilm
from activation_extractor.runs import Columns

SMALL = "engine_models:small"
TOKENS = {"columns": ["input_ids"]}
X = np.ones((2, 6), np.int64)


def refused(error=ArgumentError, *, rows=None, model=SMALL, layers="h.0", **options) -> str:
    """The text of the error of a batch, which came through a pickle, as from another process."""
    columns = Columns(model, layers, **options)
    with pytest.raises(error) as caught:
        columns(rows_of() if rows is None else rows)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)
    return str(again)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": "small"}, "model must be 'package.module:factory', a function that returns the model, or a model"),
        ({"model": "engine_models"}, "got 'engine_models'"),
        ({"model": 7}, "got 7"),
        ({"model": None}, "got None"),
        ({"prepare": "padded"}, "prepare must be 'package.module:function' or a function, got 'padded'"),
        ({"prepare": 3}, "prepare must be"),
        ({"ids": 3}, "ids must name a column, or be None, got 3"),
        ({"ids": ["a"]}, "ids must name a column"),
        ({"keep": 3}, "keep must name columns, got 3"),
        ({"columns": 3}, "columns must name columns, got 3"),
        ({"columns": [3]}, "columns must name columns"),
        ({"columns": {"x": 3}}, "columns must name columns"),
        ({"to": "torch"}, "to must be one of 'numpy', 'arrow', 'pandas', got 'torch'"),
        ({"bits": "yes"}, "bits must be True or False"),
        ({"reduce": "middle"}, "'middle'"),
        ({"calls": "first"}, "calls must be one of"),
        ({"weights": "w"}, "weights must be left out where reduce= lacks the word 'weighted_mean'"),
        ({"pooling_mask": "counts", "mask": "other"}, "mask must be left out with pooling_mask"),
        ({"stop_early": 1}, "stop_early must be True or False"),
    ],
)
def test_a_wrong_argument_is_said_at_the_door_without_the_model(options, text):
    with pytest.raises(ArgumentError) as caught:
        Columns(**{"model": SMALL, "layers": "h.*"} | options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"model": "no_such_module:build"},
            "model must name a module that can be imported, got 'no_such_module:build'",
        ),
        ({"model": "engine_models:smal"}, "Close matches: 'small'"),
        ({"model": "engine_models:broken"}, "It raised FileNotFoundError: no weights at /models/large."),
        ({"model": "engine_models:nothing"}, "what 'engine_models:nothing' returns must be a torch.nn.Module"),
        ({"model": "engine_models:SEEN"}, "model must name a function that returns the model"),
        ({"prepare": "engine_models:none"}, "prepare must name something that 'engine_models' holds"),
        ({"prepare": "engine_models:SEEN"}, "prepare must name a function"),
        ({"prepare": "engine_models:failing"}, "It raised KeyError: 'no such column'."),
        ({"prepare": lambda columns: columns["nothing"]}, "prepare must make the model's arguments of the columns"),
    ],
)
def test_a_model_or_function_that_a_worker_lacks_is_one_clear_error(options, text):
    assert text in refused(**options)


def test_a_layer_that_the_model_lacks_is_said_with_close_matches():
    assert "Close matches" in refused(LayerNotFoundError, layers="h.7", **TOKENS)


@pytest.mark.parametrize("kind", [dict, pa.table, pd.DataFrame])
def test_a_column_that_is_missing_is_named_with_those_that_are_there(kind):
    rows = kind({"key": [1, 2], "input_ids": list(X)})
    text = refused(rows=rows, **TOKENS)
    assert "the columns of ids= must hold 'id', got ['key', 'input_ids']. ids=None leaves ids out" in text
    text = refused(rows=rows, ids="key", columns=["tokens"])
    assert "the columns of columns= must hold 'tokens', got ['key', 'input_ids']" in text
    assert "the columns of keep= must hold 'label'" in refused(rows=rows, ids="key", keep="label", **TOKENS)


@pytest.mark.parametrize(
    "ids",
    [[1, None], np.array([1, np.nan]), pa.array([1, None]), pd.Series([1, None]), pd.Series([1, None], dtype="Int64")],
)
def test_an_id_that_is_missing_is_said_with_its_row(ids):
    text = refused(rows={"id": ids, "input_ids": X}, **TOKENS)
    assert "the column 'id' must hold an id in each row" in text
    assert "row 1" in text


def test_ids_are_strings_or_integers():
    assert "ids must be all strings or all integers" in refused(rows={"id": [1.5, 2.5], "input_ids": X}, **TOKENS)
    assert "ids must be all strings or all integers" in refused(rows={"id": [1, "a"], "input_ids": X}, **TOKENS)
    assert "ids must be" in refused(rows={"id": [b"a", b"b"], "input_ids": X}, **TOKENS)


@pytest.mark.parametrize("kind", [dict, pa.table, pd.DataFrame])
def test_text_without_prepare_is_an_error_that_names_the_column(kind):
    rows = kind({"id": [1, 2], "text": ["Let there be light", "Amen"]})
    text = refused(rows=rows)
    assert "the column 'text' must hold numbers where there is no prepare=, got 'Let there be light'" in text
    assert "Pass prepare=" in text


@pytest.mark.parametrize("kind", [dict, pa.table, pd.DataFrame])
def test_ragged_columns_without_prepare_are_an_error_that_says_the_shapes(kind):
    rows = kind({"id": [1, 2, 3], "input_ids": [[1, 2], [3, 4, 5], [6]]})
    text = refused(rows=rows)
    assert "the column 'input_ids' must hold rows of one shape where there is no prepare=" in text
    assert "(2,)" in text
    assert "(3,)" in text


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0, None]),
        pa.array([[1.0, None], [2.0, 3.0]]),
        pa.array([[1.0, None], [2.0, 3.0]], pa.list_(pa.float32(), 2)),
        pd.Series([1, None], dtype="Int64"),
        pd.Series([True, None]),
        [1, None],
        [{"bytes": b""}, {"bytes": b""}],
        [b"a", b"b"],
        np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
    ],
    ids=str,
)
def test_what_is_missing_or_no_number_is_never_taken_for_one(column):
    text = refused(rows={"id": [1, 2], "input_ids": column})
    assert "the column 'input_ids' must hold numbers in each row where there is no prepare=" in text


def test_rows_one_by_one_are_refused_with_what_hands_over_many():
    for row in ({"id": "a", "input_ids": X[0]}, {"id": 7, "input_ids": X[0]}):
        text = refused(ArgumentTypeError, rows=row)
        assert "the column 'id' must hold many rows" in text
        assert "map_batches" in text
    assert "a batch must be a dict of columns, an Arrow table or a pandas frame, got 'list'" in refused(rows=[{}])
    assert "as many rows in each column" in refused(rows={"id": [1, 2, 3], "input_ids": X})


def test_other_rows_than_those_of_the_batch_are_an_error():
    text = refused(StepError, rows={"id": [1, 2], "input_ids": X}, prepare=lambda columns: {"input_ids": X[:1]})
    assert "same rows" in text


def test_columns_that_the_model_does_not_take_are_said_with_what_it_was_called_with():
    rows = {"id": [1, 2], "input_ids": X, "url": X}
    columns = Columns(SMALL, "h.0")
    with pytest.raises(ArgumentTypeError, match=r"BlockStack\.forward takes") as caught:
        columns(rows)
    assert caught.value.__notes__ == ["The model was called with input_ids=int64 (2, 6), url=int64 (2, 6)."]


def test_a_name_that_comes_twice_in_what_is_returned_is_an_error():
    rows = {"key": [1, 2], "input_ids": X, "h.0": [1, 2], "id": [3, 4]}
    options = {"rows": rows, "ids": "key", **TOKENS}
    assert "keep must have other names than the layers and 'id', got 'h.0'" in refused(keep="h.0", **options)
    assert "keep must leave the name 'id' to the ids" in refused(keep="id", **options)


def test_a_tokenizer_is_given_the_one_column_of_text():
    options = {"model": minilm, "layers": "encoder.layer.0", "reduce": "mean"}
    rows = {"id": [1, 2], "text": ["Amen", "Let there be light"], "label": [0, 1]}
    out = Columns(keep="label", **options)(rows)
    assert out["encoder.layer.0"].shape == (2, 384)
    np.testing.assert_array_equal(Columns(columns="text", **options)(rows)["encoder.layer.0"], out["encoder.layer.0"])
    assert "be one of text where a tokenizer prepares them, got ['text', 'label']" in refused(rows=rows, **options)


def test_an_error_whose_value_cannot_be_pickled_reaches_the_other_process_with_its_text():
    error = ArgumentError("model", "be picklable", lambda: None)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.argument == "model"
    assert "a function" in again.value


def test_complex_numbers_have_no_place_in_a_table():
    columns = Columns(SMALL, "h.0", reduce={"c": lambda activation, mask: activation.mean(1).to(complex)}, **TOKENS)
    assert columns(rows_of())["h.0"].dtype == np.complex128
    with pytest.raises(ArgumentError, match=r"the column 'h\.0' of a table must hold real numbers"):
        columns(pa.table({"id": [1, 2], "input_ids": list(X)}))
