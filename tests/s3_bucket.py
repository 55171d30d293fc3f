"""The bucket of `s3_server`: its objects, what was asked for, and what shall go wrong."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from hashlib import md5
from itertools import islice
from pathlib import Path
from typing import Literal


class Objects(dict[str, bytes]):
    """Objects by their keys; of each, its ETag and when it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.etags: dict[str, str] = {}
        self.written: dict[str, float] = {}

    def __setitem__(self, key: str, data: bytes) -> None:
        self.etags[key], self.written[key] = f'"{md5(data).hexdigest()}"', time.time()
        super().__setitem__(key, data)


class Bucket:
    """The objects of the bucket ``bucket``, what was asked for, and what shall go wrong.

    Attributes:
        objects: what the bucket holds; a test may read, change and remove it at any time.
        requests: one line for each request: its method, its path and its range.
        replaced: the keys of objects in whose place others were put.
        removed: the keys that were to be removed.
        latency: seconds before each answer.
        page: keys in a page of a listing.
        before: called with the method and the key of each request, before anything is done about it. What it raises
            ends the connection.
        after: the same, after a request was carried out and before it is answered.
        denied: methods that are answered by 403.
        unavailable: so many requests, of any method, are answered by 503.
        busy: so many requests of a method are answered by 503.
        broken: so many answers to a range break off in the middle.
        broken_uploads: so many PUTs break off in the middle of their body; nothing is stored.
        lost_answers: so many PUTs and POSTs are carried out, and the connection ends without an answer.
        conflicts: so many conditional PUTs are answered by 409, as S3 does where two of them meet; nothing is stored.
        conditions: what is done about ``If-None-Match``. Servers that are older than it ignore it and overwrite,
            or refuse it by 501.
    """

    def __init__(self) -> None:
        self.objects = Objects()
        self.requests: list[str] = []
        self.replaced: list[str] = []
        self.removed: list[str] = []
        self.denied: set[str] = set()
        self.latency, self.page = 0.0, 1000
        self.before: Callable[[str, str], None] = lambda method, key: None
        self.after = self.before
        self.unavailable, self.busy = 0, Counter[str]()
        self.broken = self.broken_uploads = self.lost_answers = self.conflicts = 0
        self.conditions: Literal["honoured", "ignored", "refused"] = "honoured"
        self.lock = threading.RLock()

    def add(self, folder: Path, prefix: str) -> None:
        """The files of a folder as objects below a prefix."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    def count(self, method: str) -> int:
        """How many requests of a method there were."""
        return sum(request.startswith(f"{method} ") for request in self.requests)

    def take(self, fault: str) -> bool:
        """Whether a fault is due; it is due once less from then on."""
        with self.lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
        return left > 0

    def is_busy(self, method: str) -> bool:
        """Whether 503 is due for a request of a method; it is due once less from then on."""
        with self.lock:
            left, self.busy[method] = self.busy[method], max(0, self.busy[method] - 1)
        return left > 0 or self.take("unavailable")

    def put(self, key: str, data: bytes, *, only_if_absent: bool) -> bool:
        """Store an object; False if there is one that must be kept. Of calls at one time exactly one finds none."""
        with self.lock:
            if key in self.objects:
                if only_if_absent:
                    return False
                self.replaced.append(key)
            self.objects[key] = data
            return True

    def remove(self, key: str) -> None:
        with self.lock:
            self.removed.append(key)
            self.objects.pop(key, None)

    def names(self, query: dict[str, str], after: str = "") -> tuple[dict[str, bytes | None], bool]:
        """A page of the names below a prefix, each with its object, or None for what the names behind it begin with.

        Args:
            query: with ``prefix`` and ``delimiter``.
            after: the last name of the page before.

        Returns:
            The names in their order, and whether further ones follow.
        """
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        with self.lock:
            objects = sorted(self.objects.items())
        found: dict[str, bytes | None] = {}
        for key, data in objects:
            if key.startswith(prefix):
                head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                name = prefix + head + mark if mark else key
                if name > after:
                    found[name] = None if mark else data
        return dict(islice(found.items(), self.page)), len(found) > self.page
