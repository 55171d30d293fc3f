"""Where the files of a store lie: in a folder, or as objects of a bucket, by obstore; and how they are read there.

A place in a bucket is a `RemotePath`, which goes wherever a `Path` of a store goes. Few operations tell them apart:
what lies at a place, a small file as a whole, the beginning of a file, and an open file that is read in one span or in
many. Objects of a store are never changed once they are there.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from activation_extractor import _files
from activation_extractor._files import TruncatedError
from activation_extractor._requests import GAP_BYTES, concurrently
from activation_extractor.errors import ArgumentError, MissingExtraError, StoreError

SCHEMES = ("s3", "gs", "az", "memory")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BEGINNING = 1 << 16  # bytes of an object that are read where its header is asked for
_PUT_TIME = "10m"  # obstore's is 30 s, in which a slow line does not bring a shard of 64 MiB
REACH = "Check the URL, the network, and the credentials, which the environment holds (~/.aws is not read)."

_From = TypeVar("_From")
_To = TypeVar("_To")


class RemotePath(PurePosixPath):
    """The place of an object, or of all objects below it, by its URL: ``s3://bucket/prefix``."""

    def __str__(self) -> str:
        scheme, *others = self.parts
        return f"{scheme}//{'/'.join(others)}"

    __fspath__ = __str__

    @property
    def bucket(self) -> str:
        """The URL of the bucket."""
        return "//".join(self.parts[:2])

    @property
    def key(self) -> str:
        """The name of the object in the bucket."""
        return "/".join(self.parts[2:])

    def is_dir(self) -> bool:
        """False, since a shard in a bucket is an object."""
        return False

    def is_symlink(self) -> bool:
        """False, since a bucket has no links."""
        return False

    def absolute(self) -> RemotePath:
        """The path itself."""
        return self

    resolve = absolute


@dataclass(frozen=True)
class RemoteEntry:
    """Something that lies directly below a place in a bucket, as `os.DirEntry` for a folder."""

    path: str
    name: str

    def is_symlink(self) -> bool:
        """False, since a bucket has no links."""
        return False


