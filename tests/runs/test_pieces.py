"""Batches that do not fit into memory: they are run in pieces, and the rows stay the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_runs import BATCHES, batch, files, run, small_model

from activation_extractor.errors import StoreError

ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}
LARGE = [batch(slice(at, at + 8)) for at in range(0, 32, 8)]


def limited(most: int, error: Exception = ERRORS["torch"], layer: str = "h.1"):
    """A model that takes up to so many rows at once, and a list of the rows of each forward that was begun."""
    model, calls = small_model(), []

    def refuse(_, args) -> None:
        if len(args[0]) > most:
            raise error

    model.get_submodule(layer).register_forward_pre_hook(refuse)
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    return model, calls


def same(store, whole) -> None:
    assert store.ids == whole.ids
    assert store.keep["label"][:].tolist() == whole.keep["label"][:].tolist()
    for key in whole.pairs:
        for row, other in zip(store[key], whole[key], strict=True):
            torch.testing.assert_close(row, other)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_batch_that_does_not_fit_is_halved_and_the_rows_stay_the_same(tmp_path, error):
    model, calls = limited(3, error)
    with pytest.warns(UserWarning, match="A batch of 8 rows does not fit into memory.*smaller pieces") as caught:
        store = run(tmp_path / "out", LARGE, model=model)
    assert len([one for one in caught if "does not fit" in str(one.message)]) == 1
    assert calls == [8, 4, 2, 2, 2, 2] + [2] * 12  # what worked is kept
    same(store, run(tmp_path / "whole", LARGE))
    assert store.verify() == []


def test_the_third_batch_alone_is_cut_where_it_alone_is_larger(tmp_path):
    model, calls = limited(3)
    batches = [*BATCHES[:2], batch(slice(6, 12)), batch(slice(12, 15))]
    with pytest.warns(UserWarning, match="A batch of 6 rows does not fit into memory"):
        store = run(tmp_path / "out", batches, model=model)
    assert calls == [3, 3, 6, 3, 3, 3]
    same(store, run(tmp_path / "whole", batches))


def test_batches_of_tuples_and_without_ids_are_cut_too(tmp_path):
    model = small_model()
    model.h[0].register_forward_pre_hook(lambda _, args: limited_to(2, args))
    batches = [(one["input_ids"], one["attention_mask"]) for one in LARGE]
    options = {"ids": None, "keep": ()}
    with pytest.warns(UserWarning, match="does not fit"):
        store = run(tmp_path / "out", batches, model=model, **options)
    whole = run(tmp_path / "whole", batches, **options)
    for key in whole.pairs:
        for row, other in zip(store[key], whole[key], strict=True):
            torch.testing.assert_close(row, other)


def limited_to(most: int, args) -> None:
    if len(args[0]) > most:
        raise torch.OutOfMemoryError("out of memory")


def test_a_row_that_does_not_fit_by_itself_is_the_error_that_it_was(tmp_path):
    model, _ = limited(0)
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(torch.OutOfMemoryError) as caught:
        run(tmp_path, LARGE, model=model)
    assert "not run in smaller pieces: it has a single row" in caught.value.__notes__[-1]


def test_a_batch_whose_rows_cannot_be_told_is_the_error_that_it_was(tmp_path):
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    model.register_forward_pre_hook(lambda _, args: limited_to(1, args))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        batches = [(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))]
        run(tmp_path, batches, model=model, layers="0", ids=None, keep=())
    assert "how many rows it has cannot be told, give them ids" in caught.value.__notes__[-1]


def test_other_errors_are_not_tried_again(tmp_path):
    model, calls = limited(3, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(tmp_path, LARGE, model=model)
    assert calls == [8]


def test_a_store_of_pieces_is_gone_on_with_by_whole_batches_and_the_other_way_round(tmp_path):
    model, _ = limited(3)
    with pytest.warns(UserWarning, match="does not fit"):
        run(tmp_path, LARGE, model=model)
    before = files(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*differ by rounding.*in a batch with others|.*does not fit")
        run(tmp_path, LARGE)
        run(tmp_path, LARGE, model=limited(2)[0])
    assert files(tmp_path) == before


def test_an_error_of_the_disk_is_not_taken_for_memory(tmp_path, monkeypatch):
    def full(*_):
        raise StoreError(tmp_path, "be writable", "No space left: out of memory for inodes", "Make room.")

    monkeypatch.setattr("activation_extractor.sinks._store_writer.StoreWriter.add", full)
    with pytest.raises(StoreError, match="be writable"):
        run(tmp_path, LARGE)
