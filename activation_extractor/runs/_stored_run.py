"""Whether a folder holds a run of `extract`, which can be resumed or added to."""

from __future__ import annotations

from pathlib import Path

from activation_extractor._format._manifest import Manifest, has_manifest, read_manifest
from activation_extractor.errors import StoreError
from activation_extractor.sinks._resume import check_free


def may_resume(folder: Path, *, resume: bool) -> bool:
    """Whether a folder holds a store to resume; a StoreError where it holds something else, or is not to be resumed."""
    if not (resume and has_manifest(folder)):
        try:
            check_free(folder, "Choose another folder, or leave out resume=False to go on with it.")
        except StoreError:
            if not (resume and has_manifest(folder)):  # another process may have begun it meanwhile
                raise
            return True
        return False
    return True


def manifest_of_run(folder: Path) -> tuple[Manifest, int]:
    """The manifest of a store that `extract` wrote, and the size of its units; a StoreError where with-blocks did."""
    manifest = read_manifest(folder)
    if manifest.unit_size is None:
        advice = "Give extract a folder of its own."
        raise StoreError(folder, "be a store that extract wrote", "one that with-blocks wrote", advice)
    return manifest, manifest.unit_size
