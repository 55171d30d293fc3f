"""Checks of arguments that several rooms take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from activation_extractor.errors import ArgumentError, ArgumentTypeError


def check_flag(name: str, flag: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(flag, bool):
        raise ArgumentTypeError(name, "be True or False", flag)


def check_size(name: str, size: Any) -> None:
    """Refuse what is not a number of bytes or rows; None, where a size may be left out, is not for here."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(name, "be a positive integer", size)


def check_path(name: str, path: Any) -> Path:
    """The path of a folder, which need not exist."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(name, "be a folder's path", path)
    if "\0" in os.fspath(path):
        raise ArgumentError(name, "be a path without NUL", os.fspath(path))
    return Path(path)
