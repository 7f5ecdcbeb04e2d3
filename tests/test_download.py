"""Downloads: resumed, checked, asked for once; every fault of a server leaves a whole file or a `.part`."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genossm import download as module
from genossm.download import Downloaded, RemoteFile, download_all, md5_of
from genossm.errors import DataError, FileError
from genossm.progress import progress
from genossm.web import RefusedError, Web
from tests.portal_server import PortalServer, cut_off, fine, hasty, instead, send, status, tree

CONTENT = bytes(range(256)) * 5_000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[PortalServer]:
    with PortalServer() as portal:
        portal.files["/a.bin"] = CONTENT
        yield portal


def remote(server: PortalServer, **changes: Any) -> RemoteFile:
    """The file /a.bin with its md5 and size, unless changed."""
    values: dict[str, Any] = {
        "url": f"{server.url}/a.bin",
        "name": "deep/a.bin",
        "md5": MD5,
        "size": len(CONTENT),
    }
    return RemoteFile(**(values | changes))


def bring(
    folder: Path, *files: RemoteFile, slept: list[float] | None = None, **options: Any
) -> list[Downloaded]:
    return download_all(files, folder, web=Web(hasty([] if slept is None else slept)), **options)


def leave_half(server: PortalServer, folder: Path, file: RemoteFile, size: int = 1000) -> None:
    """A `.part` of `size` bytes, as a download leaves it whose server goes away."""
    server.faults["/a.bin"] = [cut_off(size), *[status(503)] * 9]
    with pytest.raises(FileError, match="run the same command again"):
        bring(folder, file)
    server.faults.clear()
    server.requests.clear()
    assert (folder / f"{file.name}.part").read_bytes() == CONTENT[:size]


def test_a_file_comes_whole_and_is_not_fetched_again(server: PortalServer, tmp_path: Path) -> None:
    file = remote(server)
    assert bring(tmp_path, file) == [Downloaded(file, MD5, len(CONTENT), True)]
    assert tree(tmp_path) == {"deep/a.bin"}
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT
    assert md5_of(tmp_path / "deep/a.bin") == MD5
    assert bring(tmp_path, file) == [Downloaded(file, MD5, len(CONTENT), False)]
    assert len(server.asked("/a.bin")) == 1


def test_a_file_without_md5_is_kept_by_the_one_it_had(server: PortalServer, tmp_path: Path) -> None:
    bring(tmp_path, remote(server, md5=None, size=None))
    assert not bring(tmp_path, remote(server, md5=None, size=None, local_md5=MD5))[0].fetched
    assert bring(tmp_path, remote(server, md5=None, size=None))[0].fetched
    assert len(server.asked("/a.bin")) == 2


@pytest.mark.parametrize("spoiled", [b"other", CONTENT[:-1] + b"x"])
def test_a_file_that_is_something_else_is_replaced(
    server: PortalServer, tmp_path: Path, spoiled: bytes
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.bin").write_bytes(spoiled)
    assert bring(tmp_path, remote(server))[0].fetched
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("etags", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(
    server: PortalServer, tmp_path: Path, etags: bool
) -> None:
    server.etags = etags
    server.faults["/a.bin"] = [cut_off(300_000), status(500), fine]
    slept: list[float] = []
    bring(tmp_path, remote(server), slept=slept)
    assert [headers.get("range") for headers in server.asked("/a.bin")] == [
        None,
        "bytes=300000-",
        "bytes=300000-",
    ]
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT
    assert tree(tmp_path) == {"deep/a.bin"}
    assert slept == [0.5, 1.0]


def test_the_next_run_goes_on_where_the_last_stopped(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server))
    assert tree(tmp_path) == {"deep/a.bin.part", "deep/a.bin.part.json"}
    bring(tmp_path, remote(server))
    (headers,) = server.asked("/a.bin")
    assert headers["range"] == "bytes=1000-"
    assert headers["if-range"] == f'"{hashlib.sha1(CONTENT).hexdigest()}"'
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_complete_part_is_only_checked(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server))
    (tmp_path / "deep/a.bin.part").write_bytes(CONTENT)
    bring(tmp_path, remote(server))
    assert server.requests == []
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_complete_part_of_unknown_size_is_told_by_the_server(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server, size=None))
    (tmp_path / "deep/a.bin.part").write_bytes(CONTENT)
    bring(tmp_path, remote(server, size=None))
    assert len(server.asked("/a.bin")) == 1
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_starts_again(server: PortalServer, tmp_path: Path) -> None:
    file = remote(server, md5=None, size=None)
    leave_half(server, tmp_path, file)
    server.files["/a.bin"] = changed = CONTENT[::-1]
    bring(tmp_path, file)
    assert [headers["range"] for headers in server.asked("/a.bin")] == ["bytes=1000-"]
    assert (tmp_path / "deep/a.bin").read_bytes() == changed


def test_a_part_with_another_md5_starts_again(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server, md5="0" * 32))
    bring(tmp_path, remote(server))
    assert [headers.get("range") for headers in server.asked("/a.bin")] == [None]
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_without_md5_and_validator_nothing_is_resumed(server: PortalServer, tmp_path: Path) -> None:
    file = remote(server, md5=None)
    leave_half(server, tmp_path, file)
    note = tmp_path / "deep/a.bin.part.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"validator": None}))
    bring(tmp_path, file)
    assert [headers.get("range") for headers in server.asked("/a.bin")] == [None]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}'])
def test_a_spoiled_note_means_starting_again(server: PortalServer, tmp_path: Path, text: str) -> None:
    leave_half(server, tmp_path, remote(server))
    (tmp_path / "deep/a.bin.part.json").write_text(text)
    bring(tmp_path, remote(server))
    assert [headers.get("range") for headers in server.asked("/a.bin")] == [None]
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_part_that_is_too_long_starts_again(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server))
    (tmp_path / "deep/a.bin.part").write_bytes(CONTENT + b"more")
    bring(tmp_path, remote(server))
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_server_without_range_starts_again(server: PortalServer, tmp_path: Path) -> None:
    server.ranges = False
    leave_half(server, tmp_path, remote(server))
    bring(tmp_path, remote(server))
    assert [headers.get("range") for headers in server.asked("/a.bin")] == ["bytes=1000-"]
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_server_that_always_breaks_off_at_one_place_is_given_up(
    server: PortalServer, tmp_path: Path
) -> None:
    server.ranges = False
    server.faults["/a.bin"] = [cut_off(1000)] * 99
    with pytest.raises(FileError, match="ended after 1000 of 1280000 bytes, 6 times in a row"):
        bring(tmp_path, remote(server))
    # The first failure came after new bytes; the five after it count with it.
    assert len(server.asked("/a.bin")) == 6


def test_a_server_that_breaks_off_again_and_again_but_further_is_not_given_up(
    server: PortalServer, tmp_path: Path
) -> None:
    def a_little(handler: Any, body: bytes) -> bool:
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        send(handler, 206 if start else 200, body[start:], headers, cut=80_000)
        return True

    server.faults["/a.bin"] = [a_little] * 15
    bring(tmp_path, remote(server))
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT
    assert len(server.asked("/a.bin")) == 16


def test_an_answer_with_other_bytes_than_asked_for_starts_again(server: PortalServer, tmp_path: Path) -> None:
    leave_half(server, tmp_path, remote(server))

    def from_the_start(handler: Any, body: bytes) -> bool:
        send(handler, 206, body, {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}"}, cut=0)
        return True

    server.faults["/a.bin"] = [from_the_start]
    bring(tmp_path, remote(server))
    assert [headers.get("range") for headers in server.asked("/a.bin")] == ["bytes=1000-", None]
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_part_of_a_changed_file_is_not_taken_from_a_server_that_ignores_if_range(
    server: PortalServer, tmp_path: Path
) -> None:
    file = remote(server, md5=None, size=None)
    leave_half(server, tmp_path, file)
    server.files["/a.bin"] = changed = CONTENT[::-1]

    def rest(handler: Any, body: bytes) -> bool:
        headers = {"Content-Range": f"bytes 1000-{len(body) - 1}/{len(body)}", "ETag": '"new"'}
        send(handler, 206, body[1000:], headers)
        return True

    server.faults["/a.bin"] = [rest]
    bring(tmp_path, file)
    assert [headers.get("range") for headers in server.asked("/a.bin")] == ["bytes=1000-", None]
    assert (tmp_path / "deep/a.bin").read_bytes() == changed


def test_a_wrong_md5_is_fetched_once_more(
    server: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["/a.bin"] = [instead(CONTENT[::-1])]
    assert bring(tmp_path, remote(server))[0].md5 == MD5
    wrong = hashlib.md5(CONTENT[::-1]).hexdigest()
    assert f"it has the md5 {wrong} instead of {MD5}; fetching it once more" in capsys.readouterr().err


def test_a_md5_that_stays_wrong_is_an_error_and_leaves_nothing(server: PortalServer, tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=rf"a\.bin: it has the md5 {MD5} instead of 0{{32}}, in two downloads"
    ):
        bring(tmp_path, remote(server, md5="0" * 32))
    assert len(server.asked("/a.bin")) == 2
    assert tree(tmp_path) == set()


def test_another_size_is_told_before_the_body_comes(server: PortalServer, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [instead(b"<html>maintenance</html>")] * 2
    with pytest.raises(RefusedError, match="it has 24 bytes instead of 1280000"):
        bring(tmp_path, remote(server))
    assert tree(tmp_path) == set()


def test_a_check_of_the_content_is_a_mismatch_too(server: PortalServer, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        raise DataError(f"{path.stat().st_size} bytes of nonsense")

    with pytest.raises(RefusedError, match=r"it is not what it should be \(1280000 bytes of nonsense\)"):
        bring(tmp_path, remote(server, check=check))
    assert tree(tmp_path) == set()


def test_an_empty_file(server: PortalServer, tmp_path: Path) -> None:
    server.files["/a.bin"] = b""
    file = remote(server, md5=hashlib.md5(b"").hexdigest(), size=0)
    assert bring(tmp_path, file)[0].size == 0
    assert (tmp_path / "deep/a.bin").read_bytes() == b""


def test_a_file_that_cannot_be_had_does_not_keep_the_others(server: PortalServer, tmp_path: Path) -> None:
    missing = RemoteFile(f"{server.url}/none.bin", "none.bin")
    done: list[str] = []
    with pytest.raises(
        RefusedError,
        match=r"1 of 2 files cannot be had; the others are complete: .*none.bin: the server answers 404",
    ):
        bring(tmp_path, missing, remote(server), done=lambda item: done.append(item.file.name))
    assert tree(tmp_path) == {"deep/a.bin"}
    assert done == ["deep/a.bin"]
    many = [RemoteFile(f"{server.url}/none{number}", f"none{number}") for number in range(8)]
    with pytest.raises(RefusedError, match=r"8 of 8 files cannot be had: .*; and 3 more$"):
        bring(tmp_path, *many)


def test_many_files_in_their_order(server: PortalServer, tmp_path: Path) -> None:
    files = []
    for number in range(30):
        content = bytes([number]) * (number * 1000)
        server.files[f"/{number}"] = content
        files.append(
            RemoteFile(f"{server.url}/{number}", f"{number}", hashlib.md5(content).hexdigest(), len(content))
        )
    results = bring(tmp_path, *files, jobs=4)
    assert [item.file for item in results] == files
    assert [item.size for item in results] == [number * 1000 for number in range(30)]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_the_bar_ends_full_whatever_happened(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    bars: list[Any] = []

    def recorded(**options: Any) -> Any:
        bars.append(progress(**options))
        return bars[-1]

    monkeypatch.setattr(module, "progress", recorded)
    server.faults["/a.bin"] = [cut_off(300_000, etag='"old"'), fine, instead(CONTENT[::-1])]
    leave = RemoteFile(f"{server.url}/a.bin", "b.bin", md5=None, size=size)
    bring(tmp_path, remote(server, size=size), leave)
    assert (bars[0].n, bars[0].total) == (2 * len(CONTENT), 2 * len(CONTENT))
    bring(tmp_path, remote(server, size=size))
    assert (bars[1].n, bars[1].total) == (len(CONTENT), len(CONTENT))


def test_two_files_of_one_name_are_refused(server: PortalServer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"two files would be written to deep/a\.bin: .*/a\.bin and .*/b\.bin"
    ):
        bring(tmp_path, remote(server), remote(server, url=f"{server.url}/b.bin"))
    assert server.requests == []


@pytest.mark.parametrize(
    "name", ["", "../a", "a/../b", "/etc/a", ".hidden", "a//b", "a/", "a b", "a\n", "ä", "-a"]
)
def test_a_name_never_leads_out_of_the_folder(name: str) -> None:
    with pytest.raises(DataError, match="letters, digits, '_', '-'"):
        RemoteFile("https://host/a", name)


def test_no_room_is_told_before_anything_comes(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(FileError, match=r"no room in .*: 1\.28MB are to come and 1\.00MB are free"):
        bring(tmp_path / "new", remote(server))
    assert server.requests == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.bin.part").write_bytes(CONTENT[:900_000])
    assert bring(tmp_path, remote(server))[0].fetched


def test_a_full_disk_is_a_sentence_and_keeps_the_part(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Web.pieces

    def full(self: Web, response: Any) -> Iterator[bytes]:
        yield next(pieces(self, response))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Web, "pieces", full)
    with pytest.raises(
        FileError, match=r"no space left on the disk for .*a\.bin\.part: free some, then run the same"
    ):
        bring(tmp_path, remote(server))
    assert tree(tmp_path) == {"deep/a.bin.part", "deep/a.bin.part.json"}
    monkeypatch.undo()
    bring(tmp_path, remote(server))
    assert server.asked("/a.bin")[-1]["range"] == f"bytes={256 * 1024}-"
    assert (tmp_path / "deep/a.bin").read_bytes() == CONTENT


def test_a_folder_that_may_not_be_written_is_a_sentence(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FileError, match=r"cannot write .*a\.bin\.part: Permission denied"):
        bring(tmp_path, remote(server))


def test_an_interrupt_leaves_parts_to_go_on_with(tmp_path: Path) -> None:
    # A process of its own gets Ctrl-C while a slow server sends.
    code = f"""
