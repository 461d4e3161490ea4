"""A web server for archives whose connections fail on demand."""

import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import md5
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

PIECE = 4096


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one request.

    Attributes:
        after: bytes of the body that arrive.
        ending: then the connection is "reset", "closed", or "stalled" until the client leaves.
        status: instead of the file, with these headers.
        replacement: the file's content from now on.
    """

    after: int = 0
    ending: str = "closed"
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    replacement: bytes | None = None


@dataclass
class CrawlServer:
    """Files by their paths, and what becomes of the requests for them.

    Attributes:
        faults: of the next requests, one each.
        limit: bytes of the body after which every connection is closed.
        has_ranges: whether parts of a file are sent.
        stamps: of the headers that tell versions of a file, those that are sent.
        honours_conditions: whether a request for another version is answered with 412.
        requests: path and Range header of each request.
    """

    files: dict[str, bytes]
    url: str = ""
    faults: deque[Fault] = field(default_factory=deque)
    limit: int | None = None
    has_ranges: bool = True
    stamps: tuple[str, ...] = ("ETag", "Last-Modified")
    honours_conditions: bool = True
    has_length: bool = True
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    modified: dict[str, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def replace(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self.modified[path] = self.modified.get(path, 0) + 60

    def next_fault(self) -> Fault | None:
        with self.lock:
            return self.faults.popleft() if self.faults else None


@contextmanager
def serve(files: dict[str, bytes], tls: ssl.SSLContext | None = None) -> Iterator[CrawlServer]:
    """A server on this machine, while the context lasts."""
    server = CrawlServer(files)

    class Handler(_Handler):
        crawl = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        scheme = "http"
        if tls is not None:
            listening.socket = tls.wrap_socket(
                listening.socket, server_side=True, do_handshake_on_connect=False
            )
            scheme = "https"
        server.url = f"{scheme}://127.0.0.1:{listening.server_address[1]}"
        listening.daemon_threads = True
        thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    crawl: CrawlServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        crawl, self.path = self.crawl, urlsplit(self.path).path
        crawl.requests.append((self.path, self.headers.get("Range", "")))
        crawl.authorizations.append(self.headers.get("Authorization", ""))
        fault = crawl.next_fault()
        if fault is not None and fault.replacement is not None:
            crawl.replace(self.path, fault.replacement)
            fault = None
        if fault is not None and fault.status is not None:
            self._say(fault.status, dict(fault.headers))
        elif self.path in crawl.redirects:
            self._say(HTTPStatus.FOUND, {"Location": crawl.redirects[self.path]})
        elif self.path not in crawl.files:
            self._say(HTTPStatus.NOT_FOUND, {})
        elif crawl.honours_conditions and not self._is_wanted():
            self._say(HTTPStatus.PRECONDITION_FAILED, {})
        else:
            self._send(crawl.files[self.path], fault)
        self.close_connection = True

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _stamps(self) -> dict[str, str]:
        content, time = self.crawl.files[self.path], self.crawl.modified.get(self.path, 0)
        tag = f'"{md5(content).hexdigest()}"'
        stamps = {"ETag": tag, "Weak": f"W/{tag}", "Last-Modified": formatdate(time, usegmt=True)}
        return {
            name.replace("Weak", "ETag"): value
            for name, value in stamps.items()
            if name in self.crawl.stamps
        }

    def _is_wanted(self) -> bool:
        stamps = self._stamps()
        wanted = {"ETag": "If-Match", "Last-Modified": "If-Unmodified-Since"}
        return all(
            self.headers.get(condition, stamps.get(stamp)) == stamps.get(stamp)
            for stamp, condition in wanted.items()
        )

    def _send(self, content: bytes, fault: Fault | None) -> None:
        crawl, total = self.crawl, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = self._stamps()
        status = HTTPStatus.OK
        if asked and crawl.has_ranges:
            first = int(asked[1])
            if first >= total:
                self._say(416, headers | {"Content-Range": f"bytes */{total}"})
                return
            last = min(int(asked[2] or total - 1), total - 1)
            content, status = content[first : last + 1], HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if crawl.has_length:
            headers["Content-Length"] = str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(content, fault)

    def _send_body(self, content: bytes, fault: Fault | None) -> None:
        sent = content[: self.crawl.limit]
        if fault is not None:
            sent = sent[: fault.after]
        try:
            for start in range(0, len(sent), PIECE):
                self.wfile.write(sent[start : start + PIECE])
            if fault is not None and fault.ending == "stalled":
                self.rfile.read(1)
        except OSError:
            return  # the client has read enough
        if fault is not None and fault.ending == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
