"""Polite requests over HTTP: they take turns, wait when a server is busy, and end when told to."""

from __future__ import annotations

import http.client
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from genossm import __version__
from genossm.errors import FileError
from genossm.progress import say

T = TypeVar("T")
Response = http.client.HTTPResponse | urllib.error.HTTPError

GO_ON = "run the same command again: complete files are kept, and half ones go on where they stopped"
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how fast servers are asked.

    `attempts` failures in a row end it. Between them it waits `first_wait_s`, doubled each time up to
    `longest_wait_s`, less a random part; or what the server's Retry-After says, unless that is longer than
    `longest_retry_after_s`. `sleep` takes the place of the waiting in tests (None: a wait that `Web.stop` ends).
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 600.0
    timeout_s: float = 30.0
    requests_per_s: float = 5.0
    sleep: Callable[[float], None] | None = None
    random: Callable[[], float] = random.random


class RefusedError(FileError):
    """One file cannot be had from a server that answers; others may be."""


class TryAgainError(Exception):
    """A failure that may pass, for `Web.patiently`; `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class StoppedError(Exception):
    """`Web.stop` was called."""


class Web:
    """Requests from any number of threads, at the pace and with the repetitions of one `Patience`."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self._opener = urllib.request.build_opener()
        self._turns = threading.Lock()
        self._next_turn = 0.0
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End what is under way at its next piece, and all waiting; nothing can be asked for afterwards."""
        self._stopping.set()

    def read(self, url: str, *, accept: str = "*/*", also: Iterable[int] = ()) -> tuple[int, bytes]:
        """Status and body of a small answer; the error statuses in `also` are answers too.

        Raises:
            RefusedError: the server refuses.
            FileError: it cannot be reached, or stays busy.
        """

        def attempt() -> tuple[int, bytes]:
            with self.ask(url, {"Accept": accept}, also) as response:
                return response.status or 0, b"".join(self.pieces(response))

        return self.patiently(url, attempt)

    def size(self, url: str) -> int | None:
        """Bytes of a file, from an answer to a request for its first byte; None where the server does not say.

        Raises:
            RefusedError: the server has no such file.
            FileError: it cannot be reached, or stays busy.
        """

        def attempt() -> int | None:
            # No HEAD: addresses that are signed for GET refuse it.
            with self.ask(url, {"Range": "bytes=0-0"}, also=(416,)) as response:
                if response.status == 200:
                    return content_length(response)
                return content_range(response)[1]

        return self.patiently(url, attempt)

    def ask(self, url: str, headers: Mapping[str, str], also: Iterable[int] = ()) -> Response:
        """The open answer to one request, to be closed by the caller; redirections are followed.

        Raises:
            TryAgainError: no answer, or one that says that the server is busy.
            RefusedError: the server refuses.
            FileError: the address or the server's certificate is not acceptable.
        """
        if re.fullmatch(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[!-~]*)?", url) is None:
            raise FileError(
                f"{url!r} is no web address: https:// or http://, a host, a path in plain characters"
            )
        self._take_turn()
        agent = f"genossm/{__version__} (Python urllib)"
        request = urllib.request.Request(url, headers={"User-Agent": agent, **headers})
        try:
            answer: Response = self._opener.open(request, timeout=self.patience.timeout_s)
            return answer
        except urllib.error.HTTPError as error:
            if error.code in also:
                return error
            error.close()
            what = f"the server answers {error.code} {error.reason}".rstrip()
            if error.code in _BUSY:
                raise TryAgainError(what, _retry_after_s(error.headers.get("Retry-After"))) from None
            raise RefusedError(f"{_shown(url)}: {what}: it is not there, or is not for everybody") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise FileError(
                    f"{_shown(url)}: the server's certificate cannot be verified ({reason.verify_message}); set "
                    "SSL_CERT_FILE to the certificates of your system or proxy"
                ) from error
            raise TryAgainError(f"no answer ({_short(reason)})") from error

    def pieces(self, response: Response) -> Iterator[bytes]:
        """The body of an answer, piece by piece.

        Raises:
            TryAgainError: it ends before its Content-Length, or the connection breaks.
        """
        expected, received = content_length(response), 0
        while True:
            if self._stopping.is_set():
                raise StoppedError
            try:
                piece = response.read(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise TryAgainError(f"the connection broke ({_short(error)})") from error
            if not piece:
                break
            received += len(piece)
            yield piece
        if expected is not None and received < expected:
            raise TryAgainError(f"the connection ended after {received} of {expected} bytes")

    def patiently(self, url: str, attempt: Callable[[], T], gained: Callable[[], int] = lambda: 0) -> T:
        """The result of `attempt`, repeated while it raises TryAgainError; failures after which `gained()` has
        grown do not count as failures in a row.

        Raises:
            FileError: too many failures, or the server asks to wait too long.
        """
        failures, most = 0, gained()
        while True:
            try:
                return attempt()
            except TryAgainError as error:
                if gained() > most:
                    failures, most = 0, gained()
                failures += 1
                if (error.wait_s or 0) > self.patience.longest_retry_after_s:
                    raise FileError(
                        f"{_shown(url)}: {error}, and asks to wait {error.wait_s:.0f} s; after that {GO_ON}"
                    ) from error
                if failures >= self.patience.attempts:
                    raise FileError(
                        f"{_shown(url)}: {error}, {failures} times in a row; check the network (behind a proxy, "
                        f"HTTPS_PROXY), then {GO_ON}"
                    ) from error
                wait_s = self._backoff_s(failures, error.wait_s)
                say(f"{_shown(url)}: {error}; again in {wait_s:.0f} s")
                self._sleep(wait_s)

    def _backoff_s(self, failures: int, asked_s: float | None) -> float:
        if asked_s is not None:
            return asked_s + self.patience.random()
        wait_s = min(self.patience.first_wait_s * 2.0 ** (failures - 1), self.patience.longest_wait_s)
        return wait_s * (0.5 + 0.5 * self.patience.random())

    def _take_turn(self) -> None:
        with self._turns:
            now = time.monotonic()
            turn = max(now, self._next_turn)
            self._next_turn = turn + 1 / self.patience.requests_per_s
        self._sleep(turn - now)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            (self.patience.sleep or self._stopping.wait)(seconds)
        if self._stopping.is_set():
            raise StoppedError


def content_length(response: Response) -> int | None:
    """Bytes of the body, None where the server does not say."""
    text = (response.headers.get("Content-Length") or "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def content_range(response: Response) -> tuple[int | None, int | None]:
    """(first byte of the body, bytes of the whole file), each None where the server does not say."""
    text = (response.headers.get("Content-Range") or "").strip()
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", text, flags=re.ASCII)
    if match is None:
        return None, None
    first, whole = match.groups()
    return None if first is None else int(first), None if whole is None else int(whole)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; None where it has neither."""
    text = (text or "").strip()
    if re.fullmatch(r"\d{1,9}", text, flags=re.ASCII):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        return max(0.0, (aware - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def _shown(url: str, most: int = 250) -> str:
    """An address for a message: of a long search the beginning."""
    return url if len(url) <= most else f"{url[:most]}..."


def _short(error: object) -> str:
    """What an exception of the network says, in one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())
