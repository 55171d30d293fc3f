"""Pictures of a store: what is on the axes, and the files."""

from __future__ import annotations

import pickle
import struct
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="it draws the pictures")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from activation_extractor import SafetensorsSink, open_store, plots
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, MissingExtraError, StoreError
from activation_extractor.sinks import Step

GREY = "#bbbbbb"


def store_of(folder, *steps, keep=None):
    """A store of values by layer, or by layer and reducer, step by step."""
    sink = SafetensorsSink(folder)
    for index, step in enumerate(steps):
        values = {key if isinstance(key, tuple) else (key, "mean"): value for key, value in step.items()}
        rows = max(len(one.lengths) if isinstance(one, Ragged) else len(one) for one in values.values())
        sink.write(Step(index, rows, values, None, keep or {}))
    sink.close()
    return open_store(folder)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def texts(axes):
    return [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]


def points(axes):
    return {to_hex(one.get_facecolors()[0]): len(one.get_offsets()) for one in axes.collections}


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_rows_are_points_on_components_whose_share_of_the_variance_is_told(tmp_path):
    rows = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    axes = plots.projection(store_of(tmp_path, {"h.0": rows})["h.0"]).axes[0]
    assert texts(axes) == ["h.0 · mean", "4 rows"]
    assert axes.get_xlabel() == "PC 1 (90.0 % of variance)"
    assert axes.get_ylabel() == "PC 2 (10.0 % of variance)"
    drawn = np.abs(axes.collections[0].get_offsets())
    np.testing.assert_allclose(drawn, rows.abs(), atol=1e-6)


def test_of_many_rows_an_even_sample_is_drawn_with_its_own_labels(tmp_path):
    store = store_of(tmp_path, {"h": randn(1500, 3)}, {"h": randn(1500, 3)})
    axes = plots.projection(store["h"], ["first"] * 1500 + ["second"] * 1500, max_rows=1000).axes[0]
    assert texts(axes)[1] == "1,000 of 3,000 rows"
    assert sorted(points(axes).values()) == [500, 500]


def test_the_nine_most_frequent_labels_have_colours_and_the_others_are_grey(tmp_path):
    labels = [f"_label${rank}" for rank in range(12) for _ in range(20 - rank)]
    store = store_of(tmp_path, {"h": randn(len(labels), 4)})
    figure = plots.projection(store["h"], labels)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [f"_label${rank} ({20 - rank})" for rank in range(9)] + ["others (30)"]
    drawn = points(axes)
    assert len(drawn) == 10
    assert drawn[GREY] == 30
    handles = [to_hex(one.get_facecolor()[0]) for one in axes.get_legend().legend_handles]
    assert [drawn[color] for color in handles] == [*range(20, 11, -1), 30]


def test_labels_of_few_kinds_have_no_others(tmp_path):
    store = store_of(tmp_path, {"h": randn(6, 4)})
    for labels in (["a", "b"] * 3, [0, 1] * 3, [True, False] * 3, torch.tensor([0, 1] * 3), np.array(["a", "b"] * 3)):
        axes = plots.projection(store["h"], labels).axes[0]
        assert len(axes.get_legend().get_texts()) == 2
        assert GREY not in points(axes)


@pytest.mark.parametrize("labels", [[0.5, 1, 2, 3], torch.tensor([0.5, 1, 2, 3]).bfloat16()])
def test_numbers_are_a_scale_with_a_colourbar(tmp_path, labels):
    labels = labels.float() if isinstance(labels, torch.Tensor) else labels
    figure = plots.projection(store_of(tmp_path, {"h": randn(4, 4)})["h"], labels)
    axes = figure.axes[0]
    assert axes.get_legend() is None
    assert axes.collections[-1].get_array().tolist() == [0.5, 1, 2, 3]
    assert axes.collections[-1].get_cmap().name == "viridis"
    assert [child.get_ylabel() for child in axes.child_axes] == ["label"]


def test_rows_without_a_label_are_grey(tmp_path):
    column = store_of(tmp_path, {"h": randn(4, 4)})["h"]
    axes = plots.projection(column, [0.5, float("nan"), None, 2]).axes[0]
    assert [len(one.get_offsets()) for one in axes.collections] == [2, 2]
    assert to_hex(axes.collections[0].get_facecolors()[0]) == GREY
    assert points(plots.projection(column, ["a", None, None, "a"]).axes[0])[GREY] == 2


