"""Rows that the model cannot run: left out and told, while the run goes on."""

from __future__ import annotations

import pytest
import torch
from small_runs import FORMATS, TOKENS, batch, counted, files, run, shards, small_model

from activation_extractor import open_store
from activation_extractor.errors import OtherRunError, StoreError

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
