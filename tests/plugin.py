"""A test file for tests of the plug-in, which run pytest inside pytest."""

from __future__ import annotations

import textwrap

# pytester forgets what a run inside of it imported: here it is imported once for all of them.
import activation_extractor._left_hooks
import activation_extractor._snapshot  # noqa: F401

HEAD = """
import unittest
import pytest
import torch
from torch import nn
from models import BlockStack

torch.manual_seed(0)
model = BlockStack(blocks=2).eval()
tokens = torch.arange(10).view(2, 5)

def run():
    with torch.no_grad():
        model(tokens)
"""


def write_tests(pytester, body: str, **files: str) -> None:
    """``test_models.py`` with a model, tokens and ``run()`` above these tests, and other files."""
    pytester.makepyfile(test_models=HEAD + textwrap.dedent(body), **{k: textwrap.dedent(v) for k, v in files.items()})
