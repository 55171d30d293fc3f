"""Data sets that grew: the rows that are new are added, the others are compared or left alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import BATCHES, FORMATS, TOKENS, batch, counted, files, interrupted, run, shards, small_model

from activation_extractor import open_store
from activation_extractor.errors import ArgumentError, OtherRunError, StoreError


def rows(*numbers: int) -> dict:
    return batch(list(numbers))


def same_rows(store, whole, numbers) -> None:
    for key in whole.pairs:
        for row, number in enumerate(numbers):
            torch.testing.assert_close(store[key][row], whole[key][number])
    assert store.ids == [f"row {number}" for number in numbers]
    assert store.keep["label"][:].tolist() == list(numbers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), [batch(slice(0, 40))])


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_with_new_ids_are_added_wherever_they_stand(tmp_path, whole, kind):
    run(tmp_path, [rows(0, 2, 4), rows(6, 8)], format=kind)
    before = shards(tmp_path)
    model, calls = counted(small_model())
    store = run(tmp_path, [rows(0, 1, 2), rows(3, 4, 5), rows(6, 7, 8)], model=model, append=True, format=kind)
    same_rows(store, whole, [0, 2, 4, 6, 8, 1, 3, 5, 7])
    assert before.items() <= shards(tmp_path).items()
    assert store.verify() == []
    assert len(calls) == 4  # the proof, and what is new of each batch


def test_nothing_new_is_a_proof_alone(tmp_path):
    run(tmp_path)
    before = files(tmp_path)
    model, calls = counted(small_model())
    run(tmp_path, model=model, append=True)
    assert (len(calls), files(tmp_path)) == (1, before)


def test_new_rows_that_follow_can_be_resumed_as_one_data_set(tmp_path, whole):
    run(tmp_path, BATCHES[:3])
    run(tmp_path, BATCHES, append=True)
    before = files(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*differ by rounding.*in a batch with others")
        same_rows(run(tmp_path, BATCHES), whole, range(15))
    assert files(tmp_path) == before


@settings(deadline=None, max_examples=25)
@given(
    first=st.lists(st.integers(0, 19), min_size=1, max_size=12, unique=True),
    size=st.integers(1, 7),
    unit=st.integers(1, 6),
    stops=st.lists(st.integers(0, 6), max_size=2),
    is_ordered=st.booleans(),
)
def test_any_growth_interrupted_anywhere_ends_with_each_row_once(
    tmp_path_factory, whole, first, size, unit, stops, is_ordered
):
    out = tmp_path_factory.mktemp("out")
    options = {"rows_per_unit": unit, "order": "place" if is_ordered else None}

    def batches(numbers):
        made = []
        for start in range(0, len(numbers), size):
            part = list(range(start, min(start + size, len(numbers))))[:: -1 if is_ordered else 1]
            made.append(rows(*(numbers[place] for place in part)) | ({"place": part} if is_ordered else {}))
        return made

    run(out, batches(sorted(first)), **options)
    grown = batches(list(range(20)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No row that")
        for stop in stops:
            if stop < len(grown):
                with pytest.raises(KeyboardInterrupt):
                    run(out, interrupted(grown, stop), append=True, **options)
        store = run(out, grown, append=True, **options)
    numbers = [int(row_id.split()[1]) for row_id in store.ids]
    assert numbers[: len(first)] == sorted(first)
    assert sorted(numbers) == list(range(20))
    assert numbers[len(first) :] == sorted(numbers[len(first) :])
    same_rows(store, whole, numbers)


def test_rows_without_ids_are_added_behind_the_last(tmp_path):
    plain = [{"input_ids": TOKENS[at : at + 3]} for at in range(0, 15, 3)]
    options = {"ids": None, "keep": ()}
    run(tmp_path, plain[:3], **options)
    with pytest.raises(OtherRunError, match=r"it goes on after the last of its 3 rows, which append=True allows"):
        run(tmp_path, plain, **options)
    store = run(tmp_path, plain, append=True, **options)
    assert store.rows == 15
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, plain[::-1], append=True, **options)


def test_a_model_that_computes_other_values_adds_nothing(tmp_path):
    run(tmp_path)
    before = files(tmp_path)
    model = small_model()
    model.h[0].register_forward_hook(lambda _, args, out: out * 1.01)
    with pytest.raises(OtherRunError, match=r"what the model computes \(layer 'h.0' with 'mean' differs by"):
        run(tmp_path, [batch(slice(9, 40))], model=model, append=True)
    with pytest.raises(OtherRunError, match="weights"):
        run(tmp_path, [batch(slice(9, 40))], model=small_model(1), append=True)
    assert files(tmp_path) == before


def test_new_rows_alone_are_added_and_it_is_said_that_nothing_proved_the_model(tmp_path, whole):
    run(tmp_path, BATCHES[:2])
    with pytest.warns(UserWarning, match=r"No row that '.*' holds came before 6 new rows: the model was compared by"):
        run(tmp_path, BATCHES[2:4], append=True)
    same_rows(open_store(tmp_path), whole, range(12))


@pytest.mark.parametrize("again", [[rows(20, 20)], [rows(20), rows(21, 20)]])
def test_a_new_id_that_comes_twice_is_an_error(tmp_path, again):
    run(tmp_path)
    with pytest.raises(StoreError, match="must hold each id once, got 'row 20' again"):
        run(tmp_path, [*BATCHES, *again], append=True)
    assert open_store(tmp_path).rows == 15


def test_append_begins_a_store_where_there_is_none_and_refuses_what_contradicts_it(tmp_path):
    assert run(tmp_path / "out", append=True).rows == 15
    with pytest.raises(ArgumentError, match="append must be left out with resume=False"):
        run(tmp_path / "out", append=True, resume=False)
    with pytest.raises(OtherRunError, match="reducers"):
        run(tmp_path / "out", append=True, reduce="max")


def test_an_id_that_is_stored_and_comes_twice_is_an_error(tmp_path):
    run(tmp_path)
    with pytest.raises(StoreError, match="must hold each id once, got 'row 3' again"):
        run(tmp_path, [*BATCHES, batch([20]) | {"id": ["row 3"]}], append=True)


@pytest.mark.parametrize("place", [2, 1, -1])
def test_a_place_that_comes_twice_is_an_error(tmp_path, place):
    first = rows(0, 1, 2) | {"place": [0, 1, 2]}
    run(tmp_path, [first], order="place")
    with pytest.raises(ArgumentError, match=f"order must hold each place once, got {place}"):
        run(tmp_path, [first, rows(3, 4, 5) | {"place": [3, 4, place]}], order="place", append=True)


class Sum(torch.nn.Module):
    """Sums what an object holds, through a layer that runs for positive values alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, held):
        values = held.values if isinstance(held, Held) else held
        return self.layer(values) if values[0, 0] > 0 else values


