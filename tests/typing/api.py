"""The public API as a type checker sees it; mypy checks this file and nobody runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from activation_extractor import (
    Activations,
    Capture,
    Column,
    Comparison,
    IntermediateExtractor,
    MemorySink,
    NpySink,
    NpzSink,
    SafetensorsSink,
    Sink,
    Store,
    blocks,
    capture,
    combined,
    compare,
    extract,
    gradients,
    inputs,
    open_store,
    outputs,
    position,
    positions,
    span,
    weighted_mean,
    without_tokens,
)
from activation_extractor.pytest_plugin import ActivationSnapshot, CaptureFixture
from activation_extractor.reducers import Reducer
from activation_extractor.sinks import Step
from activation_extractor.store import Damage, ShardInfo, StoreDataset, TextColumn, Verification
from activation_extractor.testing import SinkTests, Written, assert_activations_close, assert_no_hooks

model = nn.Linear(2, 2)

assert_type(capture(model, "h.*"), Capture)
assert_type(blocks(model), list[str])
assert_type(position(3), Reducer)
assert_type([positions(0, -1), span(1, [2, 3]), span("start", None, "max"), weighted_mean("idf")], list[Reducer])
span(1.5, 3)  # type: ignore[arg-type]
capture(model, {"two": combined(["h.0", inputs("h.1")], "mean")}, mask=without_tokens([1], argument="tokens"))
combined("h.*", "sum")  # type: ignore[arg-type]
SafetensorsSink("out", dtype=torch.float16)

with capture(model, ["h.0", nn.Linear, re.compile("h"), model, lambda name, module: True]) as acts:
    assert_type(acts, Activations)
    with acts.step(ids=["a"], keep={"label": [1]}):
        model(torch.zeros(2))
assert_type(acts.nbytes, int)
assert_type(acts["h.0"], Tensor)
assert_type(acts["h.0", "mean"], Tensor)
assert_type(acts["h.0"].shape, torch.Size)
assert_type(acts.get("h.0"), Tensor | None)
acts.save(Path("acts.npz"))

capture(model, {"x": outputs("h.0", select=0), "y": inputs("h.1"), "z": gradients("h.2")}, calls="join")
capture(lambda self: self.model, "h.0", sequence_axis=(2, 3), missing="skip", max_bytes=1, to="cpu", mask=None)
capture(model, "h", calls="first")  # type: ignore[arg-type]
capture(model, "h", "mean")  # type: ignore[call-arg]


@capture(model, "h", reduce=["mean", position(1)])
def predict(batch: Tensor, *, acts: Activations) -> Tensor:
    return batch


predict(torch.zeros(2))


class Counting(Sink):
    def write(self, step: Step) -> None:
        assert_type(step.rows, int)


capture(model, "h", sink=Counting())
capture(model, "h", sink=MemorySink())
capture(model, "h", sink=SafetensorsSink("out"))
capture(model, "h", sink=NpzSink("out", append=True, rows_per_unit=3))
capture(model, "h", sink=NpySink(Path("out"), unit_bytes=1, queue_bytes=2))

store = extract(model, [{"input": torch.zeros(2)}], "h", out="out", ids="id", keep=["label"], progress=False)
assert_type(store, Store)
assert_type(open_store("out"), Store)
assert_type(store["h"], Column)
assert_type(store["h"].torch(), Tensor)
assert_type(store["h"].numpy(), np.ndarray[Any, Any])
assert_type(store["h"][0], Tensor)
assert_type(store["h"][0:2], Tensor | Any)  # a list of tensors when ragged
assert_type(list(store["h"]), list[Tensor])
assert_type(store["h"].blocks(1 << 20, indices=[2, 0], flat=True), Iterator[Tensor | Any])
assert_type(store.keep["label"], Column | TextColumn)
if isinstance(text := store.keep["text"], TextColumn):
    assert_type(text[0], str)
    assert_type(text[0:2], list[str])
    assert_type(text.blocks(), Iterator[list[str]])
for key, column in store.items():
    assert_type(key, str | tuple[str, str])
    assert_type(column, Column)
assert_type(store.ids, list[int | str])
assert_type(store.row_of("a"), int)
assert_type(store["h"].mapped(), list[Tensor])
assert_type(store.dataset("h", ("h", "mean"), keep="label"), StoreDataset)
assert_type(store.shards, list[ShardInfo])
assert_type(store.verify(), Verification)
assert_type(store.verify()[0], Damage)
extract(model, [], "h", out="out", ids=lambda batch: batch["id"], format="npz", resume=False, queue_bytes=1)
extract(model, [], "h", out="out", ids=0, keep=[1, "label"])
extract(model, [], "h", out="out", keep=1)
extract(model, [], "h", out="out", keep=1.0)  # type: ignore[arg-type]
extract(model, [], "h", out="out", format="parquet")  # type: ignore[arg-type]


class TestCounting(SinkTests):
    def make_sink(self, folder: Path) -> Sink:
        return Counting()

    def read(self, sink: Sink, folder: Path) -> Written:
        return Written({("h", "mean"): [torch.zeros(2)]}, ids=["a"])


extractor = IntermediateExtractor(model, ["h"])
extractor.save_outputs("folder", "id", emb_formats=["mean", "LT"], save_method="numpy")
assert_type(extractor.get_outputs(), dict[str, Any])

found = compare(acts, store, match={"h.*": "layers.*"}, rtol={"h.0": 1e-3}, atol=0.0)
assert_type(found, Comparison)
assert_type(found.first_difference, str | None)
assert_type(found[0].max_abs, float)
compare(acts, {"h": torch.zeros(2)}, match="order", check_dtype=False)
compare(acts, acts, match="sorted")  # type: ignore[arg-type]
assert_activations_close(acts, store, match=lambda name: name.removeprefix("model."))
assert_no_hooks(model)


def test_model(capture_activations: CaptureFixture, activation_snapshot: ActivationSnapshot) -> None:
    recorded = capture_activations(model, "h.*", reduce="mean", calls="all")
    assert_type(recorded, Activations)
    capture_activations(model, "h.*", calls="first")  # type: ignore[arg-type]
    capture_activations(model, "h.*", reduces="mean")  # type: ignore[call-arg]
    capture_activations.close()
    activation_snapshot.check(recorded, name="blocks", rtol={"h.0": 1e-2}, max_bytes=1 << 24)
