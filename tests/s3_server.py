"""A small server on loopback that speaks enough of S3 for a store: GET with ranges, HEAD, listings, PUT, bulk delete.
It understands what obstore says to Google's buckets too; `azure_server` understands what it says to Azure's.

It can answer late, and fail in the ways that `Bucket` lists. Uploads in parts and copies are refused by 501: a store
needs neither, since obstore makes neither conditional.

What obstore 0.12 (object_store 0.14) does about ``put(..., mode="create")``; `test_s3_server` shows each:

- It is one PUT with a Content-Length and ``If-None-Match: *``, whatever the size and whatever `use_multipart` says;
  the buffers of a list are sent one after the other. Neither chunks nor ``Expect``.
- A lost answer (the object is stored, the connection ends): it sends the PUT again, up to `max_retries` times, 10 by
  default, gets 412 for its own object, and raises AlreadyExistsError. Only reading the object tells who wrote it.
- 409 ConditionalRequestConflict, which S3 answers where two creations meet: AlreadyExistsError at once, by no retry,
  although there may be no object.
- An answer that is later than `timeout`, 30 s by default: GenericError by no retry, although the object may be stored.
- 5xx, of which 501 is one: sent again like a broken connection, then GenericError.
- A server that ignores the condition overwrites, and nothing is raised.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import pytest
from s3_bucket import Bucket

__all__ = ["Bucket", "reached", "serving", "serving_moto"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the acknowledgement of its headers
    taken = 412, "PreconditionFailed"
    bucket: Bucket

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_request(self) -> None:
        bucket, url = self.bucket, urlsplit(self.path)
        key = unquote(url.path).removeprefix("/bucket").lstrip("/")
        bucket.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        time.sleep(bucket.latency)
        self.key = key
        bucket.before(self.command, key)
        size = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and bucket.take("broken_uploads"):
            self.rfile.read(size // 2)
            self.hang_up()
            return
        body = self.rfile.read(size)
        if len(body) < size:  # the client is gone
            self.close_connection = True
        elif bucket.is_busy(self.command):
            self.fail(503, "SlowDown")
        elif self.command in bucket.denied:
            self.fail(403, "AccessDenied")
        else:
            self.serve(key, dict(parse_qsl(url.query, keep_blank_values=True)), body)

    do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

    def serve(self, key: str, query: dict[str, str], body: bytes) -> None:
        bucket = self.bucket
        if self.command == "PUT" and not query and "x-amz-copy-source" not in self.headers:
            self.put(key, body)
        elif self.command == "POST" and "delete" in query:
            keys = [element.text or "" for element in ET.fromstring(body).iter() if element.tag.endswith("Key")]
            for one in keys:
                bucket.remove(one)
            deleted = "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in keys)
            self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        elif self.command == "DELETE" and not query:
            bucket.remove(key)
            self.answer(204, b"")
        elif self.command not in ("GET", "HEAD"):
            self.fail(501, "NotImplemented")
        elif not key:
            self.answer(200, listing(bucket, query))
        else:
            self.get(key)

    def put(self, key: str, body: bytes) -> None:
        bucket, condition = self.bucket, self.headers.get("If-None-Match")
        if self.headers.get("x-goog-if-generation-match") == "0":  # what gs:// says
            condition = "*"
        if self.headers.get("x-amz-content-sha256") not in (None, "UNSIGNED-PAYLOAD", sha256(body).hexdigest()):
            self.fail(400, "XAmzContentSHA256Mismatch")  # a buffer was changed while it was sent
        elif condition and bucket.conditions == "refused":
            self.fail(501, "NotImplemented")
        elif condition and bucket.take("conflicts"):
            self.fail(409, "ConditionalRequestConflict")
        elif bucket.put(key, body, only_if_absent=condition == "*" and bucket.conditions == "honoured"):
            self.answer(200, b"", {"ETag": bucket.objects.etags[key]})
        else:
            self.fail(*self.taken)

    def get(self, key: str) -> None:
        bucket = self.bucket
        with bucket.lock:
            data = bucket.objects.get(key)
        if data is None:
            self.fail(404, "NoSuchKey")
            return
        about = {
            "ETag": bucket.objects.etags[key],
            "Last-Modified": formatdate(bucket.objects.written[key], usegmt=True),
        }
        span, total = self.headers.get("Range"), len(data)
        if not span:
            self.answer(200, data, about)
            return
        first, last = span.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, total - int(last))
        if start >= total:
            self.fail(416, "InvalidRange")
            return
        part = data[start : int(last) + 1 if first and last else total]
        self.answer(206, part, {**about, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{total}"})

    def fail(self, code: int, name: str) -> None:
        self.answer(code, f"<Error><Code>{name}</Code></Error>".encode())

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        if code < 300:
            self.bucket.after(self.command, self.key)
        if self.command in ("PUT", "POST") and code == 200 and self.bucket.take("lost_answers"):
            self.hang_up()
            return
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if code == 206 and self.bucket.take("broken"):
            self.wfile.write(data[: len(data) // 2])
            self.hang_up()
            return
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def listing(bucket: Bucket, query: dict[str, str]) -> bytes:
    """A page of a listing, by the query of ``ListObjectsV2``."""
    page, has_more = bucket.names(query, query.get("continuation-token", query.get("start-after", "")))
    text = f"<Name>bucket</Name><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(has_more).lower()}</IsTruncated>"
    if has_more:
        text += f"<NextContinuationToken>{escape([*page][-1])}</NextContinuationToken>"
    for name, data in page.items():
        if data is None:
            text += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        else:
            written = datetime.fromtimestamp(bucket.objects.written[name], timezone.utc)
            about = f"<Size>{len(data)}</Size><ETag>{escape(bucket.objects.etags[name])}</ETag>"
            about += f"<LastModified>{written:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            text += f"<Contents><Key>{escape(name)}</Key>{about}</Contents>"
    return f"<ListBucketResult>{text}</ListBucketResult>".encode()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are killed, and go on."""


@contextmanager
def reached(url: str) -> Iterator[None]:
    """In the block the environment says that the buckets of ``s3://``, ``gs://`` and ``az://`` lie at a server."""
    from activation_extractor import _storage

    aws = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "us-east-1"}
    key = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    azure = {"ENDPOINT": url, "STORAGE_ACCOUNT_NAME": "x", "STORAGE_ACCOUNT_KEY": "eQ=="}
    values = {"AWS": aws, "GOOGLE": {"SERVICE_ACCOUNT_KEY": json.dumps(key)}, "AZURE": azure}
    with pytest.MonkeyPatch.context() as patch:
        for kind, settings in values.items():
            for name, value in {**settings, "ALLOW_HTTP": "true"}.items():
                patch.setenv(f"{kind}_{name}", value)
        _storage._opened.cache_clear()
        yield
    _storage._opened.cache_clear()


@contextmanager
def serving(handler: type[Handler] = Handler) -> Iterator[tuple[Bucket, str]]:
    """A bucket that is served, and the URL of the server."""
    bucket = Bucket()
    server = Server(("127.0.0.1", 0), type("BucketHandler", (handler,), {"bucket": bucket}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


MOTO = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


@contextmanager
def serving_moto() -> Iterator[str]:
    """The URL of moto's server, which others use to test what they do with S3. Its process ends with the block."""
    command = [sys.executable, "-c", MOTO]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        url = process.stdout.readline().strip()
        assert url, "moto's server did not start"
        try:
            yield url
        finally:
            process.kill()