def test_kept_columns_of_numbers_and_of_text_are_labels(tmp_path):
    keep = {"number": torch.arange(20) * 3, "book": ["Job", "Luke"] * 10}
    store = store_of(tmp_path, {"h": randn(20, 4)}, keep=keep)
    axes = plots.projection(store["h"], store.keep["number"]).axes[0]
    assert axes.collections[-1].get_array().tolist() == list(range(0, 60, 3))
    axes = plots.projection(store["h"], store.keep["book"]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Job (10)", "Luke (10)"]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_labels_for_another_number_of_rows_are_an_error(tmp_path, count):
    store = store_of(tmp_path, {"h": randn(4, 4)})
    for draw in (lambda labels: plots.projection(store["h"], labels), lambda labels: plots.overview(store, labels)):
        with pytest.raises(ArgumentError, match=f"labels must have a value for each of 4 rows, got {count}"):
            draw(["a"] * count)


def test_labels_that_are_neither_strings_nor_numbers_are_an_error(tmp_path):
    store = store_of(tmp_path, {"h": randn(2, 4)})
    with pytest.raises(ArgumentError, match=r"labels must be a string or a number for each row, got \[1, 2\]"):
        plots.projection(store["h"], [[1, 2], [3, 4]])


def test_rows_with_nan_or_infinity_are_left_out_and_counted(tmp_path):
    rows = randn(6, 3)
    rows[1, 0], rows[4, 2] = float("nan"), float("inf")
    store = store_of(tmp_path, {"a": rows, "b": randn(6, 3)})
    note = "6 rows; 2 with NaN or infinity left out"
    axes = plots.projection(store["a"], ["a", "x", "a", "a", "x", "a"]).axes[0]
    assert texts(axes)[1] == note
    assert list(points(axes).values()) == [4]
    assert note in texts(plots.norms(store).axes[0])[1]
    assert note in texts(plots.similarity(store).axes[0])[1]


def test_ragged_rows_are_averaged_over_their_positions_and_the_subtitle_says_so(tmp_path):
    ragged = Ragged(torch.tensor([[1.0, 0], [3, 0], [0, 5], [2, 2]]), torch.tensor([2, 1, 0, 1]))
    store = store_of(tmp_path, {("h", "full"): ragged})
    axes = plots.projection(store["h"], list("abcd")).axes[0]
    assert texts(axes)[1] == "4 rows; 1 with NaN or infinity left out; mean over positions"
    assert len(points(axes)) == 3
    axes = plots.norms(store).axes[0]
    assert axes.get_ylabel() == "L2 norm of a position"
    assert axes.lines[0].get_ydata()[0] == pytest.approx(2.914, abs=1e-3)  # of 1, 3, 5 and 2√2


@pytest.mark.parametrize("rows", [torch.ones(5, 3), torch.ones(5, 1), torch.ones(4, 40)])
def test_a_constant_column_is_a_picture_that_says_so(tmp_path, rows):
    figure = plots.overview(store_of(tmp_path, {"g": randn(len(rows), 2), "h": rows}))
    figure.draw_without_rendering()
    axes = plots.projection(open_store(tmp_path)["h"]).axes[0]
    assert texts(axes)[1].endswith("; all alike")
    assert axes.get_xlabel() == "PC 1 (0.0 % of variance)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_column_of_one_feature_in_any_dtype_lies_on_a_line(tmp_path, dtype):
    axes = plots.projection(store_of(tmp_path, {"h": randn(5, 1).to(dtype)})["h"]).axes[0]
    assert not axes.collections[0].get_offsets()[:, 1].any()
    assert axes.get_xlabel() == "PC 1 (100.0 % of variance)"


@pytest.mark.parametrize("rows", [torch.ones(1, 3), torch.tensor([[1.0], [float("nan")]])])
def test_fewer_than_two_rows_are_an_error(tmp_path, rows):
    store = store_of(tmp_path, {"h": rows})
    text = r"\('h', 'mean'\) must have at least 2 rows of finite numbers to be drawn, got 1\."
    with pytest.raises(ArgumentError, match=text):
        plots.projection(store["h"])


def short_store(folder):
    """Layer b lacks rows 0 to 3, layer c the last four."""
    steps = [
        {"a": randn(4, 3), "c": randn(4, 3)},
        {key: randn(4, 3) for key in "abc"},
        {"a": randn(4, 3), "b": randn(4, 3)},
    ]
    return store_of(folder, *steps)


def test_a_column_short_of_rows_has_the_labels_of_its_rows(tmp_path):
    store = short_store(tmp_path)
    assert len(store["b"]) == len(store["c"]) == 8
    labels = ["first"] * 4 + ["middle"] * 4 + ["last"] * 4
    for given in (labels, labels[4:]):
        legend = plots.projection(store["b"], given).axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["middle (4)", "last (4)"]
    legend = plots.overview(store, labels).axes[0].get_legend()
    assert len(legend.get_texts()) == 2


def test_layers_are_compared_on_the_rows_that_all_of_them_have(tmp_path):
    assert texts(plots.similarity(short_store(tmp_path)).axes[0])[1] == "4 rows"


def test_too_few_common_rows_are_an_error(tmp_path):
    store = store_of(tmp_path, {"a": randn(2, 3), "b": randn(2, 3)})
    with pytest.raises(
        ArgumentError, match="The layers must have at least 3 rows of finite numbers to be drawn, got 2"
    ):
        plots.similarity(store)


def test_norms_are_median_quartiles_and_the_range_of_nine_in_ten(tmp_path):
    store = store_of(tmp_path, {"h.0": torch.arange(101.0)[:, None], "h.1": torch.full((101, 1), 7.0)})
    axes = plots.norms(store).axes[0]
    outer, inner = (one.get_segments() for one in axes.collections)
    assert outer[0][:, 1].tolist() == [5, 95]
    assert inner[0][:, 1].tolist() == [25, 75]
    assert axes.lines[0].get_ydata().tolist() == [50, 7]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["5 to 95 %", "25 to 75 %", "median"]
    assert ticks(axes.xaxis) == ["0", "1"]
    assert axes.get_xlabel() == "layer (h.*)"
    assert texts(axes) == ["Norms by layer · mean", "101 rows"]


@pytest.mark.parametrize(("factor", "scale"), [(50.0, "linear"), (1000.0, "log"), (0.0, "linear")])
def test_norms_that_differ_by_more_than_100_times_are_on_a_logarithmic_axis(tmp_path, factor, scale):
    store = store_of(tmp_path, {"a": torch.ones(5, 2), "b": torch.ones(5, 2) * factor})
    assert plots.norms(store).axes[0].get_yscale() == scale


def test_a_layer_of_nothing_but_nan_is_a_gap(tmp_path):
    figure = plots.norms(store_of(tmp_path, {"a": torch.full((4, 2), torch.nan), "b": torch.ones(4, 2)}))
    figure.draw_without_rendering()
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [True, False]


def test_similarity_is_written_into_the_cells_of_few_layers(tmp_path):
    x = randn(50, 4)
    store = store_of(tmp_path, {"a": x, "b": x * 3 + 1, "c": torch.ones(50, 2)})
    axes = plots.similarity(store).axes[0]
    assert texts(axes)[1] == "50 rows; constant layers are grey"
    assert texts(axes)[2:] == ["1.00", "1.00", "-", "1.00", "1.00", "-", "-", "-", "-"]
    assert axes.images[0].get_clim() == (0, 1)
    assert [child.get_ylabel() for child in axes.child_axes] == ["linear CKA"]


def test_similarity_of_fewer_rows_than_features_says_that_it_is_biased(tmp_path):
    store = store_of(tmp_path, {"a": randn(9, 4), "b": randn(9, 10)})
    assert texts(plots.similarity(store).axes[0])[1] == "9 rows; fewer rows than features: biased upward"
    assert "biased" not in texts(plots.similarity(store_of(tmp_path / "b", {"a": randn(9, 9)})).axes[0])[1]


def test_of_many_layers_some_are_named_and_no_numbers_are_written(tmp_path):
    store = store_of(tmp_path, {f"transformer.h.{layer}.mlp": randn(5, 2) for layer in range(40)})
    axes = plots.similarity(store).axes[0]
    assert len(axes.texts) == 1
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == [str(layer) for layer in range(0, 40, 2)]
    assert axes.get_ylabel() == "layer (transformer.h.*.mlp)"


@pytest.mark.parametrize(
    ("names", "own", "shared"),
    [
        (["a.b"], ["a.b"], "layer"),
        (["a.0", "a.1.b"], ["0", "1.b"], "layer (a.*)"),
        (["a", "a.b"], ["a", "a.b"], "layer"),
        (["x.0.y", "x.1.y"], ["0", "1"], "layer (x.*.y)"),
        (["embed", "head$_1"], ["embed", "head$_1"], "layer"),
        (["x." + "long_" * 20 + "end", "x.b"], ["long_long_long_…_long_long_end", "b"], "layer (x.*)"),
    ],
)
def test_what_names_share_is_said_once(tmp_path, names, own, shared):
    figure = plots.norms(store_of(tmp_path, {name: randn(5, 2) for name in names}))
    figure.draw_without_rendering()
    assert ticks(figure.axes[0].xaxis) == own
    assert figure.axes[0].get_xlabel() == shared
    assert not any(label.get_parse_math() for label in figure.axes[0].xaxis.get_ticklabels())  # a $ is a $


def test_the_reducer_is_the_only_one_or_mean_or_the_first_of_one_length(tmp_path):
    ragged = Ragged(torch.ones(3, 2), torch.tensor([2, 1]))
    for place, (reducers, expected) in enumerate(
        [(["last"], "last"), (["last", "mean"], "mean"), (["full", "max", "last"], "max"), (["full"], "full")]
    ):
        values = {("h", one): ragged if one == "full" else torch.ones(2, 2) for one in reducers}
        store = store_of(tmp_path / str(place), values)
        assert texts(plots.norms(store).axes[0])[0] == f"Norms by layer · {expected}"
        assert texts(plots.norms(store, reducers[0]).axes[0])[0] == f"Norms by layer · {reducers[0]}"


@pytest.mark.parametrize(
    "draw", [plots.norms, plots.similarity, lambda store, reducer: plots.overview(store, None, reducer)]
)
def test_an_unknown_reducer_is_the_stores_own_error(tmp_path, draw):
    with pytest.raises(ActivationNotFoundError, match="A reducer in a key must be one of 'mean', got 'men'"):
        draw(store_of(tmp_path, {"h": randn(4, 2)}), "men")


def test_an_overview_shows_the_last_layer_norms_and_similarity(tmp_path):
    store = store_of(tmp_path, {"h.0": randn(9, 2), "h.1": randn(9, 3)})
    titles = [axes.get_title(loc="left") for axes in plots.overview(store).axes]
    assert titles == ["h.1 · mean", "Similarity of layers · mean", "Norms by layer · mean"]


def test_an_overview_of_one_layer_has_nothing_to_compare(tmp_path):
    figure = plots.overview(store_of(tmp_path, {"h": randn(2, 2)}))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["h · mean", "Norms by layer · mean"]


@pytest.mark.parametrize(
    "draw", [plots.norms, plots.similarity, plots.overview, lambda store: plots.projection(store["a"])]
)
def test_a_notebook_shows_a_figure_that_ends_a_cell(tmp_path, draw):
    before = set(sys.modules)
    figure = draw(store_of(tmp_path, {"a": randn(5, 2), "b": randn(5, 2)}))
    assert isinstance(figure, Figure)
    shown = displayed(figure)
    width, height = struct.unpack(">II", shown[16:24])
    assert (width, height) == tuple(figure.get_size_inches() * figure.dpi // 1)
    assert displayed(pickle.loads(pickle.dumps(figure)))
    assert "matplotlib.pyplot" not in sys.modules.keys() - before


def displayed(value):
    """What IPython shows of a value, with its own rule: a method of the class that gives the bytes of a PNG."""
    method = getattr(type(value), "_repr_png_", None)
    png = None if method is None else method(value)
    assert png is not None
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return png


def test_an_svg_is_the_same_byte_for_byte(tmp_path):
    store = store_of(tmp_path / "store", {"h.0": randn(9, 2), "h.1": randn(9, 3)})
    for name in ("a.svg", "b.SVG"):
        plots.save_plot(plots.overview(store, list("aabbccdde")), tmp_path / name)
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.SVG").read_bytes()
    assert b"<svg" in first


def test_a_png_has_200_dots_per_inch_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("before")
    plots.save_plot(Figure(figsize=(2, 1)), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (400, 200)


@pytest.mark.parametrize("name", ["picture.jpg", "picture", ".png"])
def test_another_suffix_is_an_error(tmp_path, name):
    with pytest.raises(ArgumentError, match=r"The file of a picture must end in \.png or \.svg, got"):
        plots.save_plot(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "picture.svg"
    path.write_text("before")
    figure = Figure()
    figure.savefig = lambda file, **_: (file.write(b"half"), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plots.save_plot(figure, path)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["before"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="must be writable, got No such file"):
        plots.save_plot(Figure(), tmp_path / "none" / "picture.png")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    store = store_of(tmp_path, {"h": randn(4, 2)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "activation_extractor.plots._notebook_figure", raising=False)
    with pytest.raises(MissingExtraError, match=r"A plot needs matplotlib, which is not installed\."):
        plots.projection(store["h"])
