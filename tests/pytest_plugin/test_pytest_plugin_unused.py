"""Golden files that no test needs any more are told of, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin import write_tests

BODY = """
    def test_one(activation_snapshot):
        activation_snapshot.check({"x": torch.ones(1)})

    def test_two(activation_snapshot):
        activation_snapshot.check({"x": torch.ones(2)})
        activation_snapshot.check({"x": torch.ones(3)}, name="more")

    def test_three():
        pass
"""
FOLDER = Path("__activations__/test_models")
FILES = [f"{FOLDER}/{name}.safetensors" for name in ("test_one", "test_two", "test_two@more")]
TITLE = "*activation files unused: remove them*"


@pytest.fixture
def written(pytester):
    write_tests(pytester, BODY)
    pytester.runpytest_inprocess("--update-activations").assert_outcomes(passed=3)
    return pytester


def unused(pytester, *arguments: str) -> list[str]:
    """What a run tells of, in its order."""
    lines = pytester.runpytest_inprocess(*arguments).stdout.lines
    starts = [index for index, line in enumerate(lines) if "activation files unused" in line]
    if not starts:
        return []
    rest = lines[starts[0] + 1 :]
    return [line for line in rest[: next(index for index, line in enumerate(rest) if line.startswith("="))] if line]


def stray(pytester, name: str) -> str:
    """A golden file that no test wrote."""
    path = FOLDER / f"{name}.safetensors"
    (pytester.path / path).parent.mkdir(parents=True, exist_ok=True)
    (pytester.path / path).write_bytes(b"")
    return str(path)


def test_what_all_tests_use_is_not_told_of(written):
    assert unused(written) == []
    assert unused(written, "--update-activations") == []


def test_a_test_that_is_gone_or_has_another_name(written):
    write_tests(written, BODY.replace("test_two", "test_other"))
    assert unused(written) == FILES[1:]


def test_a_check_that_is_gone(written):
    write_tests(written, BODY.replace(', name="more"', ', name="else"'))
    update = written.runpytest_inprocess("--update-activations")
    update.stdout.fnmatch_lines([TITLE, FILES[2]])
    assert unused(written) == [FILES[2]]


def test_a_test_that_no_longer_checks(written):
    assert unused(written) == []
    name = stray(written, "test_three")
    assert unused(written) == [name]
    assert unused(written, "test_models.py::test_three") == [name]


def test_a_test_file_that_is_gone(written):
    (written.path / "__activations__/test_gone").mkdir()
    gone = written.path / "__activations__/test_gone/test_a.safetensors"
    gone.write_bytes(b"")
    assert unused(written) == ["__activations__/test_gone/test_a.safetensors"]


def test_other_files_are_not_its_concern(written):
    for name in ("notes.txt", ".test_x.safetensors", "sub/test_y.safetensors"):
        path = written.path / FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert unused(written) == []


def test_a_file_of_a_test_that_did_not_run_may_be_in_use(written):
    assert unused(written, "-k", "one") == []
    assert unused(written, "test_models.py::test_one") == []
    assert unused(written, "--deselect", "test_models.py::test_two") == []
    assert unused(written, "--collect-only") == []


def test_a_file_without_a_test_is_told_of_also_where_tests_are_left_out(written):
    name = stray(written, "test_gone")
    assert unused(written, "-k", "one") == [name]
    assert unused(written, "test_models.py::test_one") == []
    assert unused(written, "test_models.py") == [name]


def test_a_file_of_a_test_that_failed_or_was_skipped_may_be_in_use(written):
    for line in ("assert False", "pytest.skip()", "pytest.xfail()"):
        write_tests(written, BODY.replace('activation_snapshot.check({"x": torch.ones(2)})', line))
        assert unused(written) == []
    write_tests(written, BODY.replace("def test_two", "@pytest.mark.skip\n    def test_two"))
    assert unused(written) == []


def test_parameters_have_their_own(pytester):
    body = """
        @pytest.mark.parametrize("size", SIZES)
        def test_sizes(activation_snapshot, size):
            activation_snapshot.check({"x": torch.ones(size)})
    """
    write_tests(pytester, body.replace("SIZES", "[1, 2, 3]"))
    pytester.runpytest_inprocess("--update-activations")
    write_tests(pytester, body.replace("SIZES", "[1, 3]"))
    assert unused(pytester) == [f"{FOLDER}/test_sizes[2].safetensors"]


def test_workers_of_xdist_tell_what_they_used_wrote_and_saw(pytester):
    write_tests(pytester, BODY)
    result = pytester.runpytest_subprocess("-n", "2", "--update-activations")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*activation files written*", *FILES])
    name = stray(pytester, "test_gone")
    write_tests(pytester, BODY.replace("ones(1)", "zeros(1)"))
    result = pytester.runpytest_subprocess("-n", "2")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*>  x *values", TITLE, name, "*"])
    assert not [line for line in result.stdout.lines if line in FILES]
