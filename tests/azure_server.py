"""The tests' own server, as a container of Azure: other listings, other deletions, and 409 for a name that is taken."""

from __future__ import annotations

import re
from email.utils import formatdate
from urllib.parse import unquote
from xml.sax.saxutils import escape

from s3_bucket import Bucket
from s3_server import Handler


class AzureHandler(Handler):
    taken = 409, "BlobAlreadyExists"

    def serve(self, key: str, query: dict[str, str], body: bytes) -> None:
        if query.get("comp") == "list":
            self.answer(200, listing(self.bucket, query))
        elif query.get("comp") == "batch":
            self.delete(body)
        else:
            super().serve(key, query, body)

    def delete(self, body: bytes) -> None:
        """Answer each of the requests that the parts of the body are."""
        answers = b""
        for number, path in enumerate(re.findall(rb"DELETE /bucket/(\S+) HTTP", body)):
            key = unquote(path.decode())
            code = b"202 Accepted" if key in self.bucket.objects else b"404 The specified blob does not exist."
            self.bucket.remove(key)
            answers += b"--b\r\nContent-Type: application/http\r\nContent-ID: %d\r\n\r\n" % number
            answers += b"HTTP/1.1 %s\r\nx-ms-request-id: 1\r\n\r\n" % code
        self.answer(202, answers + b"--b--\r\n", {"Content-Type": "multipart/mixed; boundary=b"})


def listing(bucket: Bucket, query: dict[str, str]) -> bytes:
    """A page of a listing, by the query of ``List Blobs``."""
    page, has_more = bucket.names(query, query.get("marker", ""))
    blobs, marker = "".join(about(bucket, *item) for item in page.items()), [*page][-1] if has_more else ""
    text = f"<Blobs>{blobs}</Blobs><NextMarker>{escape(marker)}</NextMarker>"
    return f"<EnumerationResults>{text}</EnumerationResults>".encode()


def about(bucket: Bucket, name: str, data: bytes | None) -> str:
    if data is None:
        return f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>"
    values = {
        "Last-Modified": formatdate(bucket.objects.written[name], usegmt=True),
        "Content-Length": str(len(data)),
        "Content-Type": "application/octet-stream",
        "Etag": bucket.objects.etags[name],
    }
    properties = "".join(f"<{one}>{escape(value)}</{one}>" for one, value in values.items())
    return f"<Blob><Name>{escape(name)}</Name><Properties>{properties}</Properties></Blob>"
