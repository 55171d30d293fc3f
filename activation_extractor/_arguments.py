"""Checks of arguments that several rooms take."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from activation_extractor.errors import ArgumentError, ArgumentTypeError

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+://|(?:s3|gs|az|memory):/")  # a Path leaves a slash out


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
    if _URL.match(os.fspath(path)):
        advice = "What is no store is read and written on a disk; copy it from or to a bucket."
        raise ArgumentError(name, "be a folder on this machine", os.fspath(path), advice)
    return Path(path)
