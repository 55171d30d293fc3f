"""The fixture `capture_activations`: it records at once, and ends with the test however the test ends."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import count_hooks
from plugin import write_tests

from activation_extractor import Activations, capture, open_store
from activation_extractor.errors import LayerNotRunError
from activation_extractor.pytest_plugin import CaptureFixture


def test_it_records_at_once(capture_activations, stack, tokens):
    acts = capture_activations(stack, "h.*", reduce="mean")
    assert isinstance(acts, Activations)
    with capture(stack, "h.*", reduce="mean") as others:
        stack(tokens)
    assert list(acts) == list(others)
    assert all(torch.equal(acts[name], others[name]) for name in acts)
    assert count_hooks(stack) > 0


def test_several_captures_of_one_test_are_independent(capture_activations, stack, cnn, tokens):
    first, second = capture_activations(stack, "h.0"), capture_activations(stack, ["h.0", "h.1"], reduce="last")
    third = capture_activations(cnn, "conv")
    stack(tokens)
    cnn(torch.ones(1, 3, 8, 8))
    assert [list(acts) for acts in (first, second, third)] == [["h.0"], ["h.0", "h.1"], ["conv"]]


def test_mistakes_are_those_of_capture_and_leave_no_hooks(capture_activations, stack):
    with pytest.raises(LookupError, match="No layer matches 'h.9'"):
        capture_activations(stack, "h.9")
    with pytest.raises(TypeError):
        capture_activations(stack)
    assert count_hooks(stack) == 0


def test_what_it_began_may_be_ended_before_the_test(capture_activations, stack, tokens, tmp_path):
    capture_activations(stack, "h.*", reduce="mean", sink=tmp_path / "out")
    stack(tokens)
    capture_activations.close()
    assert count_hooks(stack) == 0
    assert open_store(tmp_path / "out").rows == len(tokens)
    again = capture_activations(stack, "h.0")
    stack(tokens)
    assert list(again) == ["h.0"]


def test_ending_it_tells_of_layers_that_never_ran(capture_activations, stack):
    capture_activations(stack, "h.*")
    with pytest.raises(LayerNotRunError):
        capture_activations.close()
    assert count_hooks(stack) == 0


def test_it_has_the_parameters_of_capture():
    taken = inspect.signature(CaptureFixture.__call__).parameters
    assert [one.kind for one in taken.values()][1:] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


BODY = """
    def test_passes(capture_activations):
        acts = capture_activations(model, "h.*")
        run()
        assert list(acts) == ["h.0", "h.1"]

    def test_has_no_hooks_left():
        assert not any(module._forward_hooks for module in model.modules())

    def test_fails(capture_activations):
        capture_activations(model, "h.*")
        raise KeyError("the test's own")

    def test_has_no_hooks_left_either():
        assert not any(module._forward_hooks for module in model.modules())

    def test_is_skipped(capture_activations):
        capture_activations(model, "h.*")
        pytest.skip("in the middle")

    @pytest.mark.xfail(strict=True, raises=KeyError)
    def test_is_expected_to_fail(capture_activations):
        capture_activations(model, "h.*")
        raise KeyError

    @pytest.fixture
    def broken(capture_activations):
        capture_activations(model, "h.*")
        raise OSError("the fixture's own")

    def test_has_a_broken_fixture(broken):
        pass

    def test_still_has_no_hooks_left():
        assert not any(module._forward_hooks for module in model.modules())

    def test_never_runs_a_layer(capture_activations):
        capture_activations(model, "h.*")

    def test_has_no_hooks_left_at_the_end():
        assert not any(module._forward_hooks for module in model.modules())
"""


def test_hooks_are_gone_however_a_test_ends_and_only_a_test_that_passed_is_asked_what_ran(pytester):
    write_tests(pytester, BODY)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=6, failed=1, skipped=1, xfailed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_has_a_broken_fixture*",
            "E       OSError: the fixture's own",
            "*ERROR at teardown of test_never_runs_a_layer*",
            "E*LayerNotRunError: Requested layers did not run in the step: 'h.0', 'h.1' (*",
        ]
    )
    result.stdout.no_fnmatch_line("*_recording.py*")


def test_it_works_in_classes_with_parameters_in_fixtures_and_in_unittest(pytester):
    body = """
        class TestModel:
            @pytest.mark.parametrize("layer", ["h.0", "h.1"])
            def test_layer(self, capture_activations, layer):
                acts = capture_activations(model, layer)
                run()
                assert list(acts) == [layer]

        @pytest.fixture
        def acts(capture_activations):
            return capture_activations(model, "h.*")

        def test_fixture(acts):
            run()
            assert list(acts) == ["h.0", "h.1"]

        class OldTest(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def capture(self, capture_activations):
                self.capture_activations = capture_activations

            def test_passes(self):
                acts = self.capture_activations(model, "h.*")
                run()
                assert list(acts) == ["h.0", "h.1"]

            def test_fails(self):
                self.capture_activations(model, "h.*")
                self.assertTrue(False)

            def test_hooks(self):
                assert not any(module._forward_hooks for module in model.modules())
    """
    write_tests(pytester, body)
    pytester.runpytest_inprocess().assert_outcomes(passed=5, failed=1)


def test_it_works_in_async_tests(pytester):
    pytest.importorskip("anyio", reason="anyio, which brings async tests, is not installed")
    body = """
        import asyncio

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        def before(capture_activations):
            return capture_activations(model, "h.*")

        @pytest.mark.anyio
        async def test_async(capture_activations):
            acts = capture_activations(model, "h.*")
            await asyncio.sleep(0)
            run()
            assert list(acts) == ["h.0", "h.1"]

        @pytest.mark.anyio
        async def test_async_fixture(before):
            await asyncio.to_thread(run)
            assert list(before) == ["h.0", "h.1"]

        @pytest.mark.anyio
        async def test_async_fails(capture_activations):
            capture_activations(model, "h.*")
            raise KeyError

        def test_hooks():
            assert not any(module._forward_hooks for module in model.modules())
    """
    write_tests(pytester, body)
    pytester.runpytest_inprocess().assert_outcomes(passed=3, failed=1)
