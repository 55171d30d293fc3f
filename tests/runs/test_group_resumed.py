"""Runs over windows of rows that were interrupted, lost a unit, or ran out of memory."""

from __future__ import annotations

import pytest
import torch
from long_rows import (
    ROWS,
    LocalModel,
    check_columns,
    local_model,
    random_rows,
    run_windows,
    whole_rows,
    window_batch,
    window_batches,
)
from small_runs import counted, interrupted, shards

from activation_extractor import windows
from activation_extractor.errors import ArgumentError, OtherRunError


def run(out, batches, model=None, **options):
    return run_windows(out, batches, model, rows_per_unit=2, **options)


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("batch_size", [5, 2])
def test_a_run_that_was_interrupted_goes_on_with_other_batches_too(tmp_path, after, batch_size):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted(list(window_batches(ROWS, 10, batch_size=5)), after))
    store = run(tmp_path / "out", list(window_batches(ROWS, 10, batch_size=batch_size)))
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)
    assert store.ids == [f"row {row}" for row in range(len(ROWS))]
    store.verify()


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    batches = list(window_batches(ROWS, 10))
    run(tmp_path / "whole", batches)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted(batches, 5))
    assert shards(tmp_path / "out")
    run(tmp_path / "out", batches)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_unit_is_run_again_and_only_batches_that_touch_it(tmp_path, lost):
    batches = list(window_batches(ROWS, 10))
    run(tmp_path / "out", batches)
    shard = sorted((tmp_path / "out/shards").iterdir())[lost]
    before = shard.read_bytes()
    shard.unlink()
    model, calls = counted(local_model())
    run(tmp_path / "out", batches, model)
    assert shard.read_bytes() == before
    touching = [batch for batch in batches if any(window.row // 2 == lost for window in batch["window"])]
    assert len(touching) <= len(calls) < len(batches)


def test_a_complete_store_is_proven_by_the_first_rows_that_come_whole(tmp_path):
    batches = list(window_batches(ROWS, 10))
    run(tmp_path / "out", batches)
    before = shards(tmp_path / "out")
    model, calls = counted(local_model())
    run(tmp_path / "out", batches, model)
    assert shards(tmp_path / "out") == before
    assert 1 <= len(calls) < len(batches)


@pytest.mark.parametrize("size", [10, 100], ids=["windows", "whole rows"])
def test_a_model_that_computes_something_else_does_not_go_on(tmp_path, size):
    batches = list(window_batches(ROWS, size, batch_size=2))
    run(tmp_path / "out", batches)
    sorted((tmp_path / "out/shards").iterdir())[-1].unlink()
    before = shards(tmp_path / "out")
    model = local_model()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(OtherRunError, match="what the model computes"):
        run(tmp_path / "out", batches, model)
    assert shards(tmp_path / "out") == before


def renamed(batch):
    return {**batch, "id": ["x" if name == "row 1" else name for name in batch["id"]]}


@pytest.mark.parametrize(
    "other",
    [
        lambda: window_batches(ROWS, 12),
        lambda: window_batches(ROWS, 10, stride=4),
        lambda: window_batches([[*ROWS[0][:-1], 5], *ROWS[1:]], 10),
        lambda: window_batches([*ROWS[:5], ROWS[5][::-1], *ROWS[6:]], 10),
        lambda: map(renamed, window_batches(ROWS, 10)),
        lambda: ({**batch, "length": batch["length"] + 1} for batch in window_batches(ROWS, 10)),
        lambda: ({**batch, "counts": batch["attention_mask"]} for batch in window_batches(ROWS, 10)),
        lambda: list(window_batches(ROWS, 10))[:3],
        lambda: list(window_batches(ROWS, 10))[1:],
        lambda: list(window_batches(ROWS[:2], 10)),
        lambda: [window_batch(ROWS, [it for it in windows(map(len, ROWS), size=10) if (it.row, it.number) != (2, 3)])],
    ],
    ids=["size", "stride", "token", "row", "id", "kept", "counts", "last", "first", "rows", "window"],
)
def test_other_windows_rows_or_names_do_not_go_on(tmp_path, other):
    run(tmp_path / "out", window_batches(ROWS, 10))
    before = shards(tmp_path / "out")
    with pytest.raises((OtherRunError, ArgumentError)):
        run(tmp_path / "out", list(other()))
    assert shards(tmp_path / "out") == before


def test_rows_of_their_own_are_not_windows_of_rows(tmp_path):
    rows = random_rows([5, 6, 7])
    run(tmp_path / "out", window_batches(rows, 10))
    batches = [{k: v for k, v in batch.items() if k != "window"} for batch in window_batches(rows, 10)]
    with pytest.raises(OtherRunError, match="group"):
        run(tmp_path / "out", batches, group=None)


def test_another_way_to_merge_is_another_run(tmp_path):
    def total(factor):
        def total(activation, mask):
            return activation.where(mask[..., None], 0).sum(1)

        total.merge = lambda parts, counts: factor * sum(parts)
        return total

    batches = list(window_batches(ROWS, 10))
    store = run(tmp_path / "out", batches, reduce=total(1))
    for row, whole in enumerate(whole_rows(local_model())):
        torch.testing.assert_close(store["blocks.1"][row], whole.sum(0), atol=1e-5, rtol=1e-5)
    run(tmp_path / "out", batches, reduce=total(1))
    with pytest.raises(OtherRunError, match="merge"):
        run(tmp_path / "out", batches, reduce=total(2))


def test_a_batch_that_does_not_fit_is_run_in_pieces(tmp_path):
    class Small(LocalModel):
        def forward(self, input_ids, attention_mask):
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(input_ids, attention_mask)

    model = Small(blocks=2, reach=1, kind="conv")
    with pytest.warns(UserWarning, match="does not fit into memory"):
        store = run(tmp_path / "out", window_batches(ROWS, 10, batch_size=7), model)
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)
    assert store.ids == [f"row {row}" for row in range(len(ROWS))]


def test_rows_that_are_new_are_added(tmp_path):
    run(tmp_path / "out", window_batches(ROWS[:4], 10))
    model, calls = counted(local_model())
    batches = list(window_batches(ROWS, 10))
    store = run(tmp_path / "out", batches, model, append=True)
    check_columns(store, "blocks.1", whole_rows(local_model()), tolerance=1e-6)
    assert store.ids == [f"row {row}" for row in range(len(ROWS))]
    assert len(calls) <= len(batches)


class Refusing(LocalModel):
    """Raises where a window holds what only row 2 holds, in one of its windows, or what only row 4 holds."""

    def forward(self, input_ids, attention_mask):
        for token in (40, 41):
            if (input_ids == token).any():
                raise ValueError(f"token {token}")
        return super().forward(input_ids.clamp(max=29), attention_mask)


def with_bad_rows():
    rows = [list(row) for row in ROWS]
    rows[2][30], rows[4][3] = 40, 41
    return [*rows, []]  # the last row has no position that counts


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_rows_of_which_a_window_cannot_be_run_are_left_out_and_reported_once(tmp_path, batch_size):
    batches = list(window_batches(with_bad_rows(), 10, batch_size=batch_size))
    failed = []
    model = Refusing(blocks=2, reach=1, kind="conv")
    store = run(tmp_path / "out", batches, model, on_failure=lambda row_id, error: failed.append((row_id, str(error))))
    kept = [0, 1, 3, 5, 6, 7]
    assert store.ids == [f"row {row}" for row in kept]
    wholes = whole_rows(local_model())
    check_columns(store, "blocks.1", [wholes[row] for row in kept], tolerance=1e-6)
    assert sorted(failed)[:2] == [("row 2", "token 40"), ("row 4", "token 41")]
    assert sorted(failed)[2][0] == "row 8"
    assert "got none in row 8 (id 'row 8')" in sorted(failed)[2][1]
    assert len(failed) == 3


def test_a_run_without_the_rows_that_fail_goes_on_and_is_proven(tmp_path):
    batches, failed = list(window_batches(with_bad_rows(), 10, batch_size=4)), []
    model = Refusing(blocks=2, reach=1, kind="conv")
    options = {"on_failure": lambda row_id, error: failed.append(row_id)}
    run(tmp_path / "whole", batches, model, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted(batches, 9), model, **options)
    assert shards(tmp_path / "out")
    failed.clear()
    store = run(tmp_path / "out", batches, model, **options)
    assert sorted(failed) == ["row 2", "row 4", "row 8"]
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert len(store.ids) == 6


def test_without_on_failure_the_first_row_that_fails_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="token 4"):
        run(tmp_path / "out", window_batches(with_bad_rows()[:-1], 10), Refusing(blocks=2, reach=1, kind="conv"))
