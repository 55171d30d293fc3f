"""`SinkTests`, a suite that every sink has to pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from activation_extractor.activations import capture
from activation_extractor.errors import MaskError
from activation_extractor.reducers._mask_fit import MaskCheck
from activation_extractor.sinks import Ragged, Sink, Step

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MEAN, _LAST = ("h.0", "mean"), ("h.0", "last")


@dataclass(frozen=True)
class Written:
    """What a sink holds, as a test reads it back.

    Attributes:
        values: by layer and reducer, a tensor for each row; ``(positions, *features)`` for a ragged one.
        ids: the ids of all rows.
        keep: the kept columns, by name, a tensor for each row.
    """

    values: Mapping[tuple[str, str], Sequence[Tensor]]
    ids: Sequence[int | str] = ()
    keep: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


class SinkTests(ABC):
    """A suite for pytest that a sink has to pass: nothing lost, nothing changed, in order.

    Derive a test class with `make_sink` and `read`. `read` should use other means than the sink's own code, or a
    mistake in both would go unnoticed.

    Attributes:
        holds_ids: whether the sink stores row ids. If not, their tests are skipped.
        holds_keep: whether it stores kept columns. If not, their tests are skipped.
        holds_ragged: whether it stores rows of different lengths. If not, their tests are skipped.
        dtypes: the dtypes that it has to store.

    Example:
        ``tests/test_my_sink.py``::

            class TestMySink(SinkTests):
                def make_sink(self, folder):
                    return MySink(folder / "out")

                def read(self, sink, folder):
                    return Written(values={("h.0", "mean"): ...}, ids=...)
    """

    holds_ids = holds_keep = holds_ragged = True
    dtypes: Sequence[torch.dtype] = (*_FLOATS, torch.int64, torch.bool)

    @abstractmethod
    def make_sink(self, folder: Path) -> Sink:
        """A new sink; `folder` is empty and belongs to this test."""

    @abstractmethod
    def read(self, sink: Sink, folder: Path) -> Written:
        """What was written to a sink that was closed."""

    def stored(self, tensor: Tensor) -> Tensor:
        """What a tensor is read back as; to be overridden by sinks that convert some dtypes."""
        return tensor

    def test_rows_of_many_steps_come_back_in_order(self, tmp_path: Path) -> None:
        """Steps of different sizes, one behind the other."""
        steps = [torch.randn(rows, 3) for rows in (2, 1, 4, 3, 2)]
        written = self._write(tmp_path, [{_MEAN: rows} for rows in steps])
        self._check(written.values[_MEAN], torch.cat(steps))

    def test_layers_and_reducers_are_kept_apart(self, tmp_path: Path) -> None:
        """Columns of one step differ in everything but their rows."""
        columns = {
            ("h.0", "mean"): torch.randn(2, 3),
            ("h.0", "last"): torch.randn(2, 5),
            ("h.1", "mean"): torch.randn(2, 3, 4),
            ("norm", "size"): torch.randn(2),
        }
        written = self._write(tmp_path, [columns])
        assert set(written.values) == set(columns)
        for key, rows in columns.items():
            self._check(written.values[key], rows)

    def test_names_come_back_as_they_went_in(self, tmp_path: Path) -> None:
        """Names are the user's: they may hold anything."""
        names = ["../up", "/root", "a:b#c%d", "ünï", "nul\0l", "", "x" * 300]
        columns = {(name, name): torch.full((1, 1), float(index)) for index, name in enumerate(names)}
        written = self._write(tmp_path, [columns])
        values = {key: [row.tolist() for row in rows] for key, rows in written.values.items()}
        assert values == {key: rows.tolist() for key, rows in columns.items()}

    def test_every_dtype_comes_back(self, tmp_path: Path) -> None:
        """Right to the bit, in the dtype that `stored` returns."""
        for dtype in self.dtypes:
            rows = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
            written = self._write(tmp_path / str(dtype), [{_MEAN: rows}])
            self._check(written.values[_MEAN], rows)

    def test_ragged_rows_come_back_each_with_its_length(self, tmp_path: Path) -> None:
        """Among them rows without positions."""
        self._needs(self.holds_ragged)
        lengths = [[3, 1], [0], [2, 4, 0]]
        steps = [Ragged(torch.randn(sum(of_step), 2), torch.tensor(of_step)) for of_step in lengths]
        written = self._write(tmp_path, [{("h.0", "full"): step} for step in steps])
        expected = [row for step in steps for row in step.rows()]
        assert [len(row) for row in written.values["h.0", "full"]] == [3, 1, 0, 2, 4, 0]
        for row, other in zip(written.values["h.0", "full"], expected, strict=True):
            assert torch.equal(row, self.stored(other))

    def test_ids_come_back_with_their_rows(self, tmp_path: Path) -> None:
        """As strings or as integers."""
        self._needs(self.holds_ids)
        for ids in (["b", "a", "ü/../", ""], [3, -1, 2**62, 0]):
            folder = tmp_path / type(ids[0]).__name__
            written = self._write(folder, [{_MEAN: torch.zeros(2, 1)}] * 2, ids=[ids[:2], ids[2:]])
            assert list(written.ids) == ids

    def test_kept_columns_come_back_with_their_rows(self, tmp_path: Path) -> None:
        """Of any shape."""
        self._needs(self.holds_keep)
        labels, weights = torch.arange(4), torch.randn(4, 2)
        keep = [{"label": labels[part], "weight": weights[part]} for part in (slice(0, 3), slice(3, 4))]
        written = self._write(tmp_path, [{_MEAN: torch.zeros(3, 1)}, {_MEAN: torch.zeros(1, 1)}], keep=keep)
        self._check(written.keep["label"], labels)
        self._check(written.keep["weight"], weights)

    def test_a_step_without_rows_changes_nothing(self, tmp_path: Path) -> None:
        """Wherever it comes."""
        rows = torch.randn(2, 3)
        written = self._write(tmp_path, [{_MEAN: rows[:0]}, {_MEAN: rows}, {_MEAN: rows[:0]}])
        self._check(written.values[_MEAN], rows)

    def test_closing_does_no_harm_twice_and_writing_goes_on_after_it(self, tmp_path: Path) -> None:
        """A capture that is entered again closes its sink each time."""
        rows = torch.randn(4, 3)
        sink = self._new_sink(tmp_path)
        sink.close()
        for index in range(2):
            sink.write(Step(index, 2, {_MEAN: rows[2 * index : 2 * index + 2]}, [2 * index, 2 * index + 1]))
            sink.close()
            sink.close()
        self._check(self.read(sink, tmp_path).values[_MEAN], rows)

    def test_threads_may_write_at_once(self, tmp_path: Path) -> None:
        """Nothing is lost or torn apart; the order of their steps is free."""
        sink = self._new_sink(tmp_path)

        def write(thread: int) -> None:
            for index in range(10):
                number = float(10 * thread + index)
                sink.write(Step(index, 2, {_MEAN: torch.full((2, 3), number), _LAST: torch.full((2, 1), number)}))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        sink.close()
        values = self.read(sink, tmp_path).values
        means, lasts = ([float(row.flatten()[0]) for row in values[key]] for key in (_MEAN, _LAST))
        assert means == lasts
        assert sorted(means) == [float(number) for number in range(40) for _ in range(2)]
        assert means[::2] == means[1::2]

    def test_a_capture_writes_what_its_layers_returned(self, tmp_path: Path) -> None:
        """Before a later layer overwrites the value."""
        model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), torch.randn(5, 4)
        sink = self._new_sink(tmp_path)
        with capture(model, "0", sink=sink), torch.no_grad():
            model(x[:2])
            model(x[2:])
        with torch.no_grad():
            expected = torch.cat([model[0](x[:2]), model[0](x[2:])])
        self._check(self.read(sink, tmp_path).values["0", "full"], expected)

    def test_a_block_that_fails_leaves_its_finished_steps(self, tmp_path: Path) -> None:
        """And not the step that was under way."""
        model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
        sink = self._new_sink(tmp_path)
        with suppress(KeyError), capture(model, "0", sink=sink) as acts, torch.no_grad():
            model(x)
            with acts.step():
                model(x)
                raise KeyError("the body's own")
        assert len(self.read(sink, tmp_path).values["0", "full"]) == 2

    def test_a_step_with_a_wrong_mask_is_an_error_and_is_not_stored(self, tmp_path: Path) -> None:
        """Of a sink that `reads_later`, which is to call `Step.check_masks`; at the latest when it is closed."""
        sink, rows = self._new_sink(tmp_path), torch.randn(2, 3)
        if not sink.reads_later:
            raise SkipTest("Masks are checked before a sink that does not read later is given a step.")
        mask = torch.tensor([[True, True], [False, False]])
        sink.write(Step(0, 2, {_MEAN: rows}, [0, 1]))
        sink.close()
        error: Exception | None = None
        try:
            sink.write(Step(1, 2, {_MEAN: rows}, [2, 3], _checks=[MaskCheck("h.0", mask, mask)]))
            sink.close()
        except MaskError as mask_error:
            error = mask_error
        assert error is not None, "a mask without a real position in row 1 must be a MaskError"
        assert "row 1" in str(error)
        with suppress(MaskError):  # a sink may say it again
            sink.close()
        self._check(self.read(sink, tmp_path).values[_MEAN], rows)

    def _write(self, folder: Path, steps: Sequence[Any], *, ids: Any = None, keep: Any = None) -> Written:
        sink = self._new_sink(folder)
        for index, columns in enumerate(steps):
            first = next(iter(columns.values()))
            rows = len(first.lengths) if isinstance(first, Ragged) else len(first)
            sink.write(Step(index, rows, columns, ids[index] if ids else None, keep[index] if keep else {}))
        sink.close()
        return self.read(sink, folder)

    def _new_sink(self, folder: Path) -> Sink:
        folder.mkdir(parents=True, exist_ok=True)
        return self.make_sink(folder)

    def _check(self, written: Sequence[Tensor], rows: Tensor) -> None:
        expected = self.stored(rows)
        assert len(written) == len(expected), f"{len(written)} rows in place of {len(expected)}"
        for index, (row, other) in enumerate(zip(written, expected, strict=True)):
            assert row.dtype == other.dtype, f"row {index} is {row.dtype} in place of {other.dtype}"
            assert torch.equal(row, other), f"row {index} is {row} in place of {other}"

    def _needs(self, is_held: bool) -> None:
        if not is_held:
            raise SkipTest("The sink does not store this.")
