"""The store sink: units, folders and refusals, read back with safetensors itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from models import count_hooks
from safetensors.torch import load_file
from stores import mean_step, shards
from torch import nn

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import ActivationError, ArgumentError, StepError, StoreError
from activation_extractor.sinks import Step


@pytest.mark.parametrize("rows_per_unit", [1, 3, 4, 100])
def test_units_are_whole_steps_of_at_least_rows_per_unit(tmp_path, rows_per_unit):
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=rows_per_unit)
    for index in range(5):
        sink.write(mean_step(2, value=float(index)))
    sink.close()
    sizes = [len(load_file(path)["h.0:mean"]) for path in shards(tmp_path / "out")]
    assert sizes == {1: [2] * 5, 3: [4, 4, 2], 4: [4, 4, 2], 100: [10]}[rows_per_unit]
    assert [path.stem[-8:] for path in shards(tmp_path / "out")] == [f"{number:08d}" for number in range(len(sizes))]
    assert torch.cat([load_file(path)["h.0:mean"] for path in shards(tmp_path / "out")])[:, 0].tolist() == [
        index for index in range(5) for _ in range(2)
    ]
    assert (sink.rows, sink.nbytes) == (10, 10 * 3 * 4)


def test_units_are_closed_by_their_bytes(tmp_path):
    sink = SafetensorsSink(tmp_path / "out", unit_bytes=2 * 2 * 3 * 4)
    for _ in range(5):
        sink.write(mean_step(2))
    sink.close()
    assert [len(load_file(path)["h.0:mean"]) for path in shards(tmp_path / "out")] == [4, 4, 2]


@pytest.mark.parametrize("name", ["unit_bytes", "rows_per_unit"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "1"])
def test_a_unit_size_must_be_a_positive_integer(tmp_path, name, size):
    with pytest.raises(ArgumentError, match=f"{name} must be a positive integer, got "):
        SafetensorsSink(tmp_path, **{name: size})


def test_nothing_is_made_before_the_first_step(stack, tmp_path):
    with capture(stack, "h.0", sink=tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_at_the_door(stack, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something") as caught:
        capture(stack, "h.0", sink=tmp_path)
    assert caught.value.path == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_is_refused_too(stack, tokens, tmp_path):
    with capture(stack, "h.0", sink=tmp_path / "out"):
        stack(tokens)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"one that holds a store\. Choose another folder, or add to it with a sink"):
        capture(stack, "h.0", sink=str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before
    for sink in (tmp_path / "another", SafetensorsSink(tmp_path / "out", append=True)):  # as the text advises
        with capture(stack, "h.0", sink=sink):
            stack(tokens)
    assert open_store(tmp_path / "out").rows == 4


def test_a_mistake_in_another_argument_makes_no_folder(stack, tmp_path):
    with pytest.raises(LookupError):
        capture(stack, "h.9", sink=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [(["a", "a"],), (["a", "b"], ["c", "b"]), ([1, 2], [3, 1])])
@pytest.mark.parametrize("rows_per_unit", [1, 100])
def test_a_repeated_id_is_an_error_also_across_units(tmp_path, ids, rows_per_unit):
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=rows_per_unit)
    for one in ids[:-1]:
        sink.write(mean_step(2, one))
    repeated = ids[-1][1]
    with pytest.raises(
        StoreError, match=f"must hold each id once, got {repeated!r} again. Give every row an id of its"
    ):
        sink.write(mean_step(2, ids[-1]))


@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"], []])
def test_a_wrong_number_of_ids_is_an_error_and_stores_nothing(stack, tokens, tmp_path, ids):
    with (
        pytest.raises(StepError, match=f"must have the same rows in every column, got 2 in .* beside {len(ids)}"),
        capture(stack, "h.0", reduce="mean", sink=tmp_path / "out") as acts,
        acts.step(ids=ids),
    ):
        stack(tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_capture_that_is_entered_again_goes_on_writing(stack, tokens, tmp_path):
    recorded = capture(stack, "h.3", reduce="mean", sink=tmp_path / "out")
    for _ in range(2):
        with recorded:
            result = stack(tokens)
    first, second = (path.stem.rpartition("-") for path in shards(tmp_path / "out"))
    assert (first[0], first[2], second[2]) == (second[0], "00000000", "00000001")
    assert torch.allclose(load_file(shards(tmp_path / "out")[1])["h.3:mean"], result.mean(1))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_keeps_its_finished_steps_and_drops_the_unfinished_one(stack, tokens, tmp_path, error):
    def body() -> None:
        with capture(stack, "h.3", reduce="mean", sink=tmp_path / "out") as acts:
            for ids in (["a", "b"], ["c", "d"], ["e", "f"]):
                with acts.step(ids=ids):
                    stack(tokens)
                    if ids == ["e", "f"]:
                        raise error

    with pytest.raises(error):
        body()
    assert open_store(tmp_path / "out").ids == ["a", "b", "c", "d"]
    assert len(load_file(shards(tmp_path / "out")[0])["h.3:mean"]) == 4
    assert count_hooks(stack) == 0


class Twins(nn.Module):
    """Two layers whose outputs may differ in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.a(x)
        self.b(y)


