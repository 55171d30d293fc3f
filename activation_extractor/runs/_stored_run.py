"""Whether a folder holds a run of `extract`, which can be resumed or added to, and where its data set ends."""

from __future__ import annotations

from pathlib import Path

from activation_extractor._format._codecs import Codec
from activation_extractor._format._end import read_end
from activation_extractor._format._manifest import Manifest, read_manifest
from activation_extractor._format._shards import list_units, unit_name
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.sinks._resume import holds_store


def may_resume(folder: Path, *, resume: bool) -> bool:
    """Whether a folder holds a store to resume; a StoreError where it holds something else, or is not to be resumed."""
    advice = "Choose another folder, or leave out resume=False to go on with it."
    return holds_store(folder, may_join=resume, advice=advice)


def manifest_of_run(folder: Path) -> tuple[Manifest, int]:
    """The manifest of a store that `extract` wrote, and the size of its units.

    Raises:
        StoreError: with-blocks wrote the store, or what it says of its end is damaged.
    """
    read_end(folder)
    manifest = read_manifest(folder)
    if manifest.unit_size is None:
        advice = "Give extract a folder of its own."
        raise StoreError(folder, "be a store that extract wrote", "one that with-blocks wrote", advice)
    return manifest, manifest.unit_size


def check_end(folder: Path, codec: Codec, units: int) -> int:
    """The number of units that a store is known to have, 0 where nobody has said it.

    Raises:
        OtherRunError: it has more than `units`, or is known to have had more.
    """
    end = read_end(folder)
    known = end.units if end else 0
    last = max([*list_units(folder, codec)[-1:], *([unit_name(known - 1)] if known else [])], default="")
    if last >= unit_name(units):
        raise OtherRunError(folder, [f"data (it ends before the batches of unit {last!r})"])
    return known
