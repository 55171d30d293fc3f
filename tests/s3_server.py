"""A small server on loopback that speaks enough of S3 to read from: GET with ranges, HEAD, and listings in pages.

It can answer late, and fail: with 503, with a connection that breaks, or since an object is gone.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Bucket:
    """The objects of the bucket ``bucket``, and what was asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.latency, self.page, self.broken, self.unavailable = 0.0, 1000, 0, 0

    def add(self, folder: Path, prefix: str) -> None:
        """The files of a folder as objects below a prefix."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        bucket, url = self.bucket, urlsplit(self.path)
        bucket.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        time.sleep(bucket.latency)
        if bucket.unavailable:
            bucket.unavailable -= 1
            self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return
        key = unquote(url.path).removeprefix("/bucket").lstrip("/")
        if not key:
            self.answer(200, self.listing({name: values[0] for name, values in parse_qs(url.query).items()}))
        elif key not in bucket.objects:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.answer_object(bucket.objects[key])

    def answer_object(self, data: bytes) -> None:
        span, total = self.headers.get("Range"), len(data)
        if not span:
            self.answer(200, data)
            return
        start, stop = (int(end) for end in span.removeprefix("bytes=").split("-"))
        if start >= total:
            self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return
        part = data[start : stop + 1]
        self.answer(206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{total}"})

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        about = {"ETag": '"1"', "Last-Modified": "Fri, 27 Nov 2026 12:00:00 GMT", **(headers or {})}
        for name, value in {**about, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.bucket.broken and code == 206:
            self.bucket.broken -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)

    def listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, int | None] = {}
        for key in sorted(self.bucket.objects):
            if key.startswith(prefix):
                head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                found[prefix + head + mark if mark else key] = None if mark else len(self.bucket.objects[key])
        names = [name for name in found if name > query.get("continuation-token", "")]
        page = names[: self.bucket.page]
        text = f"<Name>bucket</Name><KeyCount>{len(page)}</KeyCount>"
        text += f"<IsTruncated>{str(len(page) < len(names)).lower()}</IsTruncated>"
        if len(page) < len(names):
            text += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        for name in page:
            if found[name] is None:
                text += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            else:
                text += f"<Contents><Key>{escape(name)}</Key><Size>{found[name]}</Size><ETag>1</ETag>"
                text += "<LastModified>2026-11-27T12:00:00.000Z</LastModified></Contents>"
        return f"<ListBucketResult>{text}</ListBucketResult>".encode()


@contextmanager
def serving() -> Iterator[tuple[Bucket, str]]:
    """A bucket that is served, and the URL of the server."""
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BucketHandler", (Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
