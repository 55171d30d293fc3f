"""Whether a run may begin in a folder, or resume what is stored in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from activation_extractor._files import is_draft
from activation_extractor._format._fingerprints import differences
from activation_extractor._format._journal import JOURNAL
from activation_extractor._format._manifest import Manifest, has_manifest, read_manifest
from activation_extractor._format._shards import SHARDS
from activation_extractor._storage import REACH, RemotePath, located, names_in, scan
from activation_extractor.errors import OtherRunError, StoreError

_APPEND = "Choose another folder, or add to it with a sink such as SafetensorsSink(path, append=True)."


def holds_store(path: Path, *, may_join: bool, advice: str = _APPEND) -> bool:
    """Whether a folder holds a store, which `may_join` says that a run may go on with; else it is free.

    Raises:
        StoreError: it is neither; `advice` is for one that holds a store.
    """
    if may_join and has_manifest(path):
        return True
    try:
        check_free(path, advice)
    except StoreError:
        if may_join and has_manifest(path):  # another process began it between the two looks
            return True
        raise
    return False


def check_free(path: Path, advice: str = _APPEND) -> None:
    """Make sure that a folder can become a new store, without touching it; `advice` is for one that is a store.

    Raises:
        StoreError: the path is a file, or the folder holds something.
    """
    try:
        is_free = all(map(_is_left_over, scan(path)))
    except FileNotFoundError:
        return
    except OSError as error:
        what, advice = ("reachable", REACH) if isinstance(path, RemotePath) else ("a folder", "Choose another folder.")
        raise StoreError(path, f"be {what}", error.strerror or str(error), advice) from error
    if is_free:
        return
    if has_manifest(path):
        raise StoreError(path, "be a new or empty folder", "one that holds a store", advice)
    raise StoreError(path, "be a new or empty folder", "one that holds something", "Choose another folder.")


def _is_left_over(entry: Any) -> bool:
    """Whether a run that ended before its first unit leaves this."""
    if entry.is_symlink() or entry.name not in (SHARDS, JOURNAL):
        return is_draft(entry.name)
    with suppress(NotADirectoryError):
        return all(map(is_draft, names_in(located(entry.path))))
    return False


def check_same(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest of the store in a folder, which must be of the run that `wanted` describes.

    Raises:
        OtherRunError: the store is of another run.
        StoreError: there is no store, or one of another format.
    """
    found = read_manifest(folder)
    if found.codec != wanted.codec:
        advice = "Use the sink or format= that it was begun with."
        raise StoreError(folder, f"be a store of {wanted.codec.name} shards", f"one of {found.codec.name}", advice)
    stored, current = ({**manifest.fingerprint, "unit size": manifest.unit_size} for manifest in (found, wanted))
    different = differences(stored, current)
    if different:
        raise OtherRunError(folder, different)
    return found