def test_a_step_that_the_store_refuses_is_not_in_it():
    with tempfile.TemporaryDirectory() as folder:
        sink = SafetensorsSink(Path(folder) / "out")
        model = Twins()
        with pytest.raises(StoreError, match="keep one dtype"), capture(model, "*", sink=sink):
            model(torch.zeros(2, 3), torch.zeros(2, 3))
            model(torch.ones(2, 3), torch.ones(2, 4))
        assert load_file(shards(Path(folder) / "out")[0])["a:full"].shape == (2, 3)


@pytest.mark.parametrize("first", ["no rows", "a repeated id"])
def test_a_first_step_without_rows_or_refused_does_not_spoil_the_next(tmp_path, first):
    sink = SafetensorsSink(tmp_path / "out")
    if first == "no rows":
        sink.write(mean_step(0))
    else:
        with pytest.raises(StoreError):
            sink.write(mean_step(2, ["a", "a"]))
    sink.write(mean_step(2, ["b", "c"]))
    sink.close()
    assert open_store(tmp_path / "out").ids == ["b", "c"]


def test_a_layer_without_a_batch_axis_is_a_clear_error(tmp_path):
    model = nn.Sequential(nn.Flatten(0), nn.Softmax(0))
    model.append(type("Sum", (nn.Module,), {"forward": lambda self, x: x.sum()})())
    with pytest.raises(ActivationError), capture(model, "2", sink=tmp_path / "out"):
        model(torch.ones(2, 3))


def test_a_step_in_which_no_layer_ran_keeps_its_row(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Identity()

        def forward(self, x: torch.Tensor, runs: bool) -> torch.Tensor:
            return self.a(x) if runs else x

    model = Sometimes()
    with capture(model, "a", sink=tmp_path / "out", missing="skip") as acts:
        for number, runs in enumerate([True, False, True]):
            with acts.step(ids=[number]):
                model(torch.zeros(1, 2), runs)
    store = open_store(tmp_path / "out")
    assert store.ids == [0, 1, 2]
    assert store["a"].rows.tolist() == [0, 2]


def test_a_refused_step_can_be_written_again_in_another_form(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(mean_step(1, ["a"]))
    with pytest.raises(StoreError, match="keep one dtype"):
        sink.write(Step(1, 1, {("h.0", "mean"): torch.zeros(1, 4)}, ["b"], {}))
    sink.write(mean_step(1, ["b"]))


def test_a_dtype_that_cannot_be_stored_is_refused_with_its_step(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    with pytest.raises(ArgumentError, match="dtype of a tensor in a safetensors file must be one of"):
        sink.write(Step(0, 1, {("h.0", "mean"): torch.zeros(1, 4, dtype=torch.complex128)}, None, {}))
