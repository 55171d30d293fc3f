"""What commands share: how they print."""

from __future__ import annotations

import json
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

is_silent: ContextVar[bool] = ContextVar("is_silent", default=False)  # in ranks whose first one speaks for all


def say(text: str) -> None:
    """Print a result as it is, neither wrapped nor coloured."""
    from rich.console import Console

    if is_silent.get():
        return
    Console().print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say_json(content: Any) -> None:
    """Print a result for a script; escaped, so that no name in it can steer a terminal."""
    say(json.dumps(content, indent=1))


def how_to_read(path: Path, key: Any) -> str:
    """The lines of Python that open a store and read one of its columns."""
    column = ", ".join(map(repr, key)) if isinstance(key, tuple) else repr(key)
    opening = f"    from activation_extractor import open_store\n    store = open_store({str(path)!r})"
    return f"Read it back:\n{opening}\n    store[{column}].numpy(), store.ids"


def warn(text: str) -> None:
    """Print what is not part of the result, on stderr."""
    if not is_silent.get():
        print(text, file=sys.stderr)
