"""Spans and weights that are fields of the batches: taken out, used, compared on resume, and stored if asked for."""

from __future__ import annotations

import pytest
import torch
from models import BlockStack

from activation_extractor import capture, extract, open_store, positions, span, weighted_mean
from activation_extractor.errors import ArgumentError, ArgumentTypeError, OtherRunError, PoolingError

ROWS, SEQ = 10, 6
torch.manual_seed(0)
TOKENS, WEIGHTS = torch.randint(1, 50, (ROWS, SEQ)), torch.rand(ROWS, SEQ)
START = torch.arange(ROWS) % 3
END = START + 2
MASK = (torch.arange(SEQ) < torch.randint(5, SEQ + 1, (ROWS, 1))).long()


@pytest.fixture
def model():
    torch.manual_seed(1)
    return BlockStack().eval()


def batches(size=4, **changed):
    fields = {"input_ids": TOKENS, "attention_mask": MASK, "start": START, "end": END, "idf": WEIGHTS, **changed}
    for first in range(0, ROWS, size):
        yield {name: value[first : first + size] for name, value in fields.items()}


def expected(model, reduce):
    with torch.no_grad(), capture(model, "h.1", reduce=reduce) as acts:
        model(TOKENS, MASK)
    return acts["h.1"]


def run(model, out, given, *, reduce, **options):
    return extract(model, given, "h.*", out=out, reduce=reduce, progress=False, rows_per_unit=3, **options)


@pytest.fixture
def pooled():
    return {"reduce": ["mean", span("start", "end"), span("start", None, "max"), "weighted_mean"], "weights": "idf"}


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_rows_are_pooled_as_their_fields_say_whatever_the_batch_size(model, tmp_path, pooled, size):
    store = run(model, tmp_path / "out", batches(size), **pooled, keep=["start"])
    assert store.reducers == ["mean", "span(start, end)", "span(start, None, max)", "weighted_mean"]
    for name, reducer in {
        "span(start, end)": span(START, END),
        "span(start, None, max)": span(START, None, "max"),
        "weighted_mean": weighted_mean(WEIGHTS),
    }.items():
        assert torch.allclose(store["h.1", name].torch(), expected(model, reducer), atol=1e-5)
    assert store.keep["start"].torch().tolist() == START.tolist()
    assert list(store.keep) == ["start"]


def test_fields_may_be_lists(model, tmp_path):
    given = [dict(it, start=it["start"].tolist(), end=it["end"].tolist()) for it in batches()]
    for it in given:
        del it["idf"]
    store = run(model, tmp_path / "out", given, reduce=span("start", "end"))
    assert torch.allclose(store["h.1"].torch(), expected(model, span(START, END)), atol=1e-5)


def test_two_kinds_of_weights_have_names_of_their_own(model, tmp_path):
    given = list(batches(other=WEIGHTS.flip(0)))
    for it in given:
        del it["start"], it["end"]
    reduce = {"idf": weighted_mean("idf"), "other": weighted_mean("other"), "ends": positions(0, -1)}
    store = run(model, tmp_path / "out", given, reduce=reduce)
    assert torch.allclose(store["h.1", "other"].torch(), expected(model, weighted_mean(WEIGHTS.flip(0))), atol=1e-5)
    assert torch.allclose(store["h.1", "idf"].torch(), expected(model, weighted_mean(WEIGHTS)), atol=1e-5)
    assert store["h.1", "ends"].shape == (ROWS, 2, 8)


def test_a_run_is_resumed_with_the_same_fields_alone(model, tmp_path, pooled):
    out = tmp_path / "out"
    run(model, out, batches(), **pooled)
    shard = sorted((out / "shards").iterdir())[1]
    before = shard.read_bytes()
    shard.unlink()
    run(model, out, batches(), **pooled)
    assert shard.read_bytes() == before
    for changed in ({"end": END + 1}, {"start": START.clamp(max=1)}, {"idf": WEIGHTS * 2}):
        with pytest.raises(OtherRunError, match="data|what the model computes"):
            run(model, out, batches(**changed), **pooled)
    pooled["reduce"][1] = span("end", "start")
    with pytest.raises(OtherRunError, match="reducers"):
        run(model, out, batches(), **pooled)


def test_another_batch_size_resumes_too(model, tmp_path, pooled):
    run(model, tmp_path / "out", batches(4), **pooled)
    store = run(model, tmp_path / "out", batches(5), **pooled)
    assert torch.allclose(store["h.1", "weighted_mean"].torch(), expected(model, weighted_mean(WEIGHTS)), atol=1e-5)


