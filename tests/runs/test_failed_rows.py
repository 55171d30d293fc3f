"""Rows that the model cannot run: left out and told, while the run goes on."""

from __future__ import annotations

import pytest
import torch
from small_runs import FORMATS, TOKENS, batch, counted, files, run, shards, small_model

from activation_extractor import open_store
from activation_extractor.errors import ArgumentTypeError, OtherRunError, StoreError

BAD = {7, 8, 20}
LARGE = [batch(slice(at, at + 8)) for at in range(0, 32, 8)]


def refusing(bad=frozenset(BAD)):
    """A model that raises an error for some rows, known by the first of their tokens."""
    model, wrong = small_model(), TOKENS[sorted(bad)]

    def refuse(_, args, kwargs) -> None:
        for row in kwargs["input_ids"]:
            if (row == wrong).all(1).any():
                raise ValueError("a token that there is not")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def good(store, whole, bad=frozenset(BAD)) -> None:
    numbers = [number for number in range(32) if number not in bad]
    assert store.ids == [f"row {number}" for number in numbers]
    for key in whole.pairs:
        for row, number in enumerate(numbers):
            torch.testing.assert_close(store[key][row], whole[key][number])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), LARGE)


def collect(out, batches=LARGE, **options):
    told = []
    store = run(out, batches, on_failure=lambda row, error: told.append((row, str(error))), **options)
    return store, told


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("order", [None, "place"])
def test_rows_that_cannot_be_run_are_left_out_and_told(tmp_path, whole, kind, order):
    places = range(0, 32, 8)
    batches = [one | {"place": list(range(at, at + 8))} for one, at in zip(LARGE, places, strict=True)]
    if order is None:
        batches = LARGE
    store, told = collect(tmp_path, batches, model=refusing(), format=kind, order=order)
    assert told == [(f"row {number}", "a token that there is not") for number in sorted(BAD)]
    good(store, whole)
    assert store.verify() == []


def test_a_complete_store_that_lacks_rows_is_resumed_without_them_and_they_are_told_again(tmp_path, whole):
    collect(tmp_path, model=refusing())
    before = files(tmp_path)
    model, calls = counted(refusing())
    store, told = collect(tmp_path, model=model)
    assert told == [(f"row {number}", "ValueError: a token that there is not") for number in sorted(BAD)]
    assert (len(calls), files(tmp_path)) == (1, before)
    good(store, whole)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_lost_unit_comes_back_without_them_whatever_the_batches(tmp_path, whole, size):
    collect(tmp_path, model=refusing())
    before = shards(tmp_path)
    (tmp_path / "shards/00000001.safetensors").unlink()
    batches = [batch(slice(at, min(at + size, 32))) for at in range(0, 32, size)]
    store, told = collect(tmp_path, batches, model=refusing())
    assert [row for row, _ in told] == [f"row {number}" for number in sorted(BAD)]
    good(store, whole)
    assert shards(tmp_path).keys() == before.keys()


def test_without_on_failure_a_store_that_lacks_rows_is_not_taken_for_whole(tmp_path):
    collect(tmp_path, model=refusing())
    text = r"a row was left out, since it raised ValueError: a token that there is not; on_failure= goes on without it"
    with pytest.raises(OtherRunError, match=text):
        run(tmp_path, LARGE, model=refusing())


def test_the_first_batch_may_lack_all_of_its_rows(tmp_path, whole):
    bad = frozenset(range(8))
    store, told = collect(tmp_path, model=refusing(bad))
    assert len(told) == 8
    good(store, whole, bad)
    collect(tmp_path, model=refusing(bad))


def test_an_error_of_every_row_is_raised_once_it_is_clear(tmp_path):
    model = small_model()
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    batches = [batch([row % 40]) | {"id": [row]} for row in range(150)]
    told = []
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path, batches, model=model, on_failure=lambda row, error: told.append(row))
    assert "None of the first 100 rows could be run" in caught.value.__notes__[-1]
    assert told == list(range(99))


def test_rows_without_ids_are_told_by_their_number(tmp_path):
    plain = [{name: one[name] for name in ("input_ids", "attention_mask")} for one in LARGE]
    store, told = collect(tmp_path, plain, model=refusing(), ids=None, keep=())
    assert [row for row, _ in told] == sorted(BAD)
    assert store.rows == 32 - len(BAD)


