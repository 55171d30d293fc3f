"""The pytest plug-in: tests that look inside models. pytest finds it by itself.

Loading it imports neither torch nor numpy: what needs them is imported when a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import pytest

from activation_extractor._display import examples
from activation_extractor.errors import ActivationError, ArgumentError
from activation_extractor.pytest_plugin._golden import GoldenFiles, Use, use_of

if TYPE_CHECKING:
    from activation_extractor.activations import Activations, capture
    from activation_extractor.comparison._tolerances import GivenTolerance

    _Options = ParamSpec("_Options")

    def _begun(capture: Callable[_Options, Any]) -> Callable[_Options, Activations]: ...


__all__ = ["ActivationSnapshot", "CaptureFixture"]

_MARK = "forbid_hook_leaks"
_UPDATE = "--update-activations"
_MOST_BYTES = 1 << 20

_error = pytest.StashKey[BaseException]()
_watch = pytest.StashKey[Any]()  # a HookWatch
_use = pytest.StashKey[Use]()


class CaptureFixture:
    """The type of the fixture `capture_activations`: `capture` that begins at once and ends with the test.

    Hooks are gone when the test has ended, however it has ended. A layer that was asked for and never ran is an error
    then, unless the test failed already.
    """

    def __init__(self) -> None:
        self._blocks = ExitStack()

    if TYPE_CHECKING:
        __call__ = staticmethod(_begun(capture))
    else:

        def __call__(self, *args: Any, **options: Any) -> Activations:
            """Begin to record; takes what `activation_extractor.capture` takes, and raises what it raises."""
            from activation_extractor.activations import capture

            return self._blocks.enter_context(capture(*args, **options))

    def close(self, error: BaseException | None = None) -> None:
        """End what was begun, before the test does: to read what a sink wrote, or to see that everything ran.

        Args:
            error: what the test raised, if it did; then a layer that never ran is no error.

        Raises:
            LayerNotRunError, GradientNotFoundError: a layer never ran, or its gradient never came, and there is no
                `error`.
        """
        self._blocks.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


class ActivationSnapshot:
    """The type of the fixture `activation_snapshot`: activations as they were when a golden file was written."""

    def __init__(self, use: Use, *, is_updating: bool) -> None:
        self._use, self._is_updating = use, is_updating

    def check(
        self,
        acts: Activations | Mapping[Any, Any],
        *,
        name: str | None = None,
        rtol: GivenTolerance = None,
        atol: GivenTolerance = None,
        max_bytes: int = _MOST_BYTES,
    ) -> None:
        """Compare activations with the golden file of this test; with ``--update-activations``, write it.

        The file is ``__activations__/<test file>/<test>.safetensors`` beside the test file, to be committed with it.
        It holds the same bytes when it is written again from the same run.

        Args:
            acts: the activations, or a mapping of names to tensors. Another dtype is a difference.
            name: tells several checks of one test apart.
            rtol: the relative tolerance, or one for each layer by pattern; see `activation_extractor.compare`.
            atol: the absolute tolerance, or one for each layer by pattern.
            max_bytes: how large the values may be together.

        Raises:
            AssertionError: a difference, with a table of the layers; or the file does not exist.
            ArgumentError: a name that was used in this test before, or values larger than `max_bytes`.
            StoreError: the file cannot be read, or not be written.
        """
        __tracebackhide__ = True
        from activation_extractor.pytest_plugin._snapshot import difference, golden_values, write_golden

        path = self._use.file(name)
        if str(path) in self._use.used:
            raise ArgumentError("name", "be another one for each check in a test", name, "Pass name=.")
        values = golden_values(acts, max_bytes)
        self._use.used.append(str(path))
        if self._is_updating:
            write_golden(path, values)
            self._use.written.append(str(path))
            return
        text = difference(path, values, rtol=rtol, atol=atol)
        if text is not None:
            raise AssertionError(text)


@pytest.fixture
def capture_activations(request: pytest.FixtureRequest) -> Iterator[CaptureFixture]:
    """`activation_extractor.capture` that begins at once, and ends with the test however the test ends."""
    blocks = CaptureFixture()
    yield blocks
    try:
        blocks.close(request.node.stash.get(_error, None))
    except ActivationError as error:
        raise error.with_traceback(None) from None  # where it came up within the library helps nobody


@pytest.fixture
def activation_snapshot(request: pytest.FixtureRequest) -> ActivationSnapshot:
    """`activation_snapshot.check(acts)` compares with a golden file; --update-activations writes it."""
    use = request.node.stash[_use] = use_of(request.node)
    return ActivationSnapshot(use, is_updating=request.config.getoption(_UPDATE))


# -- options ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the setting."""
    group = parser.getgroup("activations", "activations of models")
    group.addoption(_UPDATE, action="store_true", help="write the golden files of activation_snapshot anew")
    parser.addini(_MARK, "fail tests that leave hooks on a model", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    text = f"{_MARK}(forbidden=True): fail the test if it leaves hooks on a model; with False, let it"
    config.addinivalue_line("markers", text)
    config.pluginmanager.register(GoldenFiles(), "activation_files")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the watch that a session left on when it was cut short."""
    watch = config.stash.get(_watch, None)
    if watch is not None:
        watch.stop()


# -- hooks that are left behind ---------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin to watch a test's hooks, where they are forbidden."""
    mark = item.get_closest_marker(_MARK)
    if mark and (mark.kwargs or len(mark.args) > 1 or not all(isinstance(value, bool) for value in mark.args)):
        raise ArgumentError(f"the mark {_MARK}", "be given True, False or nothing", mark)
    if (not mark.args or mark.args[0]) if mark else item.config.getini(_MARK):
        from activation_extractor.testing._hook_leaks import HookWatch

        item.config.stash[_watch] = HookWatch()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Leave out the hooks of fixtures that live longer than the test."""
    watch = request.config.stash.get(_watch, None)
    with watch.pause() if watch is not None and fixturedef.scope != "function" else nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fail the test when its fixtures have ended and hooks are left."""
    watch, left = item.config.stash.get(_watch, None), []
    try:
        yield
    finally:
        if _error in item.stash:
            del item.stash[_error]  # with all that its traceback holds
        if watch is not None:
            left = watch.stop()
            del item.config.stash[_watch]
    if left:
        advice = "Remove them with the handle that register_... returned, or use capture_activations."
        pytest.fail(f"A test must leave no hooks behind, got {len(left)}: {examples(left)}. {advice}", pytrace=False)


# -- how a test ended -------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Keep what a test raised for its captures; report what it did with golden files."""
    report = yield
    fixtures = getattr(item, "fixturenames", ())  # an item need not be a function
    if call.when != "teardown" and call.excinfo is not None and "capture_activations" in fixtures:
        item.stash[_error] = call.excinfo.value
    if call.when == "call":
        use = item.stash.get(_use, None) or use_of(item)
        if _use in item.stash or Path(use.folder).is_dir():
            use.add_to(report)
    return report
