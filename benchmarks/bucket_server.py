"""A server on loopback that answers like S3 after some milliseconds, out of a folder: as a process of its own.

The files' bytes go from the page cache to the socket, so that it is seldom slower than who reads from it.
``python -m benchmarks.bucket_server FOLDER SECONDS`` prints its port; the objects lie below ``store`` in any bucket.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_ABOUT = 'ETag: "1"\r\nLast-Modified: Fri, 27 Nov 2026 12:00:00 GMT\r\n'


def serve(folder: Path, seconds: float) -> None:
    """Answer for ever, each request after so many seconds, many at a time."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer_all, args=(connection, folder, seconds), daemon=True).start()


def _answer_all(connection: socket.socket, folder: Path, seconds: float) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError), connection, connection.makefile("rb") as lines:
        while request := lines.readline():
            headers = {}
            while (line := lines.readline().strip()) and b":" in line:
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            time.sleep(seconds)
            method, target, _ = request.decode().split()
            url = urlsplit(target)
            key = unquote(url.path).lstrip("/").partition("/")[2]
            if key:
                _answer_object(
                    connection, folder / key.removeprefix("store/"), headers.get("range", ""), is_head=method == "HEAD"
                )
            else:
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                _answer(connection, "200 OK", _listing(folder, query.get("prefix", "")))


def _answer(connection: socket.socket, status: str, data: bytes) -> None:
    connection.sendall(f"HTTP/1.1 {status}\r\n{_ABOUT}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def _answer_object(connection: socket.socket, path: Path, span: str, *, is_head: bool) -> None:
    if not path.is_file():
        _answer(connection, "404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")
        return
    with path.open("rb") as file:
        total = path.stat().st_size
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), min(int(last) + 1 if last else total, total)
        status = "206 Partial Content" if span else "200 OK"
        about = _ABOUT + (f"Content-Range: bytes {start}-{stop - 1}/{total}\r\n" if span else "")
        connection.sendall(f"HTTP/1.1 {status}\r\n{about}Content-Length: {stop - start}\r\n\r\n".encode())
        while not is_head and start < stop:
            start += os.sendfile(connection.fileno(), file.fileno(), start, stop - start)


def _listing(folder: Path, prefix: str) -> bytes:
    """What lies directly below a prefix that ends with a slash, in one page."""
    text, place = (
        "<Name>bucket</Name><IsTruncated>false</IsTruncated>",
        folder / prefix.removeprefix("store").lstrip("/"),
    )
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name) if place.is_dir() else []:
        if entry.is_dir():
            text += f"<CommonPrefixes><Prefix>{prefix}{entry.name}/</Prefix></CommonPrefixes>"
        else:
            text += f"<Contents><Key>{prefix}{entry.name}</Key><Size>{entry.stat().st_size}</Size><ETag>1</ETag>"
            text += "<LastModified>2026-11-27T12:00:00.000Z</LastModified></Contents>"
    return f"<ListBucketResult>{text}</ListBucketResult>".encode()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
