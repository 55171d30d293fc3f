"""The arguments of `extract`: what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from activation_extractor._arguments import check_flag, check_size
from activation_extractor._format._codecs import CODECS
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.runs._batches import Ids
from activation_extractor.runs._planned_units import PlannedUnit
from activation_extractor.runs._ranks import Share, sharded_by, share_of
from activation_extractor.runs._sources import is_numbered

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_arguments(
    batches: Any,
    ids: Ids,
    format: Any,  # noqa: A002
    sizes: Mapping[str, Any],
    on_failure: Any,
    *,
    resume: Any,
    append: Any,
) -> None:
    """Refuse arguments of the wrong kind, and a data set that cannot be resumed: in random order, without ids."""
    _check_batches(batches)
    if resume != "full":
        check_flag("resume", resume)
    check_flag("append", append)
    if on_failure is not None and not callable(on_failure):
        raise ArgumentTypeError("on_failure", "be a callable that takes a row's id and an exception", on_failure)
    if append and not resume:
        raise ArgumentError("append", "be left out with resume=False", append)
    random = next(filter(_is_random, _samplers(batches)), None)
    if resume and ids is None and random is not None:
        advice = "Pass ids=, leave out shuffle=True, or pass resume=False."
        raise ArgumentError("batches", "come in a fixed order when rows have no ids", type(random).__name__, advice)
    _check_sizes(sizes)
    if format not in CODECS:
        raise ArgumentError("format", f"be one of {', '.join(map(repr, CODECS))}", format)


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        check_size(name, size)
    if {"rows_per_unit", "unit_bytes"} <= given.keys():
        raise ArgumentError("unit_bytes", "be left out with rows_per_unit", sizes["unit_bytes"])


def check_masks(mask: Any, pooling_mask: str | None, group: str | None, calls: Any) -> None:
    """Refuse masks beside each other, and windows without any."""
    if pooling_mask and mask != "attention_mask":
        raise ArgumentError("mask", "be left out with pooling_mask", mask)
    if group and pooling_mask is None:
        advice = "Take it from Window.owns; where windows share nothing, it is a copy of the attention mask."
        raise ArgumentError("pooling_mask", "name the field of the positions that count, with group", None, advice)
    if group and calls == "join":
        raise ArgumentError("calls", "be 'last' or 'all' with group", calls, "Leave it out.")


def _check_batches(batches: Any) -> None:
    """Refuse what is no iterable of batches, or iterates over something else than batches."""
    advice = None
    if isinstance(batches, Tensor | np.ndarray):
        given: Any = (
            f"a {type(batches).__name__} of shape {tuple(batches.shape)}, whose rows would be taken for batches"
        )
        x = "x" if isinstance(batches, Tensor) else "torch.from_numpy(x)"
        advice = f"Cut it into batches: {x}.split(32); or pass list({x}) if each of its rows is a batch."
    elif isinstance(batches, Mapping | str | bytes):
        given, advice = f"a {type(batches).__name__}", "Put a single batch into a list: [batch]."
    elif not isinstance(batches, Iterable) and (isinstance(batches, Dataset) or not is_numbered(batches)):
        given, advice = type(batches).__name__, "Wrap a data set in a DataLoader, or call what makes batches."
    if advice is not None:
        raise ArgumentTypeError("batches", "be an iterable of batches", given, advice)


def _samplers(batches: Any) -> Iterator[Any]:
    """The samplers that decide on the order of a DataLoader's rows, the outer ones first."""
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(batches, name, None)
        if sampler is not None:
            yield sampler
            yield from _samplers(sampler)


def _is_random(sampler: Any) -> bool:
    return isinstance(sampler, _RANDOM) or bool(getattr(sampler, "shuffle", False))


def checked_share(share: Any, batches: Any, *, resume: Any, adds: bool) -> Share | PlannedUnit | None:
    """The part of a run that this process does, or the unit; None for all of it.

    Raises:
        ArgumentError: parts of the data set are given to ranks already, or what cannot be shared is to be.
    """
    if isinstance(share, PlannedUnit):
        return share
    found = share_of(share)
    given = sharded_by(batches) if found else None
    if given and share != "auto":
        advice = "Pass the whole data set on each rank, or share=None with a folder for each."
        raise ArgumentError("batches", "be the same on each rank with share", given, advice)
    if found and share != "auto" and (adds or not resume):
        condition = "be left out with append=True beside ids" if adds else "be left out with resume=False"
        raise ArgumentError("share", condition, share, "Ranks share a run that any of them may go on with.")
    return None if given or adds or not resume else found
