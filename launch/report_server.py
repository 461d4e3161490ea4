"""A web server for one page: the report of runs, and what changes of it."""

import errno
import getpass
import gzip
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from launch.live_report import LiveReport
from launch.report import NamedRun
from pretrain.errors import UserError

# A client that stands still does not keep its thread for ever.
SOCKET_TIMEOUT_S = 30.0
GZIP_LEVEL = 1


def serve_report(runs: Sequence[NamedRun], host: str, port: int) -> None:
    """Serve the report of runs until ctrl-C or SIGTERM.

    Args:
        port: 0 takes one that is free.

    Raises UserError: the address cannot be used.
    """
    server = open_server(LiveReport(runs), host, port)
    stop = threading.Event()
    reader = threading.Thread(target=server.report.follow, args=(stop,), daemon=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server, suppress(KeyboardInterrupt):
        print("\n".join(_how_to_open(runs, host, server.server_port)), flush=True)
        reader.start()
        server.serve_forever()
    stop.set()


def open_server(report: LiveReport, host: str, port: int) -> "ReportServer":
    """Raises UserError: the address cannot be used."""
    try:
        return ReportServer((host, port), report)
    except socket.gaierror:
        raise UserError(
            f"--host {host}: there is no such address; 127.0.0.1 serves this machine alone"
        ) from None
    except OverflowError:
        raise UserError(f"--port {port}: a port is a number from 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use, maybe by another `farspan report --serve`: "
                "name another one, or let --port 0 find one that is free"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"--host {host}: this machine has no such address; 127.0.0.1 serves this machine "
                "alone, 0.0.0.0 all its networks"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(
                f"--port {port}: only root may use ports below 1024; name a higher one"
            ) from None
        raise


def _how_to_open(runs: Sequence[NamedRun], host: str, port: int) -> list[str]:
    names = ", ".join(run.name for run in runs)
    is_everywhere = host in ("0.0.0.0", "::")
    shown = socket.gethostname() if is_everywhere else f"[{host}]" if ":" in host else host
    lines = [f"following {names}: http://{shown}:{port}   (ctrl-C ends it)"]
    if not _is_loopback(host):
        lines.append(
            "warning: whoever reaches this port sees metrics, settings and samples of the data"
        )
    login = os.environ.get("SLURM_SUBMIT_HOST")
    jump = f"-J {login} " if login and login != socket.gethostname() else ""
    lines += [
        f"if you sit at another machine, run there, and open http://127.0.0.1:{port} :",
        f"  ssh -N -L {port}:{shown}:{port} {jump}{getpass.getuser()}@{socket.gethostname()}",
    ]
    return lines


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


class ReportServer(ThreadingHTTPServer):
    """Answers `/` with the page and `/changes` with what is new of it; nothing else."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], report: LiveReport) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self.report = report
        self._names = {"localhost", socket.gethostname().lower(), address[0].lower()}

    def is_called(self, name: str) -> bool:
        return name in self._names or name == self._full_name

    @cached_property
    def _full_name(self) -> str:
        # Takes long without a DNS.
        return socket.getfqdn().lower()

    def server_bind(self) -> None:
        # That of HTTPServer asks for the name of the address, which takes long without a DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        if not self._is_addressed():
            self._send(
                HTTPStatus.FORBIDDEN,
                "text/plain",
                "this server answers to localhost, to the name of its machine and to addresses; "
                "open the page by one of them",
            )
            return
        try:
            answer = self._answer(urlsplit(self.path))
        except Exception as error:
            traceback.print_exc()
            answer = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error!r} (see its terminal)"
        self._send(*answer)

    def _answer(self, url: SplitResult) -> tuple[HTTPStatus, str, str]:
        if url.path == "/":
            return HTTPStatus.OK, "text/html", self.server.report.page()
        if url.path == "/changes":
            since = parse_qs(url.query).get("since", [""])[0]
            changes = self.server.report.changes(since)
            return HTTPStatus.OK, "application/json", json.dumps(changes)
        return HTTPStatus.NOT_FOUND, "text/plain", "there is one page, /"

    def _is_addressed(self) -> bool:
        """A foreign page can make a name of its own point here (DNS rebinding), but no address."""
        with suppress(ValueError):
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            return _is_address(name) or self.server.is_called(name)
        return False

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, GZIP_LEVEL)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each request would bury where the page is."""
