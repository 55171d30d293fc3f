"""The command line, ``activation-extractor``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    try:
        from activation_extractor._commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"The command line needs {error.name}: pip install 'activation_extractor[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app()