import sys
from pathlib import Path
from genossm.download import RemoteFile, download_all
from genossm.web import Web
files = [RemoteFile(sys.argv[1] + "/a.bin", "a.bin", {MD5!r}, {len(CONTENT)}), RemoteFile(sys.argv[1] + "/b.bin", "b.bin")]
try:
    download_all(files, Path(sys.argv[2]), web=Web())
except KeyboardInterrupt:
    print("interrupted")
"""
    with PortalServer() as server:
        server.files["/a.bin"] = server.files["/b.bin"] = CONTENT

        def slowly(handler: Any, body: bytes) -> bool:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            try:
                for start in range(0, len(body), 10_000):
                    handler.wfile.write(body[start : start + 10_000])
                    time.sleep(0.02)
            except OSError:  # the process has gone, as it should
                pass
            handler.close_connection = True
            return True

        server.faults["/a.bin"] = server.faults["/b.bin"] = [slowly] * 9
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        end = time.monotonic() + 20
        while not any(path.stat().st_size for path in tmp_path.glob("*.part")):
            assert time.monotonic() < end, "nothing came"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert out.decode().strip() == "interrupted"
        assert (tmp_path / "a.bin.part").stat().st_size < len(CONTENT)
        server.faults.clear()
        server.requests.clear()
        bring(tmp_path, remote(server, name="a.bin"))
        assert server.asked("/a.bin")[0]["range"].startswith("bytes=")
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
