"""The releases that the tests run on, for what depends on them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


def release(distribution: str) -> tuple[int, ...]:
    """The first two numbers of a release; (0, 0) where it is not installed."""
    return tuple(map(int, version(distribution).split(".")[:2])) if find_spec(distribution) else (0, 0)


NUMPY, SAFETENSORS, TRANSFORMERS = map(release, ("numpy", "safetensors", "transformers"))

needs_copy_argument = pytest.mark.skipif(NUMPY < (2, 0), reason="numpy 1 does not hand copy= on to __array__")

# Since transformers 5 the one without a suffix asks for torchvision.
VIT_IMAGE_PROCESSOR = "ViTImageProcessorPil" if TRANSFORMERS >= (5, 0) else "ViTImageProcessor"


def that_safetensors_reads(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """Those that the library of this name reads, which checks what we write."""
    since = {torch.complex64: (0, 7), torch.float8_e4m3fnuz: (0, 8), torch.float8_e5m2fnuz: (0, 8)}
    return [dtype for dtype in dtypes if since.get(dtype, (0, 0)) <= SAFETENSORS]


def that_torch_has(*names: str) -> list[torch.dtype]:
    """The dtypes of these names, without those that came with a later release."""
    return [getattr(torch, name) for name in names if hasattr(torch, name)]
