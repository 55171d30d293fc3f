"""The package's table of contents."""

from __future__ import annotations

import subprocess
import sys

import pytest

import activation_extractor
from activation_extractor import __all__ as names


def run(code: str) -> str:
    """What a fresh process prints."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", names)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(activation_extractor, name)
    assert value.__name__ == name
    assert value.__doc__
    assert value.__module__.startswith("activation_extractor.")


def test_all_is_exactly_what_is_there():
    assert list(names) == sorted(set(names))
    assert set(names) == set(activation_extractor._HOMES)
    # pytest rewrites the package, as that of a plug-in, and leaves names with an @ in it.
    public = {name for name in vars(activation_extractor) if not name.startswith(("_", "@"))}
    modules = {name for name in public if f"activation_extractor.{name}" in sys.modules}
    assert public - modules <= {*names, "annotations", "importlib", "TYPE_CHECKING", "Any"}
    assert {*names, "__version__"} <= set(dir(activation_extractor))


def test_a_star_import_gives_all_of_it():
    there: dict[str, object] = {}
    exec("from activation_extractor import *", there)
    assert set(there) - {"__builtins__"} == set(names)


def test_the_first_use_of_each_name_works_in_a_process_of_its_own():
    code = "import activation_extractor as a, importlib\n"
    code += "for name in reversed(a.__all__): getattr(a, name)\nprint('all there')"
    assert run(code) == "all there"


def test_a_name_that_is_not_there_is_the_usual_error():
    with pytest.raises(AttributeError, match="^module 'activation_extractor' has no attribute 'captrue'$"):
        _ = activation_extractor.captrue
    with pytest.raises(ImportError, match="cannot import name 'captrue'"):
        exec("from activation_extractor import captrue")


@pytest.mark.parametrize("module", ["activation_extractor", "activation_extractor.errors"])
def test_importing_the_package_imports_neither_torch_nor_numpy(module):
    heavy = "{'torch', 'numpy', 'safetensors', 'transformers'} & {*sys.modules}"
    assert run(f"import sys, {module}\nprint({heavy})") == "set()"
    code = "import sys, activation_extractor as a\ndir(a); a.__version__; a.ActivationError\n"
    assert run(f"{code}print({heavy})") == "set()"


def test_the_version_is_that_of_the_installed_distribution():
    from importlib.metadata import version

    assert activation_extractor.__version__ == version("activation_extractor")
