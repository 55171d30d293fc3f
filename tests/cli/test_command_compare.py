"""``compare``: two runs as a table and as JSON, and an exit code that tells whether they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import app, mistake, run
from torch import Tensor, nn
from typer.testing import CliRunner

from activation_extractor import SafetensorsSink, capture
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

NAMES = ("embed", "h.0", "h.1", "norm")
EVERY_NAME = (*NAMES, "")  # the model itself has an empty name
FIELDS = [
    *("layer", "reducer", "other", "dtypes", "shapes", "max_abs", "max_rel", "cosine"),
    *("nan_count", "inf_count", "rtol", "atol", "differences"),
]


def printed(*arguments: object, code: int = 0) -> str:
    return run("compare", *arguments, code=code).stdout


def told(*arguments: object, code: int = 0) -> dict:
    text = printed(*arguments, "--json", code=code)
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each row of a printed table that has marks, the mark first."""
    lines = text.splitlines()[2:]
    cells = [[line[2:3].strip(), *line[3:].split()] for line in lines]
    return {one[1]: [one[0], *one[2:]] for one in cells}


def values(names=NAMES, **changes: Tensor) -> dict[tuple[str, str], Tensor]:
    """A value for each name, the same each time; `changes` are added to those of the names, with ``_`` for dots."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(4, 3, generator=generator) for name in names}
    return {(name, "mean"): one + changes.get(name.replace(".", "_"), 0) for name, one in made.items()}


def make_store(out: Path, columns: Mapping, ids=("a", "b", "c", "d")) -> Path:
    sink = SafetensorsSink(out)
    sink.write(Step(0, 4, columns, list(ids) or None, {}))
    sink.close()
    return out


@pytest.fixture
def good(tmp_path) -> Path:
    return make_store(tmp_path / "good", values())


@pytest.fixture
def bad(tmp_path) -> Path:
    return make_store(tmp_path / "bad", values(h_1=torch.tensor(0.5), norm=torch.tensor(0.25)))


class Small(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.activation, self.last = nn.Linear(3, 3), activation, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def save(path: Path, activation: nn.Module) -> Path:
    """A run of a small model, as a store or a file."""
    model, options = Small(activation), {} if path.suffix else {"sink": path}
    with torch.no_grad(), capture(model, ["**", ""], **options) as acts:
        model(torch.linspace(-1, 1, 12).view(4, 3))
    if path.suffix:
        acts.save(path)
    return path


def test_stores_that_are_the_same_are_a_table_and_exit_code_0(tmp_path, good):
    lines = printed(good, make_store(tmp_path / "again", values())).splitlines()
    assert lines[0] == "Comparison of 4 layers: no difference"
    assert " ".join(lines[1].split()) == "layer max abs max rel cosine dtype shape"
    assert [line.split() for line in lines[2:]] == [
        [name, "0", "0", "1.000000", "float32", "(4,", "3)"] for name in NAMES
    ]


def test_a_broken_layer_is_told_and_marked_and_the_exit_code_is_1(good, bad):
    text = printed(good, bad, code=1)
    assert text.splitlines()[0] == "Comparison of 4 layers: 2 differ, first 'h.1' (values)"
    rows = rows_of(text)
    assert {name: row[0] for name, row in rows.items()} == {"embed": "", "h.0": "", "h.1": ">", "norm": "x"}
    assert (rows["h.1"][1], rows["h.1"][-1]) == ("0.5", "values")
    assert rows["h.0"][1] == "0"


def test_the_left_side_is_the_reference(tmp_path):
    left = make_store(tmp_path / "left", {("a", "mean"): torch.full((4, 3), 2.0)})
    right = make_store(tmp_path / "right", {("a", "mean"): torch.full((4, 3), 3.0)})
    assert told(left, right, code=1)["layers"][0]["max_rel"] == 0.5
    assert told(right, left, code=1)["layers"][0]["max_rel"] == pytest.approx(1 / 3)


def test_a_long_table_is_not_cut(tmp_path):
    names = [f"blocks.{index}" for index in range(100)]
    out = make_store(tmp_path / "out", values(names))
    assert [line.split()[0] for line in printed(out, out).splitlines()[2:]] == names


@pytest.mark.parametrize("left", ["run", "run.safetensors", "run.npz"])
@pytest.mark.parametrize("right", ["other", "other.safetensors", "other.npz"])
def test_stores_and_files_are_compared_with_each_other(tmp_path, left, right):
    first = save(tmp_path / left, nn.GELU())
    found = told(first, save(tmp_path / f"same_{right}", nn.GELU()))
    assert [row["layer"] for row in found["layers"]] == ["first", "activation", "last", ""]
    found = told(first, save(tmp_path / right, nn.SiLU()), code=1)
    assert found["first_difference"] == "activation"
    assert [row["differences"] for row in found["layers"]] == [[], ["values"], ["values"], ["values"]]


def test_a_folder_may_have_a_suffix(tmp_path, good):
    assert told(good, make_store(tmp_path / "out.npz", values()))["ok"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere", "nowhere' must be a store, got no such folder"),
        ("nowhere.npz", "must be a file of activations that can be read, got No such file or directory"),
        ("nowhere.safetensors", "must be a file of activations that can be read, got No such file"),
        ("empty", "empty' must be a store, got a folder without manifest.json"),
        ("notes", "path must end in .safetensors or .npz, or be a store, got "),
        ("notes.txt", "path must end in .safetensors or .npz, or be a store, got "),
        ("junk.npz", "must be a file of activations that can be read"),
        ("junk.safetensors", "must be a file of activations that can be read"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_neither_a_store_nor_such_a_file_is_an_error(tmp_path, good, name, text, side):
    (tmp_path / "empty").mkdir()
    for file in ("notes", "notes.txt", "junk.npz", "junk.safetensors"):
        (tmp_path / file).write_text("something else")
    paths = [good, good]
    paths[side] = tmp_path / name
    line = mistake("compare", *paths)
    assert text in line
    assert str(tmp_path / name) in line


def test_rows_are_matched_by_their_ids(tmp_path, good):
    turned = {key: one.flip(0) for key, one in values().items()}
    assert told(good, make_store(tmp_path / "turned", turned, "dcba"))["ok"]
    assert not told(good, make_store(tmp_path / "unnamed", turned, ""), code=1)["ok"]


def test_stores_of_other_rows_are_an_error(tmp_path, good):
    line = mistake("compare", good, make_store(tmp_path / "other", values(), "abcx"))
    assert "have the same row ids on both sides, got 1 id on the left alone, such as 'd'" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--match", "embed=wte", "--match", "h.*=layers.*", "--match", "norm=ln_f"],
        ["--match", "h.0=layers.0", "--match", "h.1=layers.1", "--match", "norm=ln_f", "--match", "embed=wte"],
        ["--by-order"],
    ],
)
def test_layers_of_other_names_belong_together_when_that_is_said(tmp_path, good, options):
    others = dict(zip(NAMES, ("wte", "layers.0", "layers.1", "ln_f"), strict=True))
    renamed = {(others[name], "mean"): one for (name, _), one in values(h_1=torch.tensor(1.0)).items()}
    right = make_store(tmp_path / "right", renamed)
    assert "say with --match which belong together" in mistake("compare", good, right)
    found = told(good, right, *options, code=1)
    assert {row["layer"]: row["other"] for row in found["layers"]} == others
    assert [row["layer"] for row in found["layers"] if row["differences"]] == ["h.1"]
    assert "h.1 / layers.1" in printed(good, right, *options, code=1)


def test_what_no_match_names_is_left_out_and_the_model_itself_is_an_empty_name(tmp_path):
    left = make_store(tmp_path / "left", values(["a", ""]))
    right = make_store(tmp_path / "right", {("model", "mean"): values(["a", ""])["", "mean"]})
    (row,) = told(left, right, "--match", "=model")["layers"]
    assert (row["layer"], row["other"]) == ("", "model")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--match", "h.0"], "--match must be LEFT=RIGHT, got 'h.0'."),
        (["--match", "h.0=h.1=h.2"], "--match must be LEFT=RIGHT, got 'h.0=h.1=h.2'."),
        (
            ["--match", "h.0=h.0", "--match", "h.0=h.1"],
            "--match must name each left side once, got 'h.0=h.1'. There is 'h.0=h.0' too.",
        ),
        (
            ["--match", "h.0=h.1", "--by-order"],
            "--by-order must go without --match, got '--match h.0=h.1'. Leave one of them out.",
        ),
        (["--rtol", "much"], "--rtol must be a number or PATTERN=NUMBER, got 'much'."),
        (["--rtol", "h.*=much"], "--rtol must be a number or PATTERN=NUMBER, got 'h.*=much'."),
        (["--atol", "h.*="], "--atol must be a number or PATTERN=NUMBER, got 'h.*='."),
        (["--rtol", "1", "--rtol", "1"], "--rtol must be given once for each pattern, and once for the rest, got '1'."),
        (
            ["--atol", "h.*=1", "--atol", "0", "--atol", "h.*=2"],
            "--atol must be given once for each pattern, and once for the rest, got 'h.*=2'.",
        ),
    ],
)
def test_a_mistyped_option_is_an_error_before_anything_is_opened(options, text):
    assert mistake("compare", "nowhere", "nowhere", *options).startswith(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--rtol", "-1"], "--rtol must be finite and not negative, got -1.0."),
        (["--atol", "h.*=nan"], "--atol must be finite and not negative, got nan."),
        (["--rtol", "1", "--rtol", "blocks.*=1"], "a pattern in --rtol must fit a layer of left, got 'blocks.*'."),
        (["--match", "blocks.*=h.*"], "--match must name layers of left, got 'blocks.*'."),
        (["--match", "h.*=norm"], "What is compared must be matched one to one, got 'h.0' and 'h.1' for 'norm'."),
    ],
)
def test_what_does_not_fit_the_layers_is_an_error(good, options, text):
    assert mistake("compare", good, good, *options).startswith(text)


def test_the_tolerance_says_what_differs(tmp_path):
    left = make_store(tmp_path / "left", {("a", "mean"): torch.full((4, 3), 2.0)})
    right = make_store(tmp_path / "right", {("a", "mean"): torch.full((4, 3), 3.0)})
    for options, code in (
        (["--rtol", "0.51", "--atol", "0"], 0),
        (["--rtol", "0.49", "--atol", "0"], 1),
        (["--rtol", "0", "--atol", "1.01"], 0),
        (["--rtol", "0", "--atol", "0.99"], 1),
    ):
        run("compare", left, right, *options, code=code)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["0.5"], [0.5, 0.5, 0.5, 0.5, 0.5]),
        (["h.*=0.25", "0.5"], [0.5, 0.25, 0.25, 0.5, 0.5]),
        (["0.5", "h.*=0.25"], [0.5, 0.25, 0.25, 0.5, 0.5]),
        (["h.1=0", "0.5", "h.*=0.25"], [0.5, 0.25, 0, 0.5, 0.5]),
        (["h.*=0.25", "h.1=0", "0.5"], [0.5, 0.25, 0.25, 0.5, 0.5]),
        (["=0.25", "0.5"], [0.5, 0.5, 0.5, 0.5, 0.25]),
        (["0.5", "**.*=0.25"], [0.25, 0.25, 0.25, 0.25, 0.25]),
        (["h.*=0.25", "0"], [0, 0.25, 0.25, 0, 0]),
    ],
)
def test_patterns_count_in_their_order_and_a_number_is_for_the_rest(tmp_path, name, given, expected):
    out = make_store(tmp_path / "out", values(EVERY_NAME))
    options = [part for one in given for part in (f"--{name}", one)]
    found = told(out, out, *options)
    assert {row["layer"]: row[name] for row in found["layers"]} == dict(zip(EVERY_NAME, expected, strict=True))


def test_without_a_number_the_rest_has_the_default(tmp_path, good):
    found = {row["layer"]: row for row in told(good, good, "--rtol", "h.*=0.25")["layers"]}
    assert (found["h.0"]["rtol"], found["norm"]["rtol"]) == (0.25, 1e-4)
    scale = values()["norm", "mean"].double().square().mean().sqrt()
    assert found["norm"]["atol"] == pytest.approx(1e-4 * float(scale))


def test_whether_another_dtype_is_a_difference_can_be_said(tmp_path, good):
    halves = {key: one.bfloat16() for key, one in values().items()}
    one = make_store(tmp_path / "one", values() | {("h.0", "mean"): halves["h.0", "mean"]})
    every = make_store(tmp_path / "every", halves)
    for right, option, code in (
        (one, [], 1),
        (one, ["--no-check-dtype"], 0),
        (one, ["--check-dtype"], 1),
        (every, [], 0),
        (every, ["--no-check-dtype"], 0),
        (every, ["--check-dtype"], 1),
    ):
        run("compare", good, right, *option, code=code)
    found = told(good, one, code=1)
    assert found["first_difference"] == "h.0"
    assert found["layers"][1]["dtypes"] == ["float32", "bfloat16"]
    assert found["layers"][1]["differences"] == ["dtype"]


def test_json_is_one_object_with_all_of_it(tmp_path):
    ragged = Ragged(torch.ones(9), torch.tensor([1, 3, 1, 4]))
    numbers = torch.full((4, 2), 2.0)
    others = torch.tensor([[3.0, math.nan], [2.0, math.inf], [2.0, 2.0], [2.0, 2.0]])
    left = make_store(tmp_path / "left", {("a", "full"): ragged, ("b", "mean"): numbers, ("c", "mean"): numbers})
    right = make_store(tmp_path / "right", {("a", "full"): ragged, ("b", "mean"): others, ("d", "last"): numbers})
    options = ["--rtol", "0.25", "--atol", "0.125", "--match", "a=a", "--match", "b=b", "--match", "c=d"]
    found = told(left, right, *options, code=1)
    layers = found.pop("layers")
    assert found == {"left": str(left), "right": str(right), "ok": False, "first_difference": "b"}
    assert [list(layer) for layer in layers] == [FIELDS] * 4
    same, broken, left_only, right_only = layers
    assert same == {
        "layer": "a",
        "reducer": "full",
        "other": "a",
        "dtypes": ["float32", "float32"],
        "shapes": [[4, None], [4, None]],
        "max_abs": 0,
        "max_rel": 0,
        "cosine": 1,
        "nan_count": 0,
        "inf_count": 0,
        "rtol": 0.25,
        "atol": 0.125,
        "differences": [],
    }
    assert broken["differences"] == ["NaN", "infinity", "values"]
    assert (broken["max_abs"], broken["max_rel"], broken["nan_count"], broken["inf_count"]) == (1, 0.5, 1, 1)
    nothing = dict.fromkeys(["max_abs", "max_rel", "cosine", "rtol", "atol"])
    absent = {"dtypes": ["float32", None], "shapes": [[4, 2], None], "other": None, "reducer": "mean"}
    assert left_only == left_only | nothing | absent | {"layer": "c", "differences": ["missing on the right"]}
    absent = {"dtypes": [None, "float32"], "shapes": [None, [4, 2]], "other": "d", "reducer": "last"}
    assert right_only == right_only | nothing | absent | {"layer": "d", "differences": ["missing on the left"]}


def test_json_of_what_is_the_same(good):
    found = told(good, good)
    assert (found["ok"], found["first_difference"]) == (True, None)
    assert [row["layer"] for row in found["layers"]] == list(NAMES)


def test_json_has_null_where_a_number_is_infinite(tmp_path):
    huge = torch.full((4, 1), 1e308, dtype=torch.float64)
    left = make_store(tmp_path / "left", {("a", "mean"): huge})
    right = make_store(tmp_path / "right", {("a", "mean"): -huge})
    assert told(left, right, code=1)["layers"][0]["max_abs"] is None


def test_each_reducer_has_a_row(tmp_path):
    columns = {("a", "mean"): torch.ones(4, 2), ("a", "last"): torch.ones(4, 2)}
    left = make_store(tmp_path / "left", columns)
    right = make_store(tmp_path / "right", columns | {("a", "last"): torch.zeros(4, 2)})
    text = printed(left, right, code=1)
    assert text.splitlines()[0] == "Comparison of 2 values: 1 differs, first ('a', 'last') (values)"
    found = told(left, right, code=1)["layers"]
    assert {row["reducer"]: row["differences"] for row in found} == {"mean": [], "last": ["values"]}


def test_names_cannot_steer_a_terminal_or_add_a_line(tmp_path):
    name = "a\x1b[2J\nb.\x9bc\u202e[bold]:smile:"
    left = make_store(tmp_path / "left", values([name, "c"]))
    right = make_store(tmp_path / "right", values([name, "c"], c=torch.tensor(1.0)))
    broken = make_store(tmp_path / "broken", {("c", "mean"): values([name, "c"])["c", "mean"]})
    shown = r"a\x1b[2J\nb.\x9bc\u202e[bold]:smile:"
    for text in (printed(left, right, code=1), printed(left, broken, code=1), printed(broken, left, code=1)):
        assert len(text.splitlines()) == 4
        assert shown in text
        assert text.replace("\n", "").isprintable()


def test_help_tells_the_exit_codes_and_keeps_the_examples_as_they_are():
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["compare", "--help"]).stdout
    words = " ".join(text.split())
    assert "LEFT" in words.split("Compare two runs")[0]
    assert "The exit code is 0 when nothing differs, 1 when something does, and 2 on a mistake." in words
    for option in (
        "--match LEFT=RIGHT",
        "--by-order",
        "--rtol",
        "--atol",
        "--check-dtype / --no-check-dtype",
        "--json",
    ):
        assert f"\n  {option}" in text
    assert "\n      activation-extractor compare before after --rtol 1e-3 --rtol 'h.*=1e-2'\n" in text