def test_added_rows_that_cannot_be_run_are_tried_again_the_next_time(tmp_path, whole):
    collect(tmp_path, LARGE[:1], model=refusing())
    for _ in range(2):
        store, told = collect(tmp_path, model=refusing(), append=True)
        assert [row for row, _ in told] == [f"row {number}" for number in sorted(BAD)]
        good(store, whole)
    model = refusing({40 - 1})
    with pytest.raises(OtherRunError, match="a row was left out"):
        run(tmp_path, model=model)
    assert sorted(run(tmp_path, LARGE, model=model, append=True).ids) == sorted(whole.ids)


def test_errors_of_the_disk_and_interrupts_are_raised(tmp_path, monkeypatch):
    def full(*_):
        raise StoreError(tmp_path, "be writable", "No space left on device", "Make room.")

    with monkeypatch.context() as patch:
        patch.setattr("activation_extractor.sinks._store_writer.StoreWriter.add", full)
        with pytest.raises(StoreError, match="No space left"):
            collect(tmp_path / "disk")
    model = small_model()
    model.register_forward_pre_hook(lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "interrupt", model=model)


def test_memory_and_bad_rows_together(tmp_path, whole):
    model = refusing()
    model.h[1].register_forward_pre_hook(lambda _, args: too_many(args))
    with pytest.warns(UserWarning, match="does not fit into memory"):
        store, told = collect(tmp_path, model=model)
    assert [row for row, _ in told] == [f"row {number}" for number in sorted(BAD)]
    good(store, whole)
    assert open_store(tmp_path).verify() == []


def too_many(args) -> None:
    if len(args[0]) > 3:
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("append", [False, True])
def test_where_no_row_of_a_small_data_set_can_be_run_the_error_is_raised(tmp_path, append):
    with pytest.raises(ValueError, match="a token that there is not") as caught:
        collect(tmp_path, LARGE[:1], model=refusing(range(8)), append=append)
    assert caught.value.__notes__[-1] == "None of the 8 rows could be run."


def test_an_error_that_takes_the_device_away_is_raised_at_once(tmp_path):
    model, calls = counted(small_model())

    def lose(*_) -> None:
        if calls:
            raise RuntimeError("CUDA error: device-side assert triggered")

    model.register_forward_pre_hook(lose)
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        collect(tmp_path, model=model)
    assert "rows were not tried alone" in caught.value.__notes__[-1]


def test_a_row_that_does_not_fit_into_memory_by_itself_is_left_out(tmp_path, whole):
    model = small_model()
    wrong = TOKENS[11]

    def refuse(_, args, kwargs) -> None:
        if (kwargs["input_ids"] == wrong).all(1).any():
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.warns(UserWarning, match="does not fit"):
        store, told = collect(tmp_path, model=model)
    assert told == [("row 11", "out of memory")]
    good(store, whole, {11})


def test_a_row_without_real_tokens_is_left_out_also_where_it_is_added(tmp_path, whole):
    mask = LARGE[1]["attention_mask"].clone()
    mask[3] = False
    batches = [LARGE[0], LARGE[1] | {"attention_mask": mask}, *LARGE[2:]]
    for append in (False, True):
        out = tmp_path / str(append)
        run(out, LARGE[:1])
        store, told = collect(out, batches if append else batches[:1], append=append)
    assert [row for row, _ in told] == ["row 11"]
    good(store, whole, {11})


def test_a_run_whose_batches_cannot_be_cut_is_resumed_with_on_failure(tmp_path):
    class Total(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, parts):
            return self.layer(torch.stack(parts).sum(0))

    values = torch.rand(18, 3)
    batches = [{"parts": [values[at : at + 3]] * 3, "id": list(range(at, at + 3))} for at in range(0, 18, 3)]
    options = {"layers": "layer", "reduce": "full", "keep": (), "rows_per_unit": 4}
    collect(tmp_path, batches, model=Total(), **options)
    (tmp_path / "shards/00000001.safetensors").unlink()
    store, _ = collect(tmp_path, batches, model=Total(), **options)
    assert store.ids == list(range(18))


def test_what_on_failure_raises_ends_the_run_which_can_be_resumed(tmp_path, whole):
    def stop(row, error) -> None:
        raise KeyError(row)

    for append in (False, True):
        with pytest.raises(KeyError, match="row 20"):
            run(tmp_path, LARGE, model=refusing({20}), on_failure=stop, append=append)
    store, told = collect(tmp_path, model=refusing({20}))
    assert [row for row, _ in told] == ["row 20"]
    good(store, whole, {20})


def test_on_failure_is_called_or_refused_at_once(tmp_path):
    with pytest.raises(ArgumentTypeError, match="on_failure must be a callable that takes a row's id and an exception"):
        run(tmp_path, on_failure="skip")
