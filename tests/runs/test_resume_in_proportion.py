"""Runs that are resumed: what is loaded, and what is compared, is in proportion to what is missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from divided_runs import ROWS, VALUES, Numbered, Rows, batches_of, calls, run, scattered, shards
from torch.utils.data import DataLoader

from activation_extractor.errors import OtherRunError


def loader(rows: int = ROWS, size: int = 4, **options) -> DataLoader:
    return DataLoader(Rows(rows), batch_size=size, **options)


def lose(out, *units: int) -> None:
    for unit in units:
        (out / f"shards/{unit:08d}.safetensors").unlink()


def test_a_complete_run_loads_the_batch_of_the_proof_alone(tmp_path):
    run(tmp_path)
    calls()
    batches = loader()
    assert run(tmp_path, batches=batches).rows == ROWS
    assert (batches.dataset.loaded, calls()) == ([0, 1, 2, 3], 1)
    numbered = Numbered()
    run(tmp_path / "numbered", "numbered")
    assert run(tmp_path / "numbered", batches=numbered).rows == ROWS - 2
    assert numbered.loaded == [0]


@pytest.mark.parametrize("lost", [[0], [19], [5, 6, 12], [18, 19]])
def test_missing_units_are_loaded_alone_and_come_back_the_same(tmp_path, lost):
    run(tmp_path / "loader")
    run(tmp_path / "numbered", batches=Numbered(rows=ROWS))
    before = shards(tmp_path / "loader")
    batches, numbered = loader(), Numbered(rows=ROWS)
    for out in ("loader", "numbered"):
        lose(tmp_path / out, *lost)
    calls()
    assert run(tmp_path / "loader", batches=batches).rows == ROWS
    assert run(tmp_path / "numbered", batches=numbered).rows == ROWS
    assert calls() == 2 * (2 * len(lost) + 1)
    proof = [0, 1, 2, 3] if 0 not in lost else [8, 9, 10, 11]
    rows = [row for unit in lost for row in range(8 * unit, 8 * unit + 8)]
    assert sorted(batches.dataset.loaded) == sorted(proof + rows)
    last = [39] if 19 in lost and len(lost) == 1 else []
    assert sorted(numbered.loaded + last) >= sorted([proof[0] // 4, *{row // 4 for row in rows}])
    assert len(numbered.loaded) <= 1 + 2 * len(lost) + 1
    assert shards(tmp_path / "loader") == before


def test_rows_in_an_order_of_their_own_are_loaded_in_proportion_too(tmp_path):
    run(tmp_path, "order")
    before = shards(tmp_path)
    lose(tmp_path, 4, 5, 6, 7)  # a window of rows
    batches = DataLoader(Rows(places=True), batch_sampler=scattered())
    run(tmp_path, "order", batches=batches)
    assert shards(tmp_path) == before
    assert {*batches.dataset.loaded} >= {*range(32, 64)}
    assert len(batches.dataset.loaded) == 32 + 4


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path):
    class Stops(Rows):
        def __getitem__(self, row):
            if row == 90:
                raise KeyboardInterrupt
            return super().__getitem__(row)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", batches=DataLoader(Stops(), batch_size=4))
    batches = loader()
    run(tmp_path / "out", batches=batches)
    assert sorted(batches.dataset.loaded) == [0, 1, 2, 3, *range(88, ROWS)]
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_batches_of_another_size_are_all_loaded(tmp_path):
    run(tmp_path)
    batches = loader(size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(tmp_path, batches=batches).rows == ROWS
    assert len(batches.dataset.loaded) == ROWS


def test_batches_of_uneven_sizes_are_all_loaded_and_right(tmp_path):
    class Uneven(Numbered):
        def __getitem__(self, number):
            batch = super().__getitem__(number)
            return {name: value[:3] for name, value in batch.items()} if number % 5 == 2 else batch

    run(tmp_path / "whole", batches=[Uneven()[number] for number in range(40)])
    run(tmp_path / "out", batches=Uneven())
    lose(tmp_path / "out", 7, 18)
    run(tmp_path / "out", batches=Uneven())
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_batches_that_become_uneven_behind_what_is_stored_are_right(tmp_path):
    class Uneven(Numbered):
        def __getitem__(self, number):
            batch = super().__getitem__(number)
            return {name: value[:3] for name, value in batch.items()} if number in (13, 30) else batch

    batches = [Uneven()[number] for number in range(40)]
    run(tmp_path / "whole", batches=batches)
    run(tmp_path / "out", batches=batches)
    lose(tmp_path / "out", *range(6, 20))
    numbered = Uneven()
    run(tmp_path / "out", batches=numbered)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert numbered.loaded == [0, *range(12, 40)]


@pytest.mark.parametrize(
    ("rows", "text"), [(ROWS - 9, "ends before|rows in place of"), (ROWS + 4, "goes on after the last of its 4 rows")]
)
def test_another_number_of_rows_is_found(tmp_path, rows, text):
    whole = ROWS if rows < ROWS else ROWS - 4
    run(tmp_path, batches=loader(whole))
    with pytest.raises(OtherRunError, match=text):
        run(tmp_path, batches=loader(rows))
    with pytest.raises(OtherRunError, match=text):
        run(tmp_path, batches=Numbered(rows=rows))


class Changed(Numbered):
    """Batches of which one has other values, or another id."""

    def __init__(self, number: int, what: str, **options) -> None:
        super().__init__(**options)
        self.number, self.what = number, what

    def __getitem__(self, number):
        batch = super().__getitem__(number)
        if number != self.number:
            return batch
        return {**batch, self.what: batch[self.what] * 2 if self.what == "input" else [*batch["id"][1:], "other"]}


def test_other_inputs_of_the_batch_of_the_proof_are_found(tmp_path):
    run(tmp_path, "numbered")
    with pytest.raises(OtherRunError, match="other inputs under the same ids|what the model computes"):
        run(tmp_path, batches=Changed(0, "input"))
    with pytest.raises(OtherRunError, match="id 'row 1' in place of 'row 0' in row 0"):
        run(tmp_path, batches=Changed(0, "id"))


def test_further_batches_are_compared_in_full_where_that_is_asked_for(tmp_path):
    run(tmp_path, "numbered")
    for number, what, text in ((21, "input", "other inputs under the same ids"), (21, "id", "id 'row 85' in place of")):
        assert run(tmp_path, batches=Changed(number, what)).rows == ROWS - 2
        changed = Changed(number, what)
        with pytest.raises(OtherRunError, match=f"unit '00000010': {text}"):
            run(tmp_path, batches=changed, resume="full")
    assert run(tmp_path, "numbered", resume="full").rows == ROWS - 2


@pytest.mark.parametrize("is_listed", [True, False])
def test_ids_are_compared_where_batches_come_anyway(tmp_path, is_listed):
    rows = [{"input": VALUES[row % ROWS][None], "id": [f"row {row}"]} for row in range(200)]
    run(tmp_path, batches=rows, rows_per_unit=2)
    other = list(rows)
    other[101] = {**rows[101], "id": ["other"]}
    with pytest.raises(OtherRunError, match="unit '00000050': id 'other' in place of 'row 101' in row 1"):
        run(tmp_path, batches=other if is_listed else iter(other), rows_per_unit=2)
    other[101] = {**rows[101], "input": torch.zeros(1, 8)}
    assert run(tmp_path, batches=other, rows_per_unit=2).rows == 200
    for compared in (0, 199):
        changed = list(rows)
        changed[compared] = {**rows[compared], "input": torch.zeros(1, 8)}
        with pytest.raises(OtherRunError, match="other inputs|what the model computes"):
            run(tmp_path, batches=changed if is_listed else iter(changed), rows_per_unit=2)


def test_an_order_that_is_not_that_of_the_sampler_is_followed(tmp_path):
    class Turned(Rows):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "place": ROWS - 1 - row}

    options = {"order": "place", "rows_per_unit": 16}
    store = run(tmp_path, batches=DataLoader(Turned(), batch_size=4), **options)
    assert store.ids == [f"row {row}" for row in reversed(range(ROWS))]
    before = shards(tmp_path)
    lose(tmp_path, 3, 9)
    run(tmp_path, batches=DataLoader(Turned(), batch_size=4), **options)
    assert shards(tmp_path) == before
    lose(tmp_path, 0)
    run(tmp_path, batches=DataLoader(Turned(), batch_size=4), share=(0, 2), **options)
    assert shards(tmp_path) == before


@pytest.mark.parametrize("unit", [0, 7, 18])
def test_a_unit_of_which_no_journal_says_anything_is_loaded_and_compared(tmp_path, unit):
    run(tmp_path)
    (journal,) = (tmp_path / "journal").iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:unit], lines[unit][:50] + "\n", *lines[unit + 1 :]]))
    lose(tmp_path, 19)
    batches = loader()
    assert run(tmp_path, batches=batches).rows == ROWS
    loaded = {*batches.dataset.loaded}
    assert loaded == {0, 1, 2, 3, *range(8 * unit, 8 * unit + 8), *range(152, 160)}
    lose(tmp_path, 19)
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, batches=DataLoader(Changed(2 * unit + 1, "input", rows=ROWS), batch_size=None))


def test_a_store_without_journals_is_compared_in_full(tmp_path):
    run(tmp_path)
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    lose(tmp_path, 3)
    before = shards(tmp_path)
    assert run(tmp_path).rows == ROWS
    assert before.items() <= shards(tmp_path).items()
    with pytest.raises(OtherRunError, match="other inputs"):
        run(tmp_path, batches=DataLoader(Rows(), batch_size=4, collate_fn=doubled))


def doubled(rows):
    number = rows[0]["id"]
    inputs = torch.stack([row["input"] for row in rows])
    return {"input": inputs * (1 + (number == "row 100")), "id": [row["id"] for row in rows]}


@pytest.mark.parametrize("wrong", ["eight", "0", "-8", "8 8", ""])
def test_a_journal_that_says_nonsense_of_the_data_set_is_not_believed(tmp_path, wrong):
    run(tmp_path)
    (journal,) = (tmp_path / "journal").iterdir()
    text = journal.read_text()
    assert '"data": "8 ' in text
    journal.write_text(text.replace('"data": "8 ', f'"data": "{wrong} '))
    assert run(tmp_path, batches=loader()).rows == ROWS
    journal.write_text(text.replace('"data": "8 ', '"data": "9 '))
    with pytest.raises(OtherRunError, match="in row 8"):
        run(tmp_path, batches=loader())


def test_a_data_loader_of_whole_batches_is_asked_by_number_too(tmp_path):
    batches = DataLoader(Numbered(), batch_size=None)
    run(tmp_path, batches=batches)
    batches.dataset.loaded.clear()
    lose(tmp_path, 4)
    assert run(tmp_path, batches=batches).rows == ROWS - 2
    assert sorted({*batches.dataset.loaded}) == [0, 8, 9]


def test_a_random_sampler_is_gone_through_whole(tmp_path):
    batches = loader(shuffle=True, generator=torch.Generator().manual_seed(0))
    run(tmp_path, batches=batches)
    again = loader(shuffle=True, generator=torch.Generator().manual_seed(0))
    assert run(tmp_path, batches=again).rows == ROWS
    assert len(again.dataset.loaded) == ROWS


def test_each_kind_of_batches_is_the_same_again(tmp_path):
    for kind in ("loader", "order", "numbered", "list", "generator"):
        run(tmp_path / kind, kind)
        before = shards(tmp_path / kind)
        calls()
        run(tmp_path / kind, batches=batches_of(kind), **({"order": "place"} if kind == "order" else {}))
        assert calls() == 1
        assert shards(tmp_path / kind) == before
