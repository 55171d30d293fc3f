"""Files that appear whole at a free name, in a folder or in a bucket, and never in place of another one.

In a folder a file is written under the name of a draft, and linked to its own. In a bucket it is one request that the
server refuses where the name is taken: a conditional put. A server that cannot do that is not written to, since two
writers would lose each other's rows there.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from activation_extractor._arguments import check_path
from activation_extractor._files import check_writable, draft, make_folders, publish, sweep, sync
from activation_extractor._storage import REACH, RemotePath, bucket_of, failing, located
from activation_extractor.errors import StoreError

_MOST_BYTES = 5000 * 2**20  # of an object that is put by one request: a limit of Azure, and nearly that of S3
_PAUSES = 0.2, 1.0, 5.0  # seconds, before an object is put again
_DISK = "Write the store to a disk, and copy it there."


def check_place(name: str, path: Any) -> Path:
    """The place of a store, which need not exist: the path of a folder, or a `RemotePath`.

    Raises:
        ArgumentTypeError, ArgumentError, MissingExtraError: see `check_path` and `located`.
    """
    if isinstance(path, str | os.PathLike) and isinstance(place := located(path), RemotePath):
        return place
    return check_path(name, path)


def exists(path: Path) -> bool:
    """Whether something lies at a place: a link too, or an object of just this name.

    Raises:
        StoreError: the bucket does not say.
    """
    if not isinstance(path, RemotePath):
        return os.path.lexists(path)
    import obstore

    try:
        with failing(path):
            obstore.head(bucket_of(path.bucket), path.key)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(path, "be reachable", error.strerror or str(error), REACH) from error
    return True


def create(path: Path, chunks: Sequence[Any]) -> bool:
    """Write buffers of bytes, one behind the other, as a file that is new; returns whether its name was free.

    A bucket may answer that a name is taken whose first request, which this very call sent, was cut off.

    Raises:
        StoreError: the disk or the bucket refuses.
    """
    if isinstance(path, RemotePath):
        try:
            return _put(path, chunks)
        except StoreError:
            raise
        except OSError as error:
            raise _refused(path, error) from error
    with draft(path) as beside:
        with open(beside, "xb") as file:
            file.writelines(chunks)
            sync(file)
        return publish(beside, path)


def make_ready(folder: Path, *inner: str) -> None:
    """Make a folder, and folders in it, ready for new files, before anything depends on it.

    Drafts of writers that were killed are removed. In a bucket there are no folders; there it is made sure that what is
    put twice is refused.

    Raises:
        StoreError: that is not possible.
    """
    if isinstance(folder, RemotePath):
        _check_creates(folder.joinpath(*inner[:1]))
        return
    for path in (*(folder / name for name in inner), folder):
        make_folders(path)
        sweep(path)
    check_writable(folder.joinpath(*inner[:1]))


def remove(path: Path) -> None:
    """Remove a file that nothing depends on, if that is possible."""
    with suppress(OSError):
        if not isinstance(path, RemotePath):
            path.unlink()
            return
        import obstore

        with failing(path):
            obstore.delete(bucket_of(path.bucket), path.key)


def _put(path: RemotePath, chunks: Iterable[Any]) -> bool:
    """Create an object; returns whether its name was free. It is tried again where the server leaves that open.

    A put that is answered too late, or not at all, may be stored nevertheless; the next one finds it then. An object
    that is said to be there, and is not, is one whose name another request holds for a moment.
    """
    buffers = [memoryview(chunk).cast("B") for chunk in chunks if len(chunk)]
    if (nbytes := sum(map(len, buffers))) > _MOST_BYTES:
        advice = "Make units smaller, with unit_bytes= or rows_per_unit=."
        raise StoreError(path, f"have at most {_MOST_BYTES:,} bytes", f"{nbytes:,}", advice)
    for pause in (*_PAUSES, None):
        try:
            if _try_put(path, buffers):
                return True
            if exists(cast("Path", path)):
                return False
            if pause is None:
                raise OSError(None, "an object that is there, and is not")
        except OSError as error:
            if pause is None or not _is_open(error):
                raise
        time.sleep(pause)
    raise AssertionError


def _try_put(path: RemotePath, buffers: list[memoryview]) -> bool:
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    with failing(path):
        try:
            obstore.put(bucket_of(path.bucket, to_write=True), path.key, buffers, mode="create")
        except (AlreadyExistsError, PreconditionError):
            return False
        except NotImplementedError as error:  # by the environment, or since it is a server of files
            raise OSError(errno.ENOSYS, str(error).partition("\n")[0]) from error
    return True


def _is_open(error: OSError) -> bool:
    """Whether a server that was asked to create an object may have done so: it did not answer."""
    cause = error.__cause__
    return type(cause).__name__ == "GenericError" and "status code" not in str(cause)


def _check_creates(folder: Path) -> None:
    """Raise a StoreError where a bucket refuses objects, or lets one take the place of another."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"  # the name of a draft, which counts as left over
    create(probe, [b"1"])
    is_replaced = create(probe, [b"2"])
    remove(probe)  # a writer may have no right to
    if is_replaced:
        condition, got = "refuse an object whose name is taken", "one that replaces it"
        raise StoreError(folder, condition, got, f"Two writers would lose rows in such a bucket. {_DISK}")


def _refused(path: RemotePath, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSYS or "status code: 501" in reason:
        return StoreError(path, "be created only where there is nothing", reason, _DISK)
    return StoreError(path, "be writable", reason, REACH)