def located(path: str | os.PathLike[str]) -> Path:
    """The path of a folder or file on this machine; a `RemotePath` where it is the URL of one in a bucket.

    Raises:
        ArgumentError: a URL of another kind.
        MissingExtraError: obstore is not installed.
    """
    if type(path) is str and "://" not in path:
        return Path(path)
    if isinstance(path, RemotePath):
        return cast("Path", path)
    text = _unfolded(path) if isinstance(path, Path) else path
    found = _URL.match(text) if isinstance(text, str) else None
    if found is None or not isinstance(text, str):
        return Path(path)
    if found[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ArgumentError("the URL of a store", f"begin with one of {known}", text)
    if find_spec("obstore") is None:
        raise MissingExtraError("A store in a bucket", "remote", "obstore")
    remote = RemotePath(text)
    if len(remote.parts) < 2 or ".." in remote.parts:
        raise ArgumentError("the URL of a store", "name a bucket, and what is in it", text)
    return cast("Path", remote)


def _unfolded(path: Path) -> str:
    """The URL that a `Path` was made of, which leaves a slash out; no folder of this machine may have its name."""
    scheme, *others = path.parts or ("",)
    is_url = re.fullmatch("[A-Za-z][A-Za-z0-9+.-]+:", scheme) is not None and not os.path.lexists(scheme)
    return f"{scheme}//{'/'.join(others)}" if is_url else str(path)


def scan(folder: Path) -> list[Any]:
    """What lies directly in a folder, `os.DirEntry`; `RemoteEntry` below a place in a bucket.

    Raises:
        OSError: there is no such folder, or it cannot be read. In a bucket a folder that is not there is empty.
    """
    if not isinstance(folder, RemotePath):
        return list(os.scandir(folder))
    import obstore

    with failing(folder):
        found = obstore.list_with_delimiter(bucket_of(folder.bucket), folder.key or None)
    # What has the folder's own name is an empty object that makes a folder of it for consoles of providers.
    keys = [*found["common_prefixes"], *(item["path"] for item in found["objects"] if item["path"] != folder.key)]
    return [RemoteEntry(f"{folder.bucket}/{key}", key.rpartition("/")[2]) for key in keys]


def names_in(folder: Path) -> list[str]:
    """The names of what lies directly in a folder; raises what `scan` raises."""
    return [entry.name for entry in scan(folder)] if isinstance(folder, RemotePath) else os.listdir(folder)


def for_each(place: Path, call: Callable[[_From], _To], arguments: Sequence[_From]) -> list[_To]:
    """The results of calls that read below a place: many at a time where that is in a bucket, or else one by one."""
    return concurrently(call, arguments) if isinstance(place, RemotePath) else list(map(call, arguments))


def read_whole(path: Path) -> bytes:
    """All bytes of a small file; raises what `_files.read_whole` raises."""
    if not isinstance(path, RemotePath):
        return _files.read_whole(path)
    import obstore

    with failing(path):
        return bytes(obstore.get(bucket_of(path.bucket), path.key).bytes())


def size_of_file(path: Path) -> int:
    """The size of a file, in bytes; raises an OSError where it is gone."""
    if not isinstance(path, RemotePath):
        return path.lstat().st_size
    import obstore

    with failing(path):
        return int(obstore.head(bucket_of(path.bucket), path.key)["size"])


def beginning(path: RemotePath) -> tuple[bytes, int]:
    """The first bytes of an object, and how many it has; raises an OSError where it cannot be read."""
    import obstore

    with failing(path):
        found = obstore.get(bucket_of(path.bucket), path.key, options={"range": (0, _BEGINNING)})
        return bytes(found.bytes()), int(found.meta["size"])


class RemoteFile:
    """An object of a bucket; nothing is asked for before something is read.

    Its methods raise an OSError where the object cannot be read, and a ValueError where it ends before.
    """

    def __init__(self, path: RemotePath) -> None:
        self._path = path

    def fill_many(self, spans: Sequence[tuple[Any, int]]) -> None:
        """Fill several buffers, each from a position on, by one request where they lie near each other."""
        import obstore

        with failing(self._path):
            found = obstore.get_ranges(
                bucket_of(self._path.bucket),
                self._path.key,
                starts=[position for _, position in spans],
                lengths=[len(data) for data, _ in spans],
                coalesce=GAP_BYTES,
            )
        for (data, _), part in zip(spans, found, strict=True):
            if len(part) < len(data):
                raise ValueError("a file that was cut short")
            memoryview(data).cast("B")[:] = memoryview(part).cast("B")

    def fetch(self, start: int, size: int) -> Any:
        """So many bytes from a position on, as a buffer that cannot be written to; by one request."""
        import obstore

        if not size:
            return b""
        with failing(self._path):
            found = obstore.get_range(bucket_of(self._path.bucket), self._path.key, start=start, length=size)
        if len(found) < size:
            raise TruncatedError(f"an object that ends before byte {start + size}")
        return found

    def read(self, start: int, size: int) -> bytes:
        """Exactly so many bytes; a TruncatedError where the object ends before."""
        return bytes(self.fetch(start, size))


@cache
def _opened(bucket: str, *, to_write: bool = False) -> Any:
    from obstore import store

    scheme, _, name = bucket.partition("://")
    if scheme == "memory":
        return _opened(bucket) if to_write else store.MemoryStore()
    kind, prefix = {"s3": ("S3Store", "AWS"), "gs": ("GCSStore", "GOOGLE"), "az": ("AzureStore", "AZURE")}[scheme]
    if to_write and f"{prefix}_TIMEOUT" not in map(str.upper, os.environ):
        return getattr(store, kind)(name, timeout=_PUT_TIME)
    return store.from_url(bucket)


_used_by: list[int] = []  # the process that has used obstore: its threads do not survive in a copy of the process


def bucket_of(url: str, *, to_write: bool = False) -> Any:
    """The bucket at a URL, as obstore has it: credentials and options are taken from the environment.

    A request that writes has more time than one that reads, unless the environment says how much.

    Raises:
        StoreError: in a process that was forked from one that had read from a bucket.
    """
    process = os.getpid()
    if process not in _used_by:
        if _used_by:
            advice = "Start them anew, with multiprocessing_context='spawn' in a DataLoader."
            raise StoreError(url, "be read by processes that are no copies of a reader", "a forked one", advice)
        _used_by.append(process)
    return _opened(url, to_write=True) if to_write else _opened(url)


@contextmanager
def failing(path: RemotePath) -> Iterator[None]:
    """Raise what goes wrong with an object as an OSError with a short text; FileNotFoundError where it is not there."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except Exception as error:  # obstore has classes of its own, which derive from Exception
        if not type(error).__module__.startswith("obstore"):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, reason or type(error).__name__, str(path)) from error
