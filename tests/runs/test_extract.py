"""`extract`: a whole data set through a model, into a store."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack, count_hooks
from safetensors.torch import load_file
from stores import shards
from torch import nn
from torch.utils.data import DataLoader

from activation_extractor import capture, extract, open_store
from activation_extractor.errors import (
    ArgumentError,
    ArgumentTypeError,
    LayerNotFoundError,
    MissingExtraError,
    StoreError,
)

ROWS = torch.randn(6, 4)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(inplace=True))


def run(model, batches, out, **options):
    return extract(model, batches, options.pop("layers", "0"), out=out, progress=False, **options)


def shard_columns(folder: Path, entry: str) -> torch.Tensor:
    return torch.cat([load_file(path)[entry] for path in sorted(folder.glob("shards/*.safetensors"))])


Point = namedtuple("Point", "first")  # noqa: PYI024 - the plain kind is what is tested


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}, Point],
    ids=["tensor", "tuple", "list", "mapping", "namedtuple"],
)
def test_a_batch_may_be_a_tensor_positional_or_keyword_arguments(model, tmp_path, form):
    store = run(model, [form(ROWS[:4]), form(ROWS[4:])], tmp_path / "out")
    expected = torch.cat([model[0](ROWS[:4]), model[0](ROWS[4:])])
    assert torch.equal(shard_columns(tmp_path / "out", "0:full"), expected)
    assert torch.equal(store["0"].torch(), expected)
    assert store.ids == list(range(6))


def test_ids_and_kept_entries_are_taken_out_of_the_batch(model, tmp_path):
    batches = [
        {"input": ROWS[:4], "name": list("abcd"), "label": torch.arange(4), "weight": np.ones((4, 2))},
        {"input": ROWS[4:], "name": ("e", "f"), "label": [4, 5], "weight": np.zeros((2, 2))},
    ]
    before = [dict(batch) for batch in batches]
    store = run(model, batches, tmp_path / "out", ids="name", keep=["label", "weight"])
    assert store.ids == list("abcdef")
    assert shard_columns(tmp_path / "out", "#keep:label").tolist() == [0, 1, 2, 3, 4, 5]
    assert store.keep["weight"].shape == (6, 2)
    assert [list(batch) for batch in batches] == [list(batch) for batch in before]


def test_one_kept_entry_may_be_given_as_a_word(model, tmp_path):
    store = run(model, [{"input": ROWS, "label": torch.arange(6)}], tmp_path / "out", keep="label")
    assert store.keep["label"].numpy().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_data_loader_is_an_iterable_of_batches(model, tmp_path):
    rows = [{"input": row, "id": f"row {index}", "label": index} for index, row in enumerate(ROWS)]
    store = run(model, DataLoader(rows, batch_size=4), tmp_path / "out", ids="id", keep="label")
    assert store.ids == [f"row {index}" for index in range(6)]
    assert store.keep["label"].torch().tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(store["0"].torch(), model[0](ROWS))


def test_the_store_equals_one_that_a_with_block_writes(stack, tokens, tmp_path):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    batches = [{"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens + 1, "attention_mask": mask}]
    run(stack, batches, tmp_path / "a", layers="h.*", reduce=["mean", "last", "full"])
    with capture(stack, "h.*", reduce=["mean", "last", "full"], sink=tmp_path / "b"), torch.no_grad():
        for batch in batches:
            stack(**batch)
    one, other = (load_file(shards(tmp_path / name)[0]) for name in "ab")
    assert one.keys() == other.keys()
    assert len(one) == 4 * 4  # three reducers and the offsets of the ragged one
    assert all(torch.equal(one[entry], other[entry]) for entry in one)
    assert open_store(tmp_path / "a").manifest["columns"] == open_store(tmp_path / "b").manifest["columns"]


def test_the_model_runs_in_eval_and_inference_mode(model, tmp_path):
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    model.train()
    store = run(model, [ROWS], tmp_path / "out", layers="1")
    assert seen == [(False, True)]
    assert torch.equal(store["1"].torch(), model[0](ROWS))  # the dropout was off
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("flags", [(True, True, True), (False, False, False), (True, False, True)])
def test_training_flags_are_as_before_also_after_a_failure(model, tmp_path, flags, fails):
    for module, flag in zip(model, flags, strict=True):
        module.training = flag
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(model, [ROWS, torch.ones(2, 9)], tmp_path / "out")
    else:
        run(model, [ROWS], tmp_path / "out")
    assert tuple(module.training for module in model) == flags
    assert model.training
    assert count_hooks(model) == 0
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_whole_units_and_drops_the_one_under_way(model, tmp_path, error):
    def batches():
        for index in range(5):
            yield {"input": ROWS[:2], "id": [2 * index, 2 * index + 1]}
        raise error("disk of the data set")

    with pytest.raises(error, match="disk of the data set"):
        run(model, batches(), tmp_path / "out", ids="id", rows_per_unit=4)
    assert open_store(tmp_path / "out").ids == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [len(load_file(path)["0:full"]) for path in sorted(tmp_path.glob("out/shards/*"))] == [4, 4]


@pytest.mark.parametrize(
    "batches", [[torch.ones(2, 4), torch.ones(2, 9)], [torch.ones(0, 4)]], ids=["failure", "no_rows"]
)
def test_a_run_that_wrote_nothing_can_be_repeated_in_its_folder(model, tmp_path, batches):
    with pytest.raises((RuntimeError, ArgumentError)):
        run(model, batches, tmp_path / "out")
    run(model, [ROWS], tmp_path / "out")


@pytest.mark.parametrize("batches", [[], iter(()), [torch.ones(0, 4)]], ids=["list", "iterator", "no_rows"])
def test_no_rows_at_all_is_an_error(model, tmp_path, batches):
    with pytest.raises(ArgumentError, match="batches must hold at least one row, got "):
        run(model, batches, tmp_path / "out")


def test_a_batch_without_the_ids_is_an_error_that_shows_its_entries(model, tmp_path):
    with pytest.raises(ArgumentError, match=r"a batch must hold the field 'id', got \['input', 'idx'\]\. Check ids="):
        run(model, [{"input": ROWS, "idx": list(range(6))}], tmp_path / "out", ids="id")
    run(model, [{"input": ROWS, "idx": list(range(6))}], tmp_path / "out", ids="idx")  # as the text advises


@pytest.mark.parametrize(
    ("batch", "options", "text"),
    [
        ({"input": ROWS}, {"keep": "label"}, r"a batch must hold the field 'label', got \['input'\]"),
        (
            ROWS,
            {"ids": "id"},
            "a batch with ids, keep, order, pooling_mask or group must be a mapping or a tuple, got 'Tensor'",
        ),
        ((ROWS,), {"keep": ["label"]}, r"a batch must hold the field 'label', got \[0\]\. .*named by its position"),
        ((ROWS,), {"keep": 1}, r"a batch must hold the field 1, got \[0\]\. Check ids="),
        ({"input": ROWS}, {"ids": 0}, r"a batch must hold the field 0, got \['input'\]\. Check ids="),
        ("text", {}, "a batch must be a mapping, a tuple or a tensor, got 'str'"),
        (None, {}, "a batch must be a mapping, a tuple or a tensor, got 'NoneType'"),
        ({"input": ROWS, "id": 3}, {"ids": "id"}, "ids must be a sequence of strings or integers"),
        (
            {"input": ROWS, "label": [None] * 6},
            {"keep": "label"},
            "keep must hold numbers or text in column 'label'",
        ),
    ],
)
def test_a_batch_that_cannot_be_used_is_an_error_and_leaves_no_hook(model, tmp_path, batch, options, text):
    with pytest.raises(ArgumentError, match=text):
        run(model, [batch], tmp_path / "out", **options)
    assert count_hooks(model) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"layers": "9"}, LayerNotFoundError, "No layer matches '9'"),
        (
            {"ids": 3.0},
            ArgumentTypeError,
            "ids must name a field .*, by its key or position, or be a callable that takes a batch, got 3.0",
        ),
        ({"ids": True}, ArgumentTypeError, "ids must name a field of the batches, .* got True"),
        (
            {"keep": [-1]},
            ArgumentTypeError,
            r"keep must name fields of the batches, by their keys or positions, got \[-1",
        ),
        ({"rows_per_unit": 0}, ArgumentError, "rows_per_unit must be a positive integer, got 0"),
        ({"reduce": "median"}, ArgumentError, "reduce must be one of"),
        ({"calls": "first"}, ArgumentError, "calls must be one of"),
    ],
)
def test_a_wrong_argument_is_an_error_before_the_first_batch(model, tmp_path, options, error, text):
    def batches():
        raise AssertionError("nothing is asked for yet")
        yield

    with pytest.raises(error, match=text):
        run(model, batches(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", ["9", "0"])
def test_a_wrong_argument_draws_no_progress_bar(model, tmp_path, capsys, layers):
    (tmp_path / "mine").touch()
    with pytest.raises((LayerNotFoundError, StoreError)):
        extract(model, [ROWS], layers, out=tmp_path / ("out" if layers == "9" else ""), progress=True)
    assert capsys.readouterr().err == ""


def test_keep_must_be_names(model, tmp_path):
    with pytest.raises(ArgumentTypeError, match="keep must name fields"):
        run(model, [ROWS], tmp_path / "out", keep=5.0)


def test_a_folder_that_holds_something_is_refused_untouched(model, tmp_path):
    (tmp_path / "mine").write_text("mine")
    model.train()
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something"):
        run(model, [ROWS], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert model.training


def test_a_repeated_id_is_an_error(model, tmp_path):
    batches = [{"input": ROWS[:2], "id": ["a", "b"]}, {"input": ROWS[2:4], "id": ["c", "a"]}]
    with pytest.raises(StoreError, match="must hold each id once, got 'a' again"):
        run(model, batches, tmp_path / "out", ids="id")


def test_the_model_stays_where_it_is_and_takes_inputs_along(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2)).to(torch.float64)
    store = run(model, [ROWS.double()], tmp_path / "out", device="cpu")
    assert store["0"].dtype == torch.float64
    assert next(model.parameters()).device.type == "cpu"


def test_stop_early_stores_the_same(stack, tokens, tmp_path):
    run(stack, [tokens], tmp_path / "a", layers="h.0", reduce="mean", stop_early=True)
    run(stack, [tokens], tmp_path / "b", layers="h.0", reduce="mean")
    assert torch.equal(shard_columns(tmp_path / "a", "h.0:mean"), shard_columns(tmp_path / "b", "h.0:mean"))


def test_a_progress_bar_without_tqdm_is_an_error_that_says_what_to_install(model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tqdm" else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"needs tqdm, which is not installed\. Install it with: pip install"):
        extract(model, [ROWS], "0", out=tmp_path / "out", progress=True)
    assert list(tmp_path.iterdir()) == []
    assert extract(model, [ROWS], "0", out=tmp_path / "out").rows == 6  # by default it goes without


TOKENS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6)[None] < torch.tensor([6, 1, 3, 2, 5, 4, 6, 2])[:, None]


@settings(deadline=None, max_examples=20)
@given(cuts=st.sets(st.integers(1, 7)), rows_per_unit=st.integers(1, 9))
def test_any_split_into_batches_gives_the_same_ids_and_values(cuts, rows_per_unit):
    torch.manual_seed(0)
    model = BlockStack()
    ends = [*sorted(cuts), 8]
    spans = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    batches = [{"input_ids": TOKENS[one], "attention_mask": MASK[one], "id": list(range(8))[one]} for one in spans]
    with tempfile.TemporaryDirectory() as folder:
        store = run(
            model,
            batches,
            f"{folder}/out",
            layers="h.3",
            reduce=["mean", "full"],
            ids="id",
            rows_per_unit=rows_per_unit,
        )
        assert store.ids == list(range(8))
        with torch.no_grad():
            whole = model(TOKENS)
        for row in range(8):
            real = whole[row][MASK[row]]
            assert torch.allclose(store["h.3", "mean"][row], real.mean(0), atol=1e-5)
            assert torch.allclose(store["h.3", "full"][row], real, atol=1e-5)
