"""Runs of `extract` that would go on with a store of another run: each is an error, and the store stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import BATCHES, FORMATS, MASK, TOKENS, batch, counted, files, interrupted, run, shards, small_model
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from activation_extractor import NpzSink, SafetensorsSink, capture, open_store
from activation_extractor.errors import ArgumentError, OtherRunError, StoreError


def edited(index: int, **entries) -> list[dict]:
    return [one | entries if number == index else one for number, one in enumerate(BATCHES)]


def first(activation, mask):
    return activation[:, 0]


def second(activation, mask):
    return activation[:, 1]


second.__name__ = second.__qualname__ = "first"

OTHER_DATA = {
    "reversed": (BATCHES[::-1], "unit '00000000': id 'row 12' in place of 'row 0' in row 0"),
    "an_edited_id": (edited(3, id=["row 9", "new", "row 11"]), "unit '0+1': id 'new' in place of 'row 10' in row 4"),
    "a_swapped_batch": ([*BATCHES[:2], BATCHES[3], BATCHES[2], BATCHES[4]], "id 'row 9' in place of 'row 6' in row 0"),
    "edited_inputs": (edited(2, input_ids=TOKENS[30:33]), "unit '00000001': other inputs under the same ids"),
    "an_edited_mask": (edited(1, attention_mask=MASK[3:6].flip(1)), "unit '0+0': other inputs under the same ids"),
    "fewer_batches": (BATCHES[:4], "it ends before the batches of unit '00000002'"),
    "a_cut_unit": (BATCHES[:3], "unit '00000001': 3 rows in place of 6"),
    "no_batches": ([], "it ends before the batches of unit '00000002'"),
    "more_batches": ([*BATCHES, batch(slice(15, 18))], "unit '00000002': it goes on after the last of its 3 rows"),
}
OTHER_RUNS = {
    "weights": ({"model": small_model(1)}, r"weights\."),
    "structure": ({"model": small_model(eps=1e-3)}, r"structure of the model\."),
    "layers": ({"layers": "h.0"}, r"layers \(without h\.1\)"),
    "reducers": ({"reduce": ["mean"]}, r"reducers \(without full\)"),
    "mask": ({"mask": None}, r"mask \(none in place of 'attention_mask'\)"),
    "sequence_axis": ({"sequence_axis": 1}, r"sequence_axis \(1 in place of none\)"),
    "calls": ({"calls": "join"}, r"calls \('join' in place of 'last'\)"),
    "rows_per_unit": ({"rows_per_unit": 9}, r"rows_per_unit \(9 in place of 6\)"),
    "keep": ({"keep": ()}, r"keep \(without label\)"),
    "ids": ({"ids": None}, r"ids \(none in place of 'id'\)"),
}


def refuse(out: Path, text: str, error: type[StoreError] = OtherRunError, batches=BATCHES, **options) -> None:
    """The run is refused, nothing is touched, and what the store was begun with goes on."""
    before = files(out)
    model, calls = counted(options.pop("model", None) or small_model())
    with pytest.raises(error, match=text) as caught:
        run(out, batches, model=model, **options)
    assert str(out) in str(caught.value)
    assert files(out) == before
    assert len(calls) <= 2  # the proof, and once more where it fails


@pytest.mark.parametrize(("batches", "text"), OTHER_DATA.values(), ids=OTHER_DATA)
def test_other_data_is_an_error_that_says_where_and_leaves_the_store(tmp_path, batches, text):
    run(tmp_path)
    refuse(tmp_path, rf"holds another run: it differs in data \(.*{text}", batches=batches)
    run(tmp_path)  # as the text advises


def test_an_id_of_a_unit_that_is_there_may_not_come_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(BATCHES, 4))
    with pytest.raises(StoreError, match="must hold each id once, got 'row 1' again. Give every row an id of its own"):
        run(tmp_path, edited(4, id=["row 12", "row 1", "row 14"]))


def test_further_batches_without_ids_are_an_error_too(tmp_path):
    plain = [{"input_ids": TOKENS[at : at + 3]} for at in range(0, 18, 3)]
    run(tmp_path, plain[:5], ids=None, keep=())
    text = r"data \(unit '00000002': it goes on after the last of its 3 rows, which append=True allows\)\. Use"
    refuse(tmp_path, text, batches=plain, ids=None, keep=())
    refuse(tmp_path, r"data \(unit '00000000': other inputs\)", batches=plain[::-1], ids=None, keep=())


@pytest.mark.parametrize("after", [4, 5])
@pytest.mark.parametrize(("options", "text"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_other_arguments_are_an_error_that_says_which_and_leave_the_store(tmp_path, options, text, after):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(BATCHES, after))
    refuse(tmp_path, rf"holds another run: it differs in .*{text}", **options)
    run(tmp_path)


def test_a_reducer_of_the_same_name_with_another_body_is_another_run(tmp_path):
    run(tmp_path, reduce=first)
    refuse(tmp_path, r"differs in reducers \(another first\)", reduce=second)
    run(tmp_path, reduce=first)


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("now", FORMATS)
def test_another_format_is_an_error_that_names_both(tmp_path, there, now):
    run(tmp_path, format=there)
    if now != there:
        text = rf"must be a store of {now} shards, got one of {there}\. Use the sink or format= that it was begun with"
        refuse(tmp_path, text, StoreError, format=now)
    run(tmp_path, format=there)


def test_without_resume_a_store_is_refused_with_advice_that_helps(tmp_path):
    run(tmp_path)
    text = r"must be a new or empty folder, got one that holds a store\. .*resume"
    refuse(tmp_path, text, StoreError, resume=False)
    run(tmp_path, resume=True)


def loader(**options) -> DataLoader:
    rows = [{name: column[row] for name, column in batch(slice(0, 12)).items()} for row in range(12)]
    return DataLoader(rows, **options)


RANDOM = {
    "shuffle": ({"batch_size": 4, "shuffle": True}, "RandomSampler"),
    "subset": ({"batch_size": 4, "sampler": SubsetRandomSampler(range(12))}, "SubsetRandomSampler"),
    "weighted": ({"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 12, 12, False)}, "WeightedRandomSampler"),
    "distributed": ({"batch_size": 4, "sampler": DistributedSampler(range(12), 1, 0)}, "DistributedSampler"),
    "batch_sampler": ({"batch_sampler": BatchSampler(RandomSampler(range(12)), 4, False)}, "RandomSampler"),
}


@pytest.mark.parametrize(("options", "name"), RANDOM.values(), ids=RANDOM)
def test_a_random_order_needs_ids_or_no_resume(tmp_path, options, name):
    text = rf"batches must come in a fixed order when rows have no ids, got '{name}'\. Pass ids=, leave out shuffle="
    with pytest.raises(ArgumentError, match=text):
        run(tmp_path / "out", loader(**options), ids=None, keep=["label"])
    assert list(tmp_path.iterdir()) == []
    assert sorted(run(tmp_path / "ids", loader(**options)).ids) == sorted(f"row {row}" for row in range(12))
    plain = [{"input_ids": tokens} for tokens in TOKENS[:12]]
    run(tmp_path / "once", DataLoader(plain, **options), ids=None, keep=(), resume=False)


def test_a_loader_in_a_fixed_order_needs_no_ids_and_can_be_gone_on_with(tmp_path):
    plain = DataLoader([{"input_ids": tokens} for tokens in TOKENS[:15]], batch_size=3)
    run(tmp_path, plain, ids=None, keep=())
    model, calls = counted(small_model())
    run(tmp_path, plain, model=model, ids=None, keep=())
    assert len(calls) == 1  # the proof


@pytest.mark.parametrize("append", [False, True])
def test_a_store_of_extract_is_refused_to_a_with_block(tmp_path, append):
    run(tmp_path)
    before = files(tmp_path)
    text = "got one that extract wrote. Call extract again" if append else "got one that holds a store"
    with pytest.raises(StoreError, match=text):
        with capture(small_model(), "h.*", reduce=["mean", "full"], sink=SafetensorsSink(tmp_path, append=append)):
            pass
    assert files(tmp_path) == before


def record(out: Path, rows: slice, layers="h.*", sink=SafetensorsSink, **options) -> None:
    model, one = small_model(), batch(rows)
    with capture(model, layers, reduce="mean", sink=sink(out, **options)) as acts, acts.step(ids=one["id"]):
        model(one["input_ids"], one["attention_mask"])


def test_a_store_of_a_with_block_is_refused_by_extract(tmp_path):
    record(tmp_path, slice(0, 3))
    text = "must be a store that extract wrote, got one that with-blocks wrote. Give extract a folder of its own"
    refuse(tmp_path, text, StoreError)
    refuse(tmp_path, text, StoreError, reduce="mean", keep=())


@pytest.mark.parametrize("sink", [SafetensorsSink, NpzSink])
def test_append_adds_rows_to_a_store_of_the_same_capture_alone(tmp_path, sink):
    record(tmp_path, slice(0, 3), sink=sink, append=True)
    before = shards(tmp_path)
    record(tmp_path, slice(3, 7), sink=sink, append=True)
    assert open_store(tmp_path).ids == [f"row {row}" for row in range(7)]
    assert before.items() <= shards(tmp_path).items()
    before = files(tmp_path)
    with pytest.raises(OtherRunError, match=r"holds another run: it differs in layers \(without h\.1"):
        record(tmp_path, slice(7, 9), "h.0", sink=sink, append=True)
    with pytest.raises(StoreError, match="must hold each id once, got 'row 6', which it holds already"):
        record(tmp_path, slice(6, 9), sink=sink, append=True)
    other = NpzSink if sink is SafetensorsSink else SafetensorsSink
    with pytest.raises(StoreError, match=f"must be a store of {other.codec.name} shards, got one of {sink.codec.name}"):
        record(tmp_path, slice(7, 9), sink=other, append=True)
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds a store"):
        record(tmp_path, slice(7, 9), sink=sink)
    assert files(tmp_path) == before
