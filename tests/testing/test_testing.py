"""`SinkTests`: every sink passes it, read back by safetensors, numpy and zipfile themselves; broken sinks do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from activation_extractor import MemorySink, NpySink, NpzSink, SafetensorsSink, Sink
from activation_extractor.sinks import Step
from activation_extractor.testing import SinkTests, Written


def rows_of(entries: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    values = entries[name]
    if name + "#offsets" in entries:
        return list(torch.split(values, entries[name + "#offsets"].diff().tolist()))
    return list(values)


def written(shards: list[dict[str, torch.Tensor]]) -> Written:
    """What entries of shards mean, by the format's description alone."""
    found = SimpleNamespace(values={}, ids=[], keep={})
    for entries in shards:
        for name in entries:
            if name.startswith("#keep:") and not name.endswith("#offsets"):
                found.keep.setdefault(unquote(name[6:]), []).extend(entries[name])
            elif "#" not in name:
                key = tuple(map(unquote, name.split(":")))
                found.values.setdefault(key, []).extend(rows_of(entries, name))
        if "#ids" in entries:
            ids = rows_of(entries, "#ids")
            is_text = "#ids#offsets" in entries
            found.ids += [bytes(one.tolist()).decode() if is_text else int(one) for one in ids]
    return Written(found.values, found.ids, found.keep)


class TestMemorySink(SinkTests):
    def make_sink(self, folder: Path) -> Sink:
        return MemorySink()

    def read(self, sink: Sink, folder: Path) -> Written:
        keys = {key: None for step in sink.steps for key in step.values}
        keep = {name: [row for step in sink.steps for row in step.keep[name]] for name in sink.steps[0].keep}
        return Written({key: list(sink[key]) for key in keys}, sink.ids, keep)


class TestSafetensorsSink(SinkTests):
    def make_sink(self, folder: Path) -> Sink:
        return SafetensorsSink(folder / "out", rows_per_unit=5)

    def read(self, sink: Sink, folder: Path) -> Written:
        return written([load_file(path) for path in sorted(folder.glob("out/shards/*.safetensors"))])


class NumpySinkTests(SinkTests):
    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class TestNpzSink(NumpySinkTests):
    def make_sink(self, folder: Path) -> Sink:
        return NpzSink(folder / "out", unit_bytes=40)

    def read(self, sink: Sink, folder: Path) -> Written:
        shards = []
        for path in sorted(folder.glob("out/shards/*.npz")):
            with np.load(path, allow_pickle=False) as archive:
                shards.append({name: torch.from_numpy(archive[name]) for name in archive.files})
        return written(shards)


class TestNpySink(NumpySinkTests):
    def make_sink(self, folder: Path) -> Sink:
        return NpySink(folder / "out")

    def read(self, sink: Sink, folder: Path) -> Written:
        shards = []
        for path in sorted(folder.glob("out/shards/*.npy")):
            names = json.loads((path / "about.json").read_text())["crc32"]
            arrays = [np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))]
            shards.append(dict(zip(names, map(torch.from_numpy, arrays), strict=True)))
        return written(shards)


class Faulty(MemorySink):
    """A memory sink with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def write(self, step: Step) -> None:
        if self.fault == "loses ids":
            step = replace(step, ids=None)
        if self.fault == "loses kept columns":
            step = replace(step, keep={})
        if self.fault == "rounds":
            step = replace(step, values={key: _rounded(value) for key, value in step.values.items()})
        if self.fault == "forgets the lengths":
            step = replace(step, values={key: getattr(one, "values", one) for key, one in step.values.items()})
        if self.fault == "keeps the first layer":
            step = replace(step, values=dict([next(iter(step.values.items()))]))
        if self.fault == "turns around":
            self.steps.insert(0, step)
        elif self.fault != "drops what follows" or not self.steps:
            self.steps.append(step)

    def close(self) -> None:
        if self.fault == "drops what is open":
            del self.steps[-1:]
        if self.fault == "cannot be closed twice" and getattr(self, "is_closed", False):
            raise OSError("closed already")
        self.is_closed = True


def _rounded(value):
    return value.bfloat16().to(value.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("loses ids", "ids_come_back_with_their_rows"),
        ("loses kept columns", "kept_columns_come_back_with_their_rows"),
        ("rounds", "rows_of_many_steps_come_back_in_order"),
        ("rounds", "a_capture_writes_what_its_layers_returned"),
        ("forgets the lengths", "ragged_rows_come_back_each_with_its_length"),
        ("keeps the first layer", "layers_and_reducers_are_kept_apart"),
        ("keeps the first layer", "names_come_back_as_they_went_in"),
        ("keeps the first layer", "threads_may_write_at_once"),
        ("turns around", "rows_of_many_steps_come_back_in_order"),
        ("drops what follows", "a_step_without_rows_changes_nothing"),
        ("drops what is open", "every_dtype_comes_back"),
        ("drops what is open", "a_block_that_fails_leaves_its_finished_steps"),
        ("cannot be closed twice", "closing_does_no_harm_twice_and_writing_goes_on_after_it"),
    ],
)
def test_a_sink_with_a_fault_fails_the_suite(tmp_path, fault, test):
    class Suite(TestMemorySink):
        def make_sink(self, folder: Path) -> Sink:
            return Faulty(fault)

    with pytest.raises((AssertionError, LookupError, OSError, ValueError)):
        getattr(Suite(), f"test_{test}")(tmp_path)


@pytest.mark.parametrize("checks_masks", [True, False])
def test_a_sink_that_reads_later_and_checks_no_masks_fails_the_suite(tmp_path, checks_masks):
    class Later(MemorySink):
        reads_later = True

        def write(self, step: Step) -> None:
            if checks_masks:
                step.check_masks()
            super().write(step)

    class Suite(TestMemorySink):
        def make_sink(self, folder: Path) -> Sink:
            return Later()

    suite = Suite()
    if checks_masks:
        suite.test_a_step_with_a_wrong_mask_is_an_error_and_is_not_stored(tmp_path)
    else:
        with pytest.raises(AssertionError, match="must be a MaskError"):
            suite.test_a_step_with_a_wrong_mask_is_an_error_and_is_not_stored(tmp_path)


def test_what_a_sink_does_not_store_is_skipped_and_says_so(tmp_path):
    class Suite(TestMemorySink):
        holds_ids = False

    with pytest.raises(Exception, match=r"The sink does not store this\.") as caught:
        Suite().test_ids_come_back_with_their_rows(tmp_path)
    assert type(caught.value).__name__ == "SkipTest"


def test_the_suite_needs_both_of_its_methods():
    with pytest.raises(TypeError, match="abstract"):
        SinkTests()
