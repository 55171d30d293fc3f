"""The house: what a room is, and how long files and functions may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import activation_extractor

PACKAGE = Path(__file__).parents[1] / "activation_extractor"
FILES = sorted(PACKAGE.rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def test_no_room_has_the_name_of_something_that_the_package_exports():
    # The first import of a file in such a room would put the folder in the place of the function.
    assert set(ROOMS) & set(activation_extractor.__all__) == set()


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"cli", "extractors"}))
def test_every_file_in_a_room_is_private_and_its_door_says_what_is_public(room):
    names = [path.name for path in (PACKAGE / room).glob("*.py")]
    assert all(name.startswith("_") for name in names)
    door = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(door))
    assert room.startswith("_") or "__all__ = [" in door


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300 or path.name == "errors.py"  # errors.py is a catalogue
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            body = node.body[ast.get_docstring(node) is not None :]
            inner = sum(length(part) for part in ast.walk(node) if isinstance(part, FUNCTIONS) and part is not node)
            assert sum(map(length, body)) - inner <= 40, node.name


def length(node) -> int:
    return node.end_lineno - node.lineno + 1