def test_a_span_that_does_not_fit_names_layer_and_row(model, tmp_path, pooled):
    end = END.clone()
    end[5] = 7
    with pytest.raises(PoolingError, match=r"got 2 to 7 of \d in row 1\.") as caught:
        run(model, tmp_path / "out", batches(end=end), **pooled)
    assert "layer 'h.0' with 'span(start, end)'" in "".join(caught.value.__notes__)


def test_values_are_made_ready_once_for_all_layers(model, tmp_path, monkeypatch):
    from activation_extractor.reducers import _pooling

    made, ready = [], _pooling._Span._inside
    monkeypatch.setattr(_pooling._Span, "_inside", lambda self, mask: made.append(1) or ready(self, mask))
    run(
        model,
        tmp_path / "out",
        [{k: v for k, v in it.items() if k != "idf"} for it in batches()],
        reduce=span("start", "end"),
    )
    assert len(made) == 3


def test_what_is_missing_or_of_no_use_is_an_error(model, tmp_path, pooled):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="a batch must hold the field 'nowhere', .* weights= and spans"):
        run(model, out, batches(), reduce=span("start", "nowhere"))
    with pytest.raises(ArgumentError, match="weights must be left out where reduce= lacks the word 'weighted_mean'"):
        run(model, out, batches(), reduce="mean", weights="idf")
    with pytest.raises(ArgumentError, match="not the model's mask, got 'attention_mask'. It would"):
        run(model, out, batches(), reduce="weighted_mean", weights="attention_mask")
    with pytest.raises(ArgumentError, match="or in extract weights="):
        run(model, out, batches(), reduce=["mean", "weighted_mean"])
    with pytest.raises(ArgumentTypeError, match="weights must name a field of the batches"):
        run(model, out, batches(), reduce="weighted_mean", weights=WEIGHTS)
    assert not out.exists()


def test_a_store_of_other_reducers_is_read_as_ever(model, tmp_path):
    plain = [{k: v for k, v in it.items() if k in ("input_ids", "attention_mask")} for it in batches()]
    run(model, tmp_path / "out", plain, reduce="mean")
    run(model, tmp_path / "out", plain, reduce="mean")
    assert open_store(tmp_path / "out").rows == ROWS


def test_without_a_mask_each_batch_goes_by_its_own_fields(model, tmp_path):
    given = [{name: it[name] for name in ("input_ids", "start", "end", "idf")} for it in batches(5)]
    reduce = [span("start", "end"), "weighted_mean"]
    store = run(model, tmp_path / "out", given, reduce=reduce, weights="idf")
    with torch.no_grad(), capture(model, "h.1", reduce=[span(START, END), weighted_mean(WEIGHTS)]) as acts:
        model(TOKENS)
    assert torch.allclose(store["h.1", "span(start, end)"].torch(), acts["h.1", "span"], atol=1e-5)
    assert torch.allclose(store["h.1", "weighted_mean"].torch(), acts["h.1", "weighted_mean"], atol=1e-5)


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_are_new_take_their_fields_along(model, tmp_path, as_list):
    def given(rows):
        fields = {"input_ids": TOKENS, "attention_mask": MASK, "start": START, "end": END, "id": torch.arange(ROWS)}
        batch = {name: value[rows] for name, value in fields.items()}
        return [{**batch, "start": batch["start"].tolist()} if as_list else batch]

    options = {"reduce": span("start", "end"), "ids": "id"}
    run(model, tmp_path / "out", given([1, 4, 7]), **options)
    store = run(model, tmp_path / "out", given([7, 2, 1, 4, 9, 0]), **options, append=True)
    assert store.ids == [1, 4, 7, 2, 9, 0]
    assert torch.allclose(store["h.1"].torch(), expected(model, span(START, END))[store.ids], atol=1e-5)


def test_a_batch_that_is_halved_takes_its_fields_along(model, tmp_path):
    def refuse(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.h[0].register_forward_pre_hook(refuse)
    with pytest.warns(UserWarning, match="memory"):
        store = run(model, tmp_path / "out", batches(5), reduce=["weighted_mean", span("start", "end")], weights="idf")
    model.h[0]._forward_pre_hooks.clear()
    assert torch.allclose(store["h.1", "weighted_mean"].torch(), expected(model, weighted_mean(WEIGHTS)), atol=1e-5)
    assert torch.allclose(store["h.1", "span(start, end)"].torch(), expected(model, span(START, END)), atol=1e-5)
