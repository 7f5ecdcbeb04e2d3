"""Polite requests: what is asked again and when, what is not, and what the user is told."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm
from genossm.errors import FileError
from genossm.web import Patience, RefusedError, StoppedError, Web, _retry_after_s
from tests.portal_server import PortalServer, cut_off, hasty, redirect, status


@pytest.fixture
def server() -> Iterator[PortalServer]:
    with PortalServer() as portal:
        portal.files["/a"] = b"the answer"
        yield portal


def test_a_request_names_genossm_and_follows_redirections(server: PortalServer) -> None:
    server.faults["/moved"] = [redirect("/a")]
    assert Web(hasty([])).read(f"{server.url}/moved", accept="text/plain") == (200, b"the answer")
    for headers in (*server.asked("/moved"), *server.asked("/a")):
        assert headers["user-agent"].startswith(f"genossm/{genossm.__version__}")
        assert headers["accept"] == "text/plain"


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_later_and_later(
    server: PortalServer, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["/a"] = [status(code)] * 3
    slept: list[float] = []
    assert Web(hasty(slept)).read(f"{server.url}/a") == (200, b"the answer")
    assert slept == [0.5, 1.0, 2.0]
    assert f"{server.url}/a: the server answers {code}" in capsys.readouterr().err


def test_the_wait_is_jittered_and_bounded(server: PortalServer) -> None:
    server.faults["/a"] = [status(500)] * 9
    slept: list[float] = []
    patience = hasty(slept, attempts=10, longest_wait_s=5.0, random=lambda: 0.5)
    Web(patience).read(f"{server.url}/a")
    assert slept == [0.75, 1.5, 3.0, *[3.75] * 6]


def test_retry_after_is_honoured_in_seconds_and_as_a_date(server: PortalServer) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.faults["/a"] = [status(429, retry_after="7"), status(503, retry_after=soon)]
    slept: list[float] = []
    assert Web(hasty(slept, random=lambda: 0.25)).read(f"{server.url}/a")[0] == 200
    assert slept[0] == 7.25
    assert 90 < slept[1] < 101


def test_a_server_that_asks_to_wait_long_is_obeyed_by_ending(server: PortalServer) -> None:
    server.faults["/a"] = [status(429, retry_after="3600")]
    slept: list[float] = []
    with pytest.raises(FileError, match="asks to wait 3600 s; after that run the same command again"):
        Web(hasty(slept)).read(f"{server.url}/a")
    assert slept == []


@given(
    st.text(max_size=40)
    | st.from_regex(
        r"(Mon, )?[0-9]{1,12} Jan -?[0-9]{1,12} [0-9]{1,4}:[0-9]{1,12}:[0-9]{1,4} [+-]?[0-9]{1,12}",
        fullmatch=True,
    )
)
def test_any_retry_after_is_seconds_or_nothing(text: str) -> None:
    seconds = _retry_after_s(text)
    assert seconds is None or seconds >= 0


def test_a_server_that_stays_busy_is_given_up(server: PortalServer) -> None:
    server.faults["/a"] = [status(503)] * 99
    slept: list[float] = []
    with pytest.raises(
        FileError, match=r"/a: the server answers 503 Service Unavailable, 6 times in a row"
    ) as told:
        Web(hasty(slept)).read(f"{server.url}/a")
    assert not isinstance(told.value, RefusedError)
    assert len(server.asked("/a")) == 6
    assert len(slept) == 5


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_asked_again(server: PortalServer, code: int) -> None:
    server.faults["/a"] = [status(code)]
    with pytest.raises(
        RefusedError, match=rf"/a: the server answers {code} .*not there, or is not for everybody"
    ):
        Web(hasty([])).read(f"{server.url}/a")
    assert len(server.asked("/a")) == 1


def test_a_status_that_the_caller_knows_is_an_answer(server: PortalServer) -> None:
    server.faults["/a"] = [status(404)]
    assert Web(hasty([])).read(f"{server.url}/a", also=(404,)) == (404, b"an error page")


def test_a_body_that_ends_early_is_read_again(server: PortalServer) -> None:
    server.faults["/a"] = [cut_off(4)]
    assert Web(hasty([])).read(f"{server.url}/a") == (200, b"the answer")
    server.faults["/a"] = [cut_off(4)] * 9
    with pytest.raises(FileError, match="the connection ended after 4 of 10 bytes, 6 times in a row"):
        Web(hasty([])).read(f"{server.url}/a")


def test_no_network_is_a_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slept: list[float] = []
    with pytest.raises(
        FileError,
        match=r"no answer \(Connection refused\), 6 times in a row; check the network .*HTTPS_PROXY",
    ):
        Web(hasty(slept)).read(f"http://127.0.0.1:{port}/a")
    assert len(slept) == 5


def test_a_server_that_says_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(FileError, match=r"no answer \(timed out\), 2 times in a row"):
            Web(hasty([], attempts=2, timeout_s=0.05)).read(f"http://127.0.0.1:{port}/a")


def test_an_unknown_certificate_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(hasty([]))
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError(error)

    monkeypatch.setattr(web._opener, "open", refuse)
    with pytest.raises(
        FileError, match=r"certificate cannot be verified \(self-signed certificate\); set SSL_CERT"
    ):
        web.read("https://example.org/a")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://host/a",
        "http://",
        "http:///a",
        "https://a b/c",
        "http://h:port/",
        "https://[::1",
        "https://h/ä",
    ],
)
def test_only_web_addresses_are_asked(url: str) -> None:
    with pytest.raises(FileError, match="is no web address: https:// or http://, a host"):
        Web(hasty([])).read(url)


def test_the_size_of_a_file(server: PortalServer) -> None:
    web = Web(hasty([]))
    server.files["/empty"] = b""
    assert web.size(f"{server.url}/a") == 10
    assert web.size(f"{server.url}/empty") == 0
    server.ranges = False
    assert web.size(f"{server.url}/a") == 10
    with pytest.raises(RefusedError, match="answers 404"):
        web.size(f"{server.url}/none")


def test_requests_keep_a_pace(server: PortalServer) -> None:
    slept: list[float] = []
    web = Web(Patience(requests_per_s=0.01, sleep=slept.append))
    for _ in range(3):
        web.read(f"{server.url}/a")
    first, second = slept
    assert 50 < first <= 100 < 150 < second <= 200


def test_stop_ends_a_wait(server: PortalServer) -> None:
    server.faults["/a"] = [status(503, retry_after="500")]
    web = Web(Patience(requests_per_s=1000.0))
    threading.Timer(0.2, web.stop).start()
    start = time.monotonic()
    with pytest.raises(StoppedError):
        web.read(f"{server.url}/a")
    assert time.monotonic() - start < 5
    with pytest.raises(StoppedError):
        web.read(f"{server.url}/a")
