"""Warnings that point at the call of `extract`, through whatever generators and progress bars lie between."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parent)


def warn_caller(text: str) -> None:
    """Warn at the line outside of this folder that called into it first."""
    files = [info.filename for info in inspect.stack(0)]
    last = max(level for level, file in enumerate(files) if file.startswith(_HERE))
    warnings.warn(text, stacklevel=last + 2)
