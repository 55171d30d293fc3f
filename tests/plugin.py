"""A test file for tests of the plug-in, which run pytest inside pytest."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

# pytester forgets what a run inside of it imported: here it is imported once for all of them. Hypothesis is by its own
# plug-in, at the end of each run.
for name in ("activation_extractor.testing._hook_leaks", "activation_extractor.pytest_plugin._snapshot", "hypothesis"):
    importlib.import_module(name)

HERE = Path(__file__).parent
HEAD = f"""
import sys
import unittest
import pytest
import torch
from torch import nn

sys.path.append({str(HERE)!r})
from models import BlockStack

torch.manual_seed(0)
model = BlockStack(blocks=2).eval()
tokens = torch.arange(10).view(2, 5)

def run():
    with torch.no_grad():
        model(tokens)
"""


def write_tests(pytester, body: str) -> None:
    """``test_models.py``: a model, tokens and ``run()``, and these tests below."""
    pytester.makepyfile(test_models=HEAD + textwrap.dedent(body))
