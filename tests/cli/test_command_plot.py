"""``activation-extractor plot``."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("matplotlib", reason="it draws the pictures")
pytest.importorskip("typer", reason="it reads the command line")

from commands import mistake, run

from activation_extractor import SafetensorsSink, plots
from activation_extractor.sinks import Step

ROWS = 8
BOOKS = ["Job", "Luke"] * 4


@pytest.fixture
def store(tmp_path):
    """Two layers, two reducers, ids and kept columns."""
    sink = SafetensorsSink(tmp_path / "store")
    keys = [(layer, reducer) for layer in ("h.0", "h.1") for reducer in ("last", "mean")]
    keep = {"number": torch.arange(ROWS) / 2, "book": BOOKS, "grid": torch.ones(ROWS, 2)}
    sink.write(Step(0, ROWS, {key: torch.randn(ROWS, 3) for key in keys}, [f"v{row}" for row in range(ROWS)], keep))
    sink.close()
    return tmp_path / "store"


@pytest.fixture
def figures(monkeypatch):
    """The figures that commands write."""
    kept, save = [], plots.save_plot
    monkeypatch.setattr(plots, "save_plot", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_by_default_everything_is_in_one_picture_without_pyplot(store, tmp_path, figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    out = tmp_path / "picture.png"
    done = run("plot", store, "--out", out)
    assert done.stdout == f"Wrote {out}: projection, norms and similarity of 2 layers and 8 rows of {store}\n"
    assert titles(figures[0]) == ["h.1 · mean", "Similarity of layers · mean", "Norms by layer · mean"]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "title", "told"),
    [
        (["--kind", "norms"], "Norms by layer · mean", "norms of 2 layers and 8 rows"),
        (
            ["--kind", "similarity", "--reduce", "LT"],
            "Similarity of layers · last",
            "similarity of 2 layers and 8 rows",
        ),
        (["--kind", "projection"], "h.1 · mean", "8 rows of layer 'h.1'"),
        (["--layers", "h.0", "--reduce", "last"], "h.0 · last", "8 rows of layer 'h.0'"),
    ],
)
def test_one_kind_is_drawn_alone(store, tmp_path, figures, options, title, told):
    done = run("plot", store, "--out", tmp_path / "one.svg", *options)
    assert titles(figures[0]) == [title]
    assert (tmp_path / "one.svg").read_bytes().startswith(b"<?xml")
    assert told in done.stdout


@pytest.mark.parametrize("options", [[], ["--layers", "h.0"]])
def test_a_kept_column_of_text_colours_the_points(store, tmp_path, figures, options):
    run("plot", store, "--out", tmp_path / "one.svg", "--labels", "book", *options)
    assert legend(figures[0]) == ["Job (4)", "Luke (4)"]


def test_a_kept_column_of_numbers_is_a_scale(store, tmp_path, figures):
    run("plot", store, "--out", tmp_path / "one.svg", "--labels", "number")
    assert figures[0].axes[0].collections[-1].get_array().tolist() == [row / 2 for row in range(ROWS)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        lines = [
            ",".join(rows[0]),
            *(",".join("" if one is None else str(one) for one in row.values()) for row in rows),
        ]
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_gives_labels_by_row_number(store, tmp_path, figures, suffix):
    rows = [{"kind": "ab"[row < 3], "score": row + 0.5} for row in range(ROWS)]
    path = write(tmp_path / f"labels{suffix}", rows)
    run("plot", store, "--out", tmp_path / "one.svg", "--layers", "h.1", "--labels", f"{path}:kind")
    assert legend(figures[0]) == ["a (5)", "b (3)"]
    run("plot", store, "--out", tmp_path / "one.svg", "--layers", "h.1", "--labels", f"{path}:score")
    assert figures[1].axes[0].collections[-1].get_array().tolist() == [row + 0.5 for row in range(ROWS)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_gives_labels_by_row_id_and_none_where_a_cell_is_empty(store, tmp_path, figures, suffix):
    rows = [{"id": f"v{row}", "score": None if row == 2 else row + 0.5} for row in (9, 7, 0, 1, 2, 3, 4, 5, 6)]
    path = write(tmp_path / f"labels{suffix}", rows)
    ids = ["--labels", f"{path}:score", "--label-ids", "id"]
    run("plot", store, "--out", tmp_path / "one.svg", "--layers", "h.1", *ids)
    assert figures[0].axes[0].collections[-1].get_array().tolist() == [0.5, 1.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--labels", "boook"],
            r"--labels must name a kept column of the store, or FILE\.jsonl:COLUMN, got 'boook'\. "
            r"There is 'number', 'book', 'grid'\.",
        ),
        (["--labels", "grid"], r"--labels must be a string or a number for each row, got \[1\.0, 1\.0\]"),
        (["--labels", "FEW:kind"], r"must have 8 rows, as the store has, got 2\. Name its column"),
        (
            ["--labels", "FEW:none"],
            r"--labels must name a column of .*few\.csv, got 'none'\. There is 'id'",
        ),
        (["--labels", "FEW:kind", "--label-ids", "x"], "--label-ids must name a column of .*got 'x'"),
        (["--labels", "FEW:kind", "--label-ids", "kind"], "a column that holds each id once"),
        (
            ["--labels", "FEW:kind", "--label-ids", "id"],
            "--label-ids must name a column that holds the id of every row of the store, got .*'v2', 'v3', 'v4' and 3",
        ),
        (
            ["--labels", "none.csv:kind"],
            "The file of --labels must be rows of csv, got 'none.csv: No such",
        ),
        (["--labels", "BAD:kind"], "The file of --labels must be rows of jsonl, got"),
        (["--labels", "book", "--label-ids", "id"], "--label-ids must go with --labels FILE:COLUMN"),
        (["--labels", "book", "--kind", "norms"], "--labels must go with --kind projection, got"),
        (["--layers", "h.0", "--kind", "similarity"], "--layers must go with --kind projection, got"),
        (["--layers", "h.2"], "Nothing is recorded under 'h.2'. Close matches: 'h."),
        (
            ["--reduce", "men"],
            "A reducer in a key must be one of 'last', 'mean', got 'men'. Extract it with --reduce first",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_no_file(store, tmp_path, options, text):
    few = write(tmp_path / "few.csv", [{"id": "v0", "kind": "a"}, {"id": "v1", "kind": "a"}])
    (tmp_path / "bad.jsonl").write_text('{"kind": 1}\n[1]\n')
    options = [one.replace("FEW", str(few)).replace("BAD", str(tmp_path / "bad.jsonl")) for one in options]
    assert re.search(text, mistake("plot", store, "--out", tmp_path / "one.svg", *options))
    assert not (tmp_path / "one.svg").exists()


def test_another_suffix_is_an_error_before_anything_is_read(tmp_path):
    assert "must end in .png or .svg" in mistake("plot", tmp_path / "none", "--out", tmp_path / "one.pdf")


def test_a_folder_that_is_no_store_is_an_error(tmp_path):
    assert "must be a store" in mistake("plot", tmp_path / "none", "--out", tmp_path / "one.svg")


def test_help_shows_examples_on_lines_of_their_own():
    done = run("plot", "--help")
    assert "activation-extractor plot out --out cka.svg --kind similarity --reduce last\n" in done.stdout
