"""What all tests share: no network, one thread for torch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

import pytest
import torch
from models import BatchNormNet, BlockStack
from torch import nn

torch.set_num_threads(1)

collect_ignore = ["typing"]  # for mypy alone


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return BatchNormNet().eval()


@pytest.fixture
def stack() -> nn.Module:
    torch.manual_seed(0)
    return BlockStack().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 50, (2, 5))
