"""`forbid_hook_leaks`: a test that leaves hooks on a model fails, and is told where they are."""

from __future__ import annotations

import pytest
from plugin import write_tests
from torch import nn
from torch.nn.modules import module as torch_module

REGISTER = nn.Module.register_forward_hook  # before any watch
LEAK = """
    def record(*values):
        pass

    MARK
    def test_leaves_a_hook():
        model.h[1].mlp.register_forward_hook(record)
"""
TEXT = (
    "A test must leave no hooks behind, got 1: a forward hook on layer 'h.1.mlp' (Linear) of BlockStack: 'record' at "
    "test_models.py:{line}. Remove them with the handle that register_... returned, or use capture_activations."
)
ON = "[pytest]\nforbid_hook_leaks = true\n"


def run(pytester, body: str, ini: str = ""):
    write_tests(pytester, body)
    pytester.makeini(ini or "[pytest]\n")
    return pytester.runpytest_inprocess()


def test_hooks_may_be_left_unless_that_is_forbidden(pytester):
    run(pytester, LEAK.replace("MARK", "")).assert_outcomes(passed=1)


@pytest.mark.parametrize("mark", ["", "@pytest.mark.forbid_hook_leaks", "@pytest.mark.forbid_hook_leaks(True)"])
def test_a_hook_that_is_left_is_an_error_with_its_layer_and_its_source(pytester, mark):
    result = run(pytester, LEAK.replace("MARK", mark), ON if not mark else "")
    result.assert_outcomes(passed=1, errors=1)
    line = 1 + (pytester.path / "test_models.py").read_text().splitlines().index("def record(*values):")
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_leaves_a_hook*", TEXT.format(line=line)])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_one_test_may_be_let(pytester):
    run(pytester, LEAK.replace("MARK", "@pytest.mark.forbid_hook_leaks(False)"), ON).assert_outcomes(passed=1)


@pytest.mark.parametrize("arguments", ["1", "'no'", "True, False", "on=True"])
def test_a_mark_that_says_something_else_is_refused(pytester, arguments):
    result = run(pytester, LEAK.replace("MARK", f"@pytest.mark.forbid_hook_leaks({arguments})"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E*ArgumentError: the mark forbid_hook_leaks must be given True, False or nothing, *"])


def test_the_mark_is_known(pytester):
    marks, options = pytester.runpytest_inprocess("--markers"), pytester.runpytest_inprocess("--help")
    marks.stdout.fnmatch_lines(["@pytest.mark.forbid_hook_leaks(forbidden=True): *"])
    options.stdout.fnmatch_lines(["*--update-activations*", "*forbid_hook_leaks (bool):*"])


def test_what_is_cleaned_up_is_no_leak(pytester):
    body = """
        def test_with_block():
            with model.h[0].register_forward_hook(print):
                pass

        def test_fixture(hooked):
            pass

        @pytest.fixture
        def hooked():
            with model.h[0].register_forward_hook(print):
                yield

        def test_capture(capture_activations):
            capture_activations(model, "**")
            run()

        @pytest.fixture(scope="module")
        def hooked_for_long():
            handle = model.h[0].register_forward_hook(print)
            yield
            handle.remove()

        def test_long_fixture(hooked_for_long):
            pass

        def test_long_fixture_again(hooked_for_long):
            pass

        class TestSetUp:
            @classmethod
            def setup_class(cls):
                cls.handle = model.h[1].register_forward_hook(print)

            @classmethod
            def teardown_class(cls):
                cls.handle.remove()

            def test_it(self):
                pass

        class OldTest(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                cls.handle = model.h[1].register_forward_hook(print)

            @classmethod
            def tearDownClass(cls):
                cls.handle.remove()

            def test_it(self):
                handle = model.register_forward_hook(print)
                self.addCleanup(handle.remove)

        def test_torchs_own():
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            torch.nn.utils.spectral_norm(nn.Linear(2, 2))
    """
    run(pytester, body, ON).assert_outcomes(passed=8)


def test_hooks_on_every_module_of_fixtures_of_the_test_and_of_a_model_that_is_gone_are_leaks(pytester):
    body = """
        from torch.nn.modules.module import register_module_forward_hook

        def test_global():
            register_module_forward_hook(lambda *values: None)

        @pytest.fixture
        def hooked():
            model.h[0].register_forward_pre_hook(print)

        def test_fixture(hooked):
            pass

        def test_own_model():
            nn.Linear(2, 2).register_full_backward_hook(print)

        def test_that_fails():
            model.register_forward_hook(print)
            assert False

        class OldTest(unittest.TestCase):
            def test_it(self):
                model.register_forward_hook(print)

        def test_that_leaves_nothing():
            pass
    """
    result = run(pytester, body, ON)
    torch_module._global_forward_hooks.clear()  # or all models from here on would have it
    result.assert_outcomes(passed=5, failed=1, errors=5)
    result.stdout.fnmatch_lines(
        [
            "*got 1: a global forward hook: 'test_global.<locals>.<lambda>' at test_models.py:*",
            "*got 1: a forward pre-hook on layer 'h.0' (Block) of BlockStack: 'print'. *",
            "*got 1: a backward hook on a Linear: 'print'. *",
            "*got 1: a forward hook on a BlockStack: 'print'. *",
            "*got 1: a forward hook on a BlockStack: 'print'. *",
        ]
    )


def test_a_model_that_was_freed_in_the_test_is_freed(pytester):
    body = """
        import gc, weakref

        def test_free():
            own = nn.Linear(2, 2)
            own.register_forward_hook(print).remove()
            is_alive = weakref.ref(own)
            del own
            gc.collect()
            assert not is_alive()
    """
    run(pytester, body, ON).assert_outcomes(passed=1)


@pytest.mark.parametrize("end", ["pass", "pytest.exit('in the middle')"])
def test_torch_is_as_it_was_afterwards(pytester, end):
    run(pytester, f"def test_it():\n    {end}\n", ON)
    assert nn.Module.register_forward_hook is REGISTER


def test_workers_of_xdist_tell_of_leaks_too(pytester):
    write_tests(pytester, LEAK.replace("MARK", ""))
    pytester.makeini(ON)
    result = pytester.runpytest_subprocess("-n", "1")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["A test must leave no hooks behind, got 1: a forward hook on layer 'h.1.mlp' *"])
