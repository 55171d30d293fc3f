"""Files and folders that appear whole or not at all, and never in place of another; reading files of anybody's.

Nothing here follows a link or waits for a pipe: what lies in a store may have been put there by somebody else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from activation_extractor.errors import StoreError

_DRAFT = re.compile(r"\.[0-9a-f]{32}\.tmp")
_OLD_SECONDS = 3600.0  # writing a draft takes seconds
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # FAT, some network file systems
_ADVICE = "Check the folder, its permissions and the room on the disk."


class TruncatedError(ValueError):
    """A file is shorter than its header promises."""


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A free name beside `path` for a file or folder that is being written; removed at the end if it still exists.

    Raises:
        StoreError: it cannot be written.
    """
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield beside
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(path, "be writable", error.strerror or str(error), _ADVICE) from error
    finally:
        _remove(beside)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path`, if any, once the block has ended well.

    Raises:
        StoreError: it cannot be written.
    """
    with draft(path) as beside:
        with open(beside, "xb") as file:
            yield file
            sync(file)
        os.replace(beside, path)
        sync_folder(path.parent)


def publish(beside: Path, path: Path) -> bool:
    """Give a finished file or folder its final name if that name is free; nothing is ever overwritten.

    Returns:
        Whether the name was free.
    """
    try:
        if beside.is_dir():
            os.rename(beside, path)  # fails on a folder that holds something, as every published one does
        else:
            _link(beside, path)
    except OSError as error:
        if error.errno in _TAKEN and os.path.lexists(path):
            return False
        raise
    sync_folder(path.parent)
    return True


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, with the process's umask, unless they exist.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error


def check_writable(folder: Path) -> None:
    """Make a file in a folder and remove it, before anything depends on it.

    Raises:
        StoreError: that is not possible.
    """
    try:
        with draft(folder / "any") as beside:
            beside.touch(exist_ok=False)
    except StoreError as error:
        raise _not_writable(folder, error.__cause__) from error.__cause__


def sweep(folder: Path) -> None:
    """Remove the drafts of writers that were killed: those that nobody wrote to for an hour."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if is_draft(path.name) and time.time() - _last_written(path) > _OLD_SECONDS:
                _remove(path)


def is_draft(name: str) -> bool:
    """Whether a file or folder of this name is a `draft`."""
    return _DRAFT.fullmatch(name) is not None


def sync(file: BinaryIO) -> None:
    """Bring what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make what was just added to a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | Path) -> int:
    """A descriptor of a regular file: no link is followed, and no pipe is waited for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a link, a folder or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if os.path.islink(path):
            raise ValueError("a link") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("something else than a file")
    return descriptor


def read_at(descriptor: int, start: int, size: int) -> bytes:
    """Exactly `size` bytes from `start`.

    Raises:
        TruncatedError: the file ends before.
    """
    data = os.pread(descriptor, size, start)
    if len(data) < size:
        raise TruncatedError(f"a file that ends at byte {start + len(data)} of {start + size}")
    return data


def read_whole(path: Path) -> bytes:
    """All bytes of a regular file; raises what `open_regular` raises."""
    descriptor = open_regular(path)
    try:
        return read_at(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _link(beside: Path, path: Path) -> None:
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.rename(beside, path)


def _not_writable(folder: Path, error: BaseException | None) -> StoreError:
    got = getattr(error, "strerror", None) or str(error)
    return StoreError(folder, "be a folder that can be written to", got, "Choose another folder.")


def _last_written(path: Path) -> float:
    files = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return max(float(file.lstat().st_mtime) for file in (path, *files))


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
