"""``show``: what a store holds, for people and for scripts."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import mistake, run
from torch import nn

from activation_extractor import SafetensorsSink, extract
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step


def shown(*arguments: object) -> str:
    return run("show", *arguments).stdout


def told(*arguments: object) -> dict:
    return json.loads(shown(*arguments, "--json"))


def make_store(folder: Path, names=("h.0", "h.1"), ids=("a", "b", "c", "d")) -> Path:
    sink = SafetensorsSink(folder / "out", rows_per_unit=2)
    for unit in range(2):
        values = {(name, "mean"): torch.tensor([[3.0, 4.0, 0.0], [0.0, 2.0, 0.0]]) for name in names}
        values[names[0], "full"] = Ragged(torch.tensor([[1.0], [math.nan], [2.0]]), torch.tensor([2, 1]))
        keep = {"label": torch.arange(2), "phase": torch.ones(2, dtype=torch.complex64)}
        sink.write(Step(unit, 2, values, list(ids[2 * unit : 2 * unit + 2]) or None, keep))
    sink.close()
    return folder / "out"


def test_it_tells_what_a_store_is_and_lists_its_columns(tmp_path):
    lines = shown(make_store(tmp_path)).splitlines()
    head = dict(line.strip().split(":", 1) for line in lines[: lines.index("")])
    assert {name: value.strip() for name, value in head.items() if name in ("store", "rows", "format", "reducers")} == {
        "store": str(tmp_path / "out"),
        "rows": "4",
        "format": "safetensors, 2 units",
        "reducers": "mean, full",
    }
    assert head["ids"].strip() == "str: 'a', 'b', ..."
    assert f"torch {torch.__version__}" in head["versions"]
    nbytes = sum(path.stat().st_size for path in (tmp_path / "out/shards").iterdir())
    assert head["size"].endswith(f"({nbytes:,} bytes)")
    table = lines[lines.index("3 columns") + 1 : lines.index("2 kept columns") - 1]
    assert [line.split() for line in table] == [
        ["layer", "reducer", "row", "shape", "dtype", "rows"],
        ["h.0", "mean", "3", "float32", "4"],
        ["h.0", "full", "positions", "x", "1", "float32", "4"],
        ["h.1", "mean", "3", "float32", "4"],
    ]
    assert [line.split() for line in lines[lines.index("2 kept columns") + 1 :]] == [
        ["name", "row", "shape", "dtype", "rows"],
        ["label", "-", "int64", "4"],
        ["phase", "-", "complex64", "4"],
    ]


def test_stats_add_what_the_numbers_are_like(tmp_path):
    lines = [line.split() for line in shown(make_store(tmp_path), "--stats").splitlines()]
    assert "layer reducer row shape dtype rows mean norm variance dead features NaN inf" in map(" ".join, lines)
    variance = f"{(2.25 + 1 + 0) / 3:.4g}"
    assert ["h.1", "mean", "3", "float32", "4", "3.5", variance, "1", "3", "0", "0"] in lines
    assert ["h.0", "full", "positions", "x", "1", "float32", "4", "1.5", "0.25", "0", "1", "2", "0"] in lines
    assert ["phase", "-", "complex64", "4", "-", "-", "-", "-", "-", "-"] in lines


def test_numbers_end_below_the_end_of_their_names(tmp_path):
    lines = shown(make_store(tmp_path), "--stats").splitlines()
    head, first, second, third = lines[lines.index("3 columns") + 1 :][:4]
    for name in ("rows", "mean norm", "variance", "dead", "features", "NaN", "inf"):
        end = head.index(name) + len(name)
        for line in (first, second, third):
            assert line[end - 1] != " "
            assert line[end : end + 2].strip() == ""


def test_json_is_one_object_with_all_of_it(tmp_path):
    found = told(make_store(tmp_path))
    nbytes = sum(path.stat().st_size for path in (tmp_path / "out/shards").iterdir())
    expected = {"path": str(tmp_path / "out"), "rows": 4, "units": 2, "bytes": nbytes, "format": "safetensors"}
    assert found | expected == found
    assert (found["ids"], found["first_ids"], found["reducers"]) == ("str", ["a", "b"], ["mean", "full"])
    form = {"row_shape": [1], "dtype": "float32", "rows": 4, "ragged": True}
    assert found["columns"][1] == {"layer": "h.0", "reducer": "full", **form}
    assert [one["name"] for one in found["keep"]] == ["label", "phase"]
    assert found["versions"]["torch"] == torch.__version__


def test_json_has_null_where_there_is_no_number(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 2, {("a", "mean"): torch.full((2, 1), math.nan)}))
    sink.close()
    text = shown(tmp_path / "out", "--stats", "--json")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["columns"][0]["statistics"]
    expected = {"rows": 2, "features": 1, "mean_norm": None, "variance": None}
    assert found == {**expected, "dead_features": 0, "nan_count": 2, "inf_count": 0}
    assert shown(tmp_path / "out", "--stats").splitlines()[-1].split()[-6:] == ["-", "-", "0", "1", "2", "0"]


def test_the_options_and_the_model_of_an_extraction_are_told(tmp_path):
    batches = [{"input": torch.zeros(2, 4), "number": torch.tensor([7, 8])}]
    extract(nn.Sequential(nn.Linear(4, 2)), batches, "0", out=tmp_path / "out", ids="number", progress=False)
    found = told(tmp_path / "out")
    assert (found["model"], found["ids"], found["first_ids"]) == ("Sequential", "int", [7, 8])
    assert found["options"] == {"mask": "attention_mask", "sequence_axis": None, "calls": "last"}
    lines = shown(tmp_path / "out")
    assert "ids:            int: 7, 8\n" in lines
    assert "sequence axis:  none\n" in lines


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pooling_mask": "own"}, "own of the batches"),
        (
            {"mask": lambda layer, activation, mask: mask},
            "<lambda>",
        ),
    ],
)
def test_a_mask_is_named_and_never_shown_as_it_is_stored(tmp_path, options, expected):
    batches = [{"input": torch.zeros(2, 4)} | ({"own": torch.ones(2, 4)} if "pooling_mask" in options else {})]
    extract(nn.Sequential(nn.Linear(4, 2)), batches, "0", out=tmp_path / "out", progress=False, **options)
    assert told(tmp_path / "out")["options"]["mask"].startswith(expected)
    assert f"mask:           {expected}" in shown(tmp_path / "out")


def test_rows_without_ids_are_said_to_be_numbered(tmp_path):
    assert "none, rows are numbered" in shown(make_store(tmp_path, ids=()))


def test_the_ids_of_one_shard_are_read_and_no_more(tmp_path):
    out = make_store(tmp_path)
    second = sorted((out / "shards").iterdir())[1]
    os.truncate(second, 10)
    assert told(out)["first_ids"] == ["a", "b"]


def test_a_column_of_text_has_no_statistics(tmp_path, monkeypatch):
    from activation_extractor import Store

    monkeypatch.setattr(Store, "keep", property(lambda self: {"words": ["a", "b", "c", "d"]}))
    found = told(make_store(tmp_path), "--stats")["keep"]
    assert found == [{"name": "words", "row_shape": [], "dtype": "text", "rows": 4, "ragged": False}]
    assert shown(tmp_path / "out", "--stats").splitlines()[-1].split() == ["words", "-", "text", "4"]


def test_hundreds_of_layers_and_long_names_keep_a_line_each(tmp_path):
    names = [f"model.language_model.encoder.layers.{index}.self_attn.output.projection_layer" for index in range(300)]
    lines = shown(make_store(tmp_path, names)).splitlines()
    rows = lines[lines.index("301 columns") + 2 :][:301]
    assert [row.split()[0] for row in rows] == [names[0], *names]
    assert len({len(row) for row in rows}) == 1


def test_names_cannot_steer_a_terminal(tmp_path):
    done = shown(make_store(tmp_path, ["a\x1b[2J\nb", "c"]))
    assert "a\\x1b[2J\\nb" in done
    assert "\x1b" not in done


def test_a_folder_that_is_no_store_is_an_error(tmp_path):
    assert "must be a store, got a folder without manifest.json" in mistake("show", tmp_path)


def test_piped_it_has_neither_colours_nor_wrapped_lines(tmp_path, monkeypatch):
    out = make_store(tmp_path, [f"a_rather_long_name_of_a_layer.{index}.with_more_behind_it" for index in range(3)])
    text = shown(out, "--stats")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert shown(out, "--stats") == text
    assert "\x1b" not in text


def test_a_store_without_a_complete_unit_is_shown_too(tmp_path):
    out = make_store(tmp_path)
    for part in ("shards", "journal"):
        shutil.rmtree(out / part)
    found = told(out, "--stats")
    assert (found["rows"], found["units"], found["first_ids"]) == (0, 0, [])
    assert found["columns"][0]["statistics"]["mean_norm"] is None
    assert "safetensors, 0 units" in shown(out)


def test_it_tells_whether_a_store_is_complete(tmp_path):
    out = make_store(tmp_path)
    assert "complete: not known, since no run has said that it came to the end" in " ".join(shown(out).split())
    batches = [torch.full((2, 4), float(number)) for number in range(3)]
    extract(nn.Sequential(nn.Linear(4, 2)), batches, "0", out=tmp_path / "data", rows_per_unit=2, progress=False)
    assert "complete: yes" in " ".join(shown(tmp_path / "data").split())
    found = told(tmp_path / "data")
    assert (found["complete"], found["missing_units"]) == (True, [])
    (tmp_path / "data/shards/00000001.safetensors").unlink()
    assert "complete: no, 1 unit missing: '00000001'" in " ".join(shown(tmp_path / "data").split())
    found = told(tmp_path / "data")
    assert (found["complete"], found["missing_units"], found["rows"]) == (False, ["00000001"], 4)
