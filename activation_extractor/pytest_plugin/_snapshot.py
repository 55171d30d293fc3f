"""What `activation_snapshot` does with a golden file: comparing with it, and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from activation_extractor._display import short_path
from activation_extractor._files import make_folders
from activation_extractor._format._entry_names import Key
from activation_extractor.activations._saved import SavedActivations, saved_entry, write_saved
from activation_extractor.comparison import compare
from activation_extractor.comparison._sides import Side
from activation_extractor.comparison._tolerances import GivenTolerance
from activation_extractor.errors import ArgumentError, ArgumentTypeError


def golden_values(acts: Any, max_bytes: int) -> Mapping[Key, Tensor]:
    """The values for a golden file; refuses what is not meant for a repository, or cannot be in one file.

    Raises:
        ArgumentTypeError: `acts` is a store, or no activations at all.
        ArgumentError: the values are larger than `max_bytes`.
    """
    side = Side(acts, "acts")
    if side.store is not None:
        raise ArgumentTypeError("acts", "be activations", acts, "Compare stores with activation_extractor.compare.")
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in side.tensors.values())
    if nbytes > max_bytes:
        advice = "Capture fewer layers, or with reduce='mean', or a smaller batch; or pass max_bytes=."
        raise ArgumentError("The bytes in a golden file", f"be at most max_bytes={max_bytes}", nbytes, advice)
    return side.tensors


def difference(path: Path, values: Mapping[Key, Tensor], *, rtol: GivenTolerance, atol: GivenTolerance) -> str | None:
    """How values differ from those of a golden file, for people; None when they do not.

    Raises:
        StoreError: it cannot be read.
    """
    if not path.exists():
        advice = "Write it with pytest --update-activations, and commit it."
        return f"There is no golden file {short_path(path)!r} to compare with. {advice}"
    comparison = compare(SavedActivations(path), values, rtol=rtol, atol=atol, check_dtype=True)
    if comparison:
        return None
    advice = "If that is intended, run pytest with --update-activations."
    text = f"The activations differ from {short_path(path)!r}, first in layer {comparison.first_difference!r}."
    return f"{text} {advice}\n{comparison!r}"


def write_golden(path: Path, values: Mapping[Key, Tensor]) -> None:
    """Write a golden file; the same values give the same bytes.

    Raises:
        StoreError: it cannot be written.
    """
    make_folders(path.parent)
    write_saved(path, {saved_entry(key): tensor for key, tensor in values.items()})
