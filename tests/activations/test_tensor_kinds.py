"""Every kind of tensor that a layer may return at every door: the right numbers, or an error that says what to call.

The table of README.md in `activations` is what this file finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from kinds import KINDS, LENGTHS, Returns, are_equal, numbers, one_process
from releases import SAFETENSORS, release
from torch import Tensor, nn

from activation_extractor import (
    Activations,
    MemorySink,
    NpySink,
    NpzSink,
    SafetensorsSink,
    capture,
    compare,
    extract,
    position,
    preview,
)
from activation_extractor.errors import ArgumentTypeError, TensorKindError
from activation_extractor.store import open_store, statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of torch: most of these kinds are called experimental
README = Path(__file__).parents[2] / "activation_extractor/activations/README.md"
X = torch.arange(24.0).reshape(2, 3, 4) - 7.25
X[:, :, 1] = 0


@pytest.fixture(scope="module", autouse=True)
def alone():
    with one_process():
        yield


def run(kind: str, **options: Any) -> Activations:
    model = nn.Sequential(Returns(kind))
    with capture(model, "0", **options) as acts:
        model(X.clone())
    return acts


def returned(kind: str) -> Tensor:
    return KINDS[kind](X.clone())


def reduced(kind: str, reducer: str) -> list[np.ndarray]:
    """What a reducer gives, by numpy, row by row."""
    takes = {
        "mean": lambda row: row.mean(0),
        "first": lambda row: row[0],
        "last": lambda row: row[-1],
        "max": lambda row: row.max(0),
        "position(1)": lambda row: row[1],
    }
    return [np.asarray(takes[reducer](row)) for row in numbers(returned(kind))]


# -- the doors: each returns what it gives, and what it should give ---------------------------------------------------

Outcome = tuple[Any, Any]
Door = Callable[[str, Path], Outcome]


def read(**options: Any) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        value = run(kind, **options)["0"]
        value = value[0] if isinstance(value, list) else value
        if options.get("calls") != "join":
            assert (type(value), value.dtype, value.layout) == (type(x := returned(kind)), x.dtype, x.layout)
        return value, returned(kind)

    return look


def shown(kind: str, folder: Path) -> Outcome:
    acts = run(kind)
    assert "0" in repr(acts)
    assert "<td>0</td>" in acts._repr_html_()
    return np.array([acts.nbytes > 0]), np.array([True])


def counted(kind: str, folder: Path) -> Outcome:
    assert run(kind, max_bytes=10_000).nbytes == run(kind).nbytes
    return read()(kind, folder)


def reduce(reducer: Any, **options: Any) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        name = reducer if isinstance(reducer, str) else reducer.__name__
        return run(kind, reduce=reducer, **options)["0"], reduced(kind, name)

    return look


def arrays(kind: str, folder: Path) -> Outcome:
    return run(kind).numpy()["0"], returned(kind)


def saved(suffix: str) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        path = folder / f"acts.{suffix}"
        run(kind).save(path)
        return np.load(path)["0"] if suffix == "npz" else safetensors.torch.load_file(path)["0"], returned(kind)

    return look


def in_memory(**options: Any) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        sink, model = MemorySink(), nn.Sequential(Returns(kind))
        with capture(model, "0", sink=sink, **options):
            model(X.clone())
            model(X.clone())
        reducer = options.get("reduce", "full")
        expected = reduced(kind, reducer) if "reduce" in options else numbers(returned(kind))
        return sink["0", reducer], expected * 2

    return look


def stored(make: Any, **options: Any) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        run(kind, sink=make(folder / "store"), **options)
        expected = reduced(kind, options["reduce"]) if "reduce" in options else returned(kind)
        return open_store(folder / "store")["0"][:], expected

    return look


def extracted(**options: Any) -> Door:
    def look(kind: str, folder: Path) -> Outcome:
        batches = [{"input": X.clone()}]
        store = extract(nn.Sequential(Returns(kind)), batches, "0", out=folder / "out", progress=False, **options)
        return store["0"][:], reduced(kind, options["reduce"]) if "reduce" in options else returned(kind)

    return look


def compared(kind: str, folder: Path) -> Outcome:
    acts, other = run(kind), run(kind)
    assert compare(acts, other).ok
    with_ones = {"0": torch.nested.nested_tensor([row + 1 for row in acts["0"].unbind()])} if acts["0"].is_nested else 0
    other = with_ones or {"0": torch.stack(list(map(torch.from_numpy, numbers(acts["0"])))) + 1}
    assert compare(acts, other).first_difference == "0"
    return acts["0"], returned(kind)


def previewed(kind: str, folder: Path) -> Outcome:
    (row,) = preview(nn.Sequential(Returns(kind)), "0", X.clone())
    value = returned(kind)
    assert (row.calls, row.dtype, row.shape is None) == (1, value.dtype, value.is_nested)
    assert row.nbytes == run(kind).nbytes
    return value, value


def measured(kind: str, folder: Path) -> Outcome:
    run(kind, sink=folder / "store")
    found = statistics(open_store(folder / "store")["0"])
    positions = np.concatenate([row.reshape(-1, 4) for row in numbers(returned(kind))])
    assert found.mean_norm == pytest.approx(np.linalg.norm(positions, axis=1).mean())
    return X, X


READ = [{}, {"copy": False}, {"detach": False}, {"calls": "all"}, {"calls": "join"}]
SINKS = [SafetensorsSink, NpzSink, NpySink]
DOORS: dict[str, list[Door]] = {
    "`acts[...]`, `repr`, `nbytes`, `preview`": [*(read(**options) for options in READ), counted, shown, previewed],
    "`mean`, `first`, `last`": [
        reduce(name, **options) for name in ("mean", "first", "last") for options in ({}, {"calls": "join"})
    ],
    "`max`": [reduce("max")],
    "`position(k)`": [reduce(position(1))],
    "`numpy()`, `save`": [arrays, saved("npz"), saved("safetensors")],
    "`MemorySink`": [in_memory(), in_memory(reduce="mean")],
    "stores, `extract`": [
        *(stored(sink) for sink in SINKS),
        *(stored(sink, reduce="mean") for sink in SINKS),
        extracted(),
        extracted(reduce="last"),
    ],
    "`compare`": [compared],
    "`statistics`": [measured],
    "`to=`": [read(to="cpu"), read(to="cpu", calls="all")],
}


def verdict(kind: str, door: Door, folder: Path) -> str:
    try:
        found, expected = door(kind, folder)
    except (TensorKindError, ArgumentTypeError) as error:
        # It names the layer, and says what to do.
        is_clear = re.search(r"(layer '0'|\('0', 'full'\)).*\. [A-Z].*\.$", str(error))
        return "error" if is_clear else f"unclear: {error}"
    if isinstance(found, list) and getattr(returned(kind), "is_nested", False):
        return "rows" if are_equal(found, expected) else "wrong"
    return "right" if are_equal(found, expected) else "wrong"


def found_by(kind: str, doors: list[Door], folder: Path) -> str:
    verdicts = []
    for number, door in enumerate(doors):
        place = folder / str(number)
        place.mkdir()
        verdicts.append(verdict(kind, door, place))
    if "rows" in verdicts:  # what is reduced has no rows of different lengths
        verdicts = ["rows" if it == "right" else it for it in verdicts]
    return " or ".join(dict.fromkeys(verdicts))


# torch 2.6 lays out few operators on a DTensor; the library safetensors, which checks, reads complex64 from 0.7 on.
TOO_OLD = {"DTensor": release("torch") < (2, 7), "complex": SAFETENSORS < (0, 7)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not TOO_OLD.get(kind)])
def test_a_kind_at_each_door_is_as_the_guide_says(kind, tmp_path):
    row = [kind]
    for number, doors in enumerate(DOORS.values()):
        (folder := tmp_path / str(number)).mkdir()
        row.append(found_by(kind, doors, folder))
    assert f"| {' | '.join(row)} |" in README.read_text(encoding="utf-8").splitlines()


def test_the_table_of_the_guide_has_these_doors_and_kinds_alone():
    text = README.read_text(encoding="utf-8").partition("## What a layer may return\n")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [cell.strip("| ") for cell in lines[0][1:]] == list(DOORS)
    assert [line[0].strip("| ") for line in lines[1:] if "---" not in line[0]] == list(KINDS)


ADVICE = re.compile(r"reduce=(lambda activation, mask: [^,]*?\(.*?\))\.$")


@pytest.mark.parametrize("kind", ["nested, strided", "nested, jagged"])
def test_what_an_error_advises_works(kind, tmp_path):
    with pytest.raises(TensorKindError) as caught:
        run(kind).numpy()
    reducer = eval(ADVICE.search(str(caught.value))[1])
    acts = run(kind, reduce=reducer)
    assert acts.numpy()["0"].shape == (2, 3, 4)
    acts.save(tmp_path / "acts.safetensors")
    run(kind, reduce=reducer, sink=tmp_path / "store")
    assert open_store(tmp_path / "store")["0"].shape == (2, 3, 4)
    assert LENGTHS == [3, 2]


def test_what_an_error_over_complex_numbers_advises_works():
    with pytest.raises(
        TensorKindError, match="^The value of layer '0' must hold plain numbers for reducer 'max'"
    ) as caught:
        run("complex", reduce="max")
    from activation_extractor.reducers import max

    reducer = eval(str(caught.value).partition("reduce=")[2].removesuffix("."), {"max": max})
    assert run("complex", reduce=reducer)["0"].shape == (2, 4)
