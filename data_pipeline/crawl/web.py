"""Files on web servers: ranges of bytes (RFC 9110, section 14) of one version of a file."""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import requests
import urllib3

from data_pipeline.crawl.transfer import MissingError, RefusedError, TransferError, Version

READ_BYTES = 1 << 18
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")
GONE = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
PASSING = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


def probe(url: str, silence: float) -> Version:
    """The file as it is now, and whether the server sends parts of it."""
    with _answer(url, "bytes=0-0", None, silence) as answer:
        return _version(answer)


def read_from(url: str, start: int, version: Version, silence: float) -> Iterator[bytes]:
    """The file from byte `start` on; a server that sends no parts sends what precedes it, too."""
    with _answer(url, f"bytes={start}-", version, silence) as answer:
        version.require(_version(answer))
        skip = start - _first_byte(answer)
        if skip < 0:
            raise RefusedError(f"the server answered with other bytes than those from {start} on")
        while block := _read(answer):
            yield block[skip:]
            skip = max(0, skip - len(block))


@contextmanager
def _answer(
    url: str, byte_range: str, version: Version | None, silence: float
) -> Iterator[requests.Response]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "farspan", "Range": byte_range}
    if version is not None and version.has_strong_etag:
        headers["If-Match"] = str(version.etag)
    elif version is not None and version.last_modified is not None:
        headers["If-Unmodified-Since"] = version.last_modified
    with requests.Session() as session:
        try:
            answer = session.get(url, headers=headers, stream=True, timeout=silence)
        except requests.RequestException as error:
            cause = _cause(error)
            is_passing = isinstance(error, requests.ConnectionError | requests.Timeout)
            if not is_passing or isinstance(cause, ssl.SSLCertVerificationError):
                raise RefusedError(_in_words(cause)) from error
            raise TransferError(_in_words(cause)) from error
        with answer:
            _require_success(answer, version)
            yield answer


def _require_success(answer: requests.Response, version: Version | None) -> None:
    status = answer.status_code
    is_empty = status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and version is None
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT) or is_empty:
        return
    what = f"HTTP status {status} {answer.reason or ''}".rstrip()
    if version is not None and status in (
        HTTPStatus.PRECONDITION_FAILED,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        raise RefusedError(f"the file has changed: {version} are there no more ({what})")
    wait = _retry_after(answer)
    # Common Crawl and S3 answer so to whom they have served before, and throttle now.
    is_throttled = status == HTTPStatus.FORBIDDEN and (version is not None or wait > 0)
    if status in PASSING or is_throttled:
        raise TransferError(what, wait)
    if status in GONE:
        raise MissingError(f"no such file ({what})")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise RefusedError(
            f"{what}: it is not there, not yours to read, or you have asked too often; see whether "
            "the address opens in a browser, and try again later"
        )
    raise RefusedError(what)


def _version(answer: requests.Response) -> Version:
    has_ranges = answer.status_code != HTTPStatus.OK
    if has_ranges:
        match = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        size = match[2] if match else ""
    else:
        size = answer.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise RefusedError(
            "the server does not say how long the file is, so an end of it cannot be told from a "
            "broken connection; download it and name the local file"
        )
    etag, modified = (answer.headers.get(name) for name in ("ETag", "Last-Modified"))
    version = Version(int(size), etag, modified, has_ranges)
    if version.has_strong_etag:
        return Version(int(size), etag, None, has_ranges)
    if modified is None:
        raise RefusedError(
            "the server sends neither a strong ETag nor Last-Modified, so a change of the file "
            "between two requests would go unnoticed; download it and name the local file"
        )
    return version


def _first_byte(answer: requests.Response) -> int:
    match = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    is_part = answer.status_code == HTTPStatus.PARTIAL_CONTENT and match is not None and match[1]
    return int(match[1]) if is_part and match else 0


def _read(answer: requests.Response) -> bytes:
    """What has arrived, so that nothing of it is lost when the connection breaks."""
    try:
        block: bytes = answer.raw.read1(READ_BYTES, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise TransferError(_in_words(_cause(error))) from error
    return block


def _retry_after(answer: requests.Response) -> float:
    """Seconds to wait (RFC 9110, section 10.2.3); 0 where the server names none."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _cause(error: BaseException) -> BaseException:
    """What lies at the bottom of the errors that requests and urllib3 wrap about one another."""
    for cause in (getattr(error, "reason", None), *error.args, error.__cause__):
        if isinstance(cause, BaseException):
            return _cause(cause)
    return error


def _in_words(error: BaseException) -> str:
    """Without the URL that some messages repeat: it may hold a password."""
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError):
        return "nothing arrived for too long"
    if isinstance(error, urllib3.exceptions.IncompleteRead):
        return "the connection ended early"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^\w+\(.*?\): ", "", str(error)) or type(error).__name__
