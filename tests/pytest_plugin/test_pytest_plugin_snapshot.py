"""The fixture `activation_snapshot`: golden files are written, compared with, and told of when no test needs them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from plugin import write_tests
from safetensors import safe_open
from safetensors.torch import load_file

from activation_extractor import capture, open_store

CHECK = """
    def test_blocks(capture_activations, activation_snapshot):
        acts = capture_activations(model, "h.*", reduce={reduce!r})
        run()
        activation_snapshot.check(acts)
"""
GOLDEN = "__activations__/test_models/test_blocks.safetensors"


def write_check(pytester, change: str = "", reduce: str = "full") -> None:
    write_tests(pytester, change + CHECK.format(reduce=reduce))


def update(pytester, *arguments: str):
    return pytester.runpytest_inprocess("--update-activations", *arguments)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_a_failure_that_says_so(pytester):
    write_check(pytester)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       activation_snapshot.check(acts)",
            f"E       AssertionError: There is no golden file '{GOLDEN}' to compare with. "
            "Write it with pytest --update-activations, and commit it.",
        ]
    )
    assert not (pytester.path / "__activations__").exists()


def test_it_is_written_when_asked_and_then_compared_with(pytester):
    write_check(pytester)
    result = update(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*activation files written*", GOLDEN])
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*activation files*")


def test_the_file_is_small_holds_the_values_in_order_and_no_pickle(pytester):
    write_check(pytester)
    update(pytester)
    path = pytester.path / GOLDEN
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = load_file(path)
    assert set(tensors) == set(json.loads(data[8 : 8 + length])) - {"__metadata__"} == {"h.0:full", "h.1:full"}
    assert all(one.shape == (2, 5, 8) and one.dtype == torch.float32 for one in tensors.values())
    assert len(data) == 8 + length + 2 * 2 * 5 * 8 * 4
    assert length < 400
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"order": '["h.0:full", "h.1:full"]'}


def test_the_same_run_writes_the_same_bytes(pytester):
    write_check(pytester)
    update(pytester)
    before = (pytester.path / GOLDEN).read_bytes()
    (pytester.path / GOLDEN).unlink()
    pytester.runpytest_subprocess("--update-activations").assert_outcomes(passed=1)
    assert (pytester.path / GOLDEN).read_bytes() == before


def test_it_is_rewritten_when_asked(pytester):
    write_check(pytester)
    update(pytester)
    before = load_file(pytester.path / GOLDEN)
    write_check(pytester, "\n    model.h[1].norm.eps = 0.1\n")
    pytester.runpytest_inprocess().assert_outcomes(failed=1)
    update(pytester).assert_outcomes(passed=1)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    after = load_file(pytester.path / GOLDEN)
    assert torch.equal(before["h.0:full"], after["h.0:full"])
    assert not torch.equal(before["h.1:full"], after["h.1:full"])


def test_values_that_are_too_large_for_a_repository_are_refused_unless_that_is_meant(pytester):
    body = """
        def test_large(activation_snapshot):
            activation_snapshot.check({"x": torch.zeros(1 << 18), "y": torch.zeros(1)}, max_bytes=MOST)
    """
    write_tests(pytester, body.replace(", max_bytes=MOST", ""))
    result = update(pytester)
    result.assert_outcomes(failed=1)
    text = "The bytes in a golden file must be at most max_bytes=1048576, got 1048580. Capture fewer layers, or with "
    result.stdout.fnmatch_lines([f"E*ArgumentError: {text}reduce='mean', or a smaller batch; or pass max_bytes=."])
    assert not (pytester.path / "__activations__").exists()
    write_tests(pytester, body.replace("MOST", "1 << 21"))
    update(pytester).assert_outcomes(passed=1)


# -- comparing --------------------------------------------------------------------------------------------------------


def test_a_difference_is_a_table_with_the_first_layer_marked_in_the_models_order(pytester):
    write_check(pytester, reduce="mean")
    update(pytester)
    write_check(pytester, "\n    model.h[1].norm.eps = 0.1\n", reduce="mean")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [
            r">       activation_snapshot.check\(acts\)$",
            rf"E       AssertionError: The activations differ from '{GOLDEN}', first in layer 'h.1'. "
            r"If that is intended, run pytest with --update-activations.$",
            r"E       Comparison of 2 layers: 1 differs, first 'h.1' \(values\)$",
            r"E            layer  max abs  max rel  cosine    dtype    shape   differs in$",
            r"E            h.0    0        0        1.000000  float32  \(2, 8\)$",
            r"E         >  h.1    0\.0\d+ +\d\S+ +0.9\d{5}  float32  \(2, 8\)  values$",
        ],
        consecutive=True,
    )
    result.stdout.no_fnmatch_line("*_snapshot.py*")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("run(); del acts['h.1']", "missing on the right"),
        ("run(); acts['more'] = acts['h.0']", "missing on the left"),
        ("run(); acts['h.1'] = acts['h.1'][:1]", "shape"),
        ("run(); acts['h.1'] = acts['h.1'].double()", "dtype"),
        ("run(); acts['h.1'][0, 0, 0] = torch.nan", "1 NaN"),
        ("run(); acts['h.1'][0, 0, :2] = torch.inf", "2 infinite"),
    ],
)
def test_layers_shapes_dtypes_and_what_is_not_finite_are_compared(pytester, change, difference):
    body = """
        def test_blocks(capture_activations, activation_snapshot):
            recorded = capture_activations(model, "h.*")
            run()
            acts = dict(recorded)
            CHANGE
            activation_snapshot.check(acts)
    """
    write_tests(pytester, body.replace("CHANGE", "pass"))
    update(pytester).assert_outcomes(passed=1)
    write_tests(pytester, body.replace("CHANGE", change))
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E  *{difference}"])


@pytest.mark.parametrize(
    ("tolerance", "outcome"),
    [
        ("", "failed"),
        ("rtol=1e-2", "passed"),
        ("rtol={'h.0': 1e-2}", "failed"),
        ("rtol={'h.1': 1e-2}", "passed"),
        ("atol={'h.*': 1e-2}", "passed"),
        ("atol=1e-4", "failed"),
    ],
)
def test_tolerances_are_for_all_layers_or_for_some(pytester, tolerance, outcome):
    body = """
        def test_blocks(activation_snapshot):
            activation_snapshot.check({"h.0": torch.ones(4), "h.1": torch.ones(4) + MORE}, TOLERANCE)
    """.replace("TOLERANCE", tolerance)
    write_tests(pytester, body.replace("MORE", "0"))
    update(pytester)
    write_tests(pytester, body.replace("MORE", "1e-3"))
    pytester.runpytest_inprocess().assert_outcomes(**{outcome: 1})


def test_a_file_that_cannot_be_read_is_an_error_that_says_so(pytester):
    write_check(pytester)
    update(pytester)
    path = pytester.path / GOLDEN
    path.write_bytes(path.read_bytes()[:-1])
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E*StoreError: *{GOLDEN}' must be a file of activations that can be read, got *"])


# -- names ------------------------------------------------------------------------------------------------------------


def test_each_test_each_parameter_and_each_named_check_has_a_file_of_its_own(pytester):
    body = """
        @pytest.mark.parametrize("size", [1, 2])
        @pytest.mark.parametrize("name", ["a/b", "ü:*", "x" * 300, "x" * 301], ids=str)
        def test_sizes(activation_snapshot, size, name):
            activation_snapshot.check({"x": torch.full((size,), float(len(name)))})

        class TestOne:
            class TestTwo:
                def test_named(self, activation_snapshot):
                    activation_snapshot.check({"x": torch.ones(1)})
                    activation_snapshot.check({"x": torch.ones(2)}, name="two")
                    activation_snapshot.check({"x": torch.ones(3)}, name="../../three")

        class OldTest(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def snapshot(self, activation_snapshot):
                self.snapshot = activation_snapshot

            def test_old(self):
                self.snapshot.check({"x": torch.ones(4)})
    """
    write_tests(pytester, body)
    update(pytester).assert_outcomes(passed=10)
    files = {path.relative_to(pytester.path) for path in pytester.path.rglob("*.safetensors")}
    assert len(files) == 12
    assert {path.parent for path in files} == {Path("__activations__/test_models")}
    assert {path.stem for path in files} >= {
        "test_sizes[a%2Fb-1]",
        "TestOne.TestTwo.test_named",
        "TestOne.TestTwo.test_named@two",
        "TestOne.TestTwo.test_named@..%2F..%2Fthree",
        "OldTest.test_old",
    }
    assert max(len(path.name) for path in files) < 255
    pytester.runpytest_inprocess().assert_outcomes(passed=10)


def test_two_checks_of_one_name_are_refused(pytester):
    body = """
        def test_twice(activation_snapshot):
            activation_snapshot.check({"x": torch.ones(1)})
            activation_snapshot.check({"x": torch.ones(1)})
    """
    write_tests(pytester, body)
    result = update(pytester)
    result.assert_outcomes(failed=1)
    text = "name must be another one for each check in a test, got None. Pass name=."
    result.stdout.fnmatch_lines([f"E*ArgumentError: {text}"])


def test_stores_and_other_things_are_refused(activation_snapshot, tmp_path, stack, tokens):
    with capture(stack, "h.0", sink=tmp_path / "out"):
        stack(tokens)
    with pytest.raises(TypeError, match="acts must be activations, got a Store .*Compare stores with"):
        activation_snapshot.check(open_store(tmp_path / "out"))
    with pytest.raises(TypeError, match="acts must be Activations, a Store, or a mapping"):
        activation_snapshot.check(torch.ones(1))