class Held:
    def __init__(self, values) -> None:
        self.values = values


def test_rows_are_added_to_batches_for_which_no_layer_ran(tmp_path):
    values = torch.tensor([-1.0, 1, -2, 2])[:, None, None] * torch.rand(4, 3, 3)
    batches = [{"held": values[at], "id": [f"{at} {row}" for row in range(3)]} for at in range(4)]
    options = {"layers": "layer", "reduce": "full", "keep": (), "missing": "skip"}
    run(tmp_path, batches[:2], model=Sum(), **options)
    store = run(tmp_path, batches, model=Sum(), append=True, **options)
    assert store.rows == 12
    assert store["layer"].rows.tolist() == [3, 4, 5, 9, 10, 11]


def test_batches_with_an_object_that_cannot_be_cut_are_run_whole(tmp_path):
    values = torch.rand(12, 3)
    batches = [{"held": Held(values[at : at + 4]), "id": list(range(at, at + 4))} for at in range(0, 12, 4)]
    options = {"layers": "layer", "reduce": "full", "keep": ()}
    run(tmp_path, [{"held": Held(values[:6]), "id": list(range(6))}], model=Sum(), **options)
    store = run(tmp_path, batches, model=Sum(), append=True, on_failure=print, **options)
    assert store.ids == list(range(12))
    torch.testing.assert_close(store["layer"][:], Sum().layer(values).detach())


def test_where_rows_were_added_out_of_order_a_run_that_compares_places_says_how_to_go_on(tmp_path):
    run(tmp_path, [rows(0, 2, 4)])
    grown = [rows(0, 1, 2), rows(3, 4)]
    run(tmp_path, grown, append=True)
    with pytest.raises(OtherRunError, match=r"id 'row 1' in place of 'row 2' in row 1; append=True adds ids"):
        run(tmp_path, grown)
    assert run(tmp_path, grown, append=True).rows == 5
