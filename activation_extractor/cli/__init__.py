"""The command line, ``activation-extractor``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    missing = next((name for name in _NEEDED if not _is_there(name)), None)
    if missing is not None:
        print(f"The command line needs {missing}: pip install 'activation_extractor[cli]'", file=sys.stderr)
        raise SystemExit(2)
    from activation_extractor.cli._app import app

    app(prog_name="activation-extractor")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
