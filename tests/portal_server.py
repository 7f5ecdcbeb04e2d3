"""A local HTTP server for the tests of fetch: it speaks as the ENCODE portal, serves files, and fails on demand."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from genossm.web import Patience

# A fault answers in the place of the server, and says whether it has done so.
Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]


class PortalServer:
    """Use as a context manager. `files` maps paths to contents, `graph` holds the portal's files.

    `faults[path]` is a list of faults, one for each of the next requests of that path. `requests` records
    (path with query, headers). With `ranges` off it knows no Range, with `etags` off it sends no ETag.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.graph: list[dict[str, Any]] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        self.ranges = True
        self.etags = True
        self.facets = True
        portal = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                portal.requests.append((self.path, {key.lower(): text for key, text in self.headers.items()}))
                portal.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> PortalServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_file(self, accession: str, content: bytes, **properties: Any) -> dict[str, Any]:
        """A file of the portal with its content; `properties` change or (None) remove what the portal says of it."""
        file_format = properties.get("file_format", "bed")
        name = f"{accession}{ {'bed': '.bed.gz', 'bigWig': '.bigWig', 'bam': '.bam'}[file_format] }"
        path = f"/files/{accession}/@@download/{name}"
        # The portal itself redirects to its store.
        self.files[f"/store/{name}"] = content
        self.faults[path] = [redirect(f"/store/{name}")] * 50
        entry = {
            "@id": f"/files/{accession}/",
            "@type": ["File", "Item"],
            "accession": accession,
            "href": path,
            "cloud_metadata": {"url": f"{self.url}/store/{name}"},
            "md5sum": hashlib.md5(content).hexdigest(),
            "file_size": len(content),
            "file_format": "bed",
            "file_format_type": "narrowPeak" if file_format == "bed" else None,
            "output_type": "IDR thresholded peaks" if file_format == "bed" else "fold change over control",
            "assembly": "GRCh38",
            "status": "released",
            "assay_title": "ATAC-seq",
            "biosample_ontology": {"term_name": "K562"},
            "dataset": "/experiments/ENCSR000AAA/",
            "biological_replicates": [1, 2],
            "preferred_default": True,
            "no_file_available": False,
        }
        entry |= properties
        entry = {key: value for key, value in entry.items() if value is not None}
        self.graph.append(entry)
        return entry

    def add_genome(self, name: str, fasta: bytes, sizes: bytes, *, md5sums: bool = True) -> None:
        """An assembly in UCSC's layout, its FASTA gzipped."""
        folder = f"/goldenPath/{name}/bigZips"
        files = {
            f"{name}.fa.gz": gzip.compress(fasta, mtime=0),
            f"{name}.2bit": b"2bit",
            f"{name}.chrom.sizes": sizes,
        }
        if md5sums:
            lines = [f"{hashlib.md5(content).hexdigest()}  {file}" for file, content in files.items()]
            files["md5sum.txt"] = "\n".join(lines).encode()
        self.files |= {f"{folder}/{file}": content for file, content in files.items()}

    def asked(self, path: str) -> list[Mapping[str, str]]:
        """The headers of every request for a path."""
        return [headers for asked, headers in self.requests if urlsplit(asked).path == path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one GET."""
        address = urlsplit(handler.path)
        is_search = address.path == "/search/"
        body = self._search(parse_qsl(address.query)) if is_search else self.files.get(address.path)
        if self.faults[address.path] and self.faults[address.path].pop(0)(handler, body or b""):
            return
        if body is None:
            send(handler, 404, b"<html>Not Found</html>")
        elif is_search:
            send(handler, 404 if b'"total": 0' in body else 200, body, {"Content-Type": "application/json"})
        else:
            self._send_file(handler, body)

    def _send_file(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        headers = {"ETag": etag} if self.etags else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        same = handler.headers.get("If-Range") in (None, etag)
        if asked is None or not self.ranges or not same:
            send(handler, 200, body, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        if start >= len(body):
            send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
        send(handler, 206, body[start : end + 1], headers)

    def _search(self, query: Iterable[tuple[str, str]]) -> bytes:
        wanted: dict[str, set[str]] = defaultdict(set)
        for key, value in query:
            wanted[key].add(value)
        fields = wanted.pop("field", set())
        limit = wanted.pop("limit", {"25"}).pop()
        assert wanted.pop("type") == {"File"}
        assert wanted.pop("format") == {"json"}

        def value_of(entry: Mapping[str, Any], key: str) -> str:
            value: Any = entry
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            return str(value).lower() if isinstance(value, bool) else str(value)

        found = [
            entry
            for entry in self.graph
            if all(value_of(entry, key) in values for key, values in wanted.items())
        ]
        roots = {field.split(".")[0] for field in fields} | {"@id", "@type"}
        shown = [{key: value for key, value in entry.items() if key in roots} for entry in found]
        counts: dict[str, int] = defaultdict(int)
        for entry in found:
            counts[entry.get("output_type", "")] += 1
        answer = {
            "@graph": shown if limit == "all" else shown[: int(limit)],
            "total": len(found),
            "notification": "Success" if found else "No results found",
        }
        if self.facets:
            terms = [{"key": key, "doc_count": count} for key, count in counts.items()]
            answer["facets"] = [{"field": "status", "terms": []}, {"field": "output_type", "terms": terms}]
        return json.dumps(answer).encode()


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    cut: int | None = None,
) -> None:
    """Send an answer; `cut`: only so many bytes of the announced body, then close."""
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body if cut is None else body[:cut])
    handler.close_connection = True


def redirect(path: str) -> Fault:
    """The fault that is none: the file is elsewhere, as on the portal."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        send(handler, 307, b"", {"Location": path})
        return True

    return answer


def status(code: int, **headers: str) -> Fault:
    """An error status, with headers (retry_after="3")."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        named = {key.replace("_", "-").title(): value for key, value in headers.items()}
        send(handler, code, b"an error page", named)
        return True

    return answer


def cut_off(at: int, *, etag: str | None = None) -> Fault:
    """The whole body is announced, and the connection closed after `at` bytes."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        send(handler, 200, body, {"ETag": etag or f'"{hashlib.sha1(body).hexdigest()}"'}, cut=at)
        return True

    return answer


def instead(content: bytes) -> Fault:
    """Another body, with status 200."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        send(handler, 200, content)
        return True

    return answer


def fine(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    """No fault for this request."""
    return False


def hasty(slept: list[float], **changes: Any) -> Patience:
    """Patience for tests: it notes in `slept` how long it would have waited."""
    values: dict[str, Any] = {
        "sleep": slept.append,
        "requests_per_s": math.inf,
        "random": lambda: 0.0,
        "timeout_s": 5.0,
    }
    return Patience(**(values | changes))


def tree(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
