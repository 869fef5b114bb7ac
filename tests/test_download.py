"""Downloads from a local server that breaks, lies and refuses."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data.annotations
import download
from data.annotations import find_annotation
from download import cached, fetch
from models.architecture import settings_of
from models.weights import read_source
from utils import UserError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
CHANGED = CONTENT[::-1] + b"more"


class Handler(BaseHTTPRequestHandler):
    """Serves /file, breaking the first connection halfway; counts what it was asked."""

    asked: list[str] = []
    breaks = 1
    tag = '"one"'

    def do_GET(self):  # noqa: N802
        start = self.headers.get("Range", "")
        Handler.asked.append(start)
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/malformed":
            return self.wfile.write(b"nonsense\r\n\r\n")
        if self.path == "/trickle":
            return self.trickle()
        if self.path in ("/endless", "/page.pth", "/silent", "/enormous"):
            return self.hostile()
        if self.headers.get("If-Range", Handler.tag) != Handler.tag:
            start = ""
        first = int(start.removeprefix("bytes=").rstrip("-") or 0)
        body = CONTENT[first:] if Handler.tag == '"one"' else CHANGED
        self.send_response(206 if start else 200)
        self.send_header("ETag", Handler.tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if Handler.breaks:
            Handler.breaks -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self.connection.close()
        return self.wfile.write(body)

    def trickle(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def hostile(self):
        """Bytes without end, a web page in place of a file, a file of a petabyte, or nothing at all."""
        if self.path == "/silent":
            return time.sleep(1)
        self.send_response(200)
        if self.path == "/page.pth":
            self.end_headers()
            return self.wfile.write(b"<!DOCTYPE html><html>Not here</html>")
        if self.path == "/enormous":
            self.send_header("Content-Length", str(2**50))
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    Handler.asked, Handler.breaks, Handler.tag = [], 1, '"one"'
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


def test_a_broken_connection_is_continued(server, tmp_path):
    path = fetch(f"{server}/file", tmp_path / "deep" / "file")
    assert path.read_bytes() == CONTENT
    assert Handler.asked[0] == "" and Handler.asked[1].startswith("bytes=") and len(Handler.asked) == 2
    assert int(Handler.asked[1][6:-1]) > 1_000_000  # what had come was kept
    fetch(f"{server}/file", path)
    assert len(Handler.asked) == 2  # nothing is asked for a file that is there


def test_one_of_many_threads_downloads(server):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(cached(f"{server}/file"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT and len(Handler.asked) == 2


def test_refusals(server, tmp_path):
    with pytest.raises(UserError, match=f"404 Not Found.*put it at {tmp_path}/a"):
        fetch(f"{server}/missing", tmp_path / "a")
    with pytest.raises(UserError, match="what came is no file"):
        fetch(f"{server}/file", tmp_path / "b", lambda path: "is no file")
    assert not list(tmp_path.glob("[ab]"))
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch("http://127.0.0.1:9/file", tmp_path / "c")


def test_a_server_that_breaks_always_leaves_what_came(server, tmp_path):
    Handler.breaks = 100
    with pytest.raises(UserError, match="connection broke after"):
        fetch(f"{server}/file", tmp_path / "d")
    assert not (tmp_path / "d").exists() and (tmp_path / "d.part").stat().st_size > 0


def test_halves_of_two_versions_are_not_joined(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(UserError):
        fetch(f"{server}/file", tmp_path / "e")
    Handler.tag = '"two"'  # the file changes before the next run
    assert fetch(f"{server}/file", tmp_path / "e").read_bytes() == CHANGED
    assert Handler.asked[1].startswith("bytes=")
    assert not list(tmp_path.glob("e.part*"))


def test_without_a_strong_tag_a_download_begins_anew(server, tmp_path):
    Handler.tag = 'W/"one"'
    assert fetch(f"{server}/file", tmp_path / "e").read_bytes() == CHANGED and Handler.asked == ["", ""]


def test_a_crawling_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match="slower than"):
        fetch(f"{server}/trickle", tmp_path / "f")
    assert time.monotonic() - began < 1.5


def test_an_endless_download_is_cut_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LARGEST_BYTES", 5_000_000)
    with pytest.raises(UserError, match="does not end: more than 5000000 bytes came"):
        fetch(f"{server}/endless", tmp_path / "g")
    assert Handler.asked == [""] and not list(tmp_path.glob("g*.part"))  # not tried again, and nothing is kept


def test_what_no_disk_can_hold_is_not_begun(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file may have more than"):
        fetch(f"{server}/enormous", tmp_path / "h")
    monkeypatch.setattr(download, "LARGEST_BYTES", 2**60)
    with pytest.raises(UserError, match="bytes are missing and the disk has .* free space"):
        fetch(f"{server}/enormous", tmp_path / "h")
    assert Handler.asked == ["", ""] and not list(tmp_path.glob("h*.part"))


def test_a_silent_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(UserError, match="timed out"):
        fetch(f"{server}/silent", tmp_path / "i")


def test_another_file_than_asked_for_is_not_kept(server, tmp_path, monkeypatch):
    for read in (read_source, settings_of):
        with pytest.raises(UserError, match="begins with b'<!DOCTYPE.*no checkpoint"):
            read(f"{server}/page.pth")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(data.annotations, "BASE_URL", f"{server}/")
    with pytest.raises(UserError, match=r"begins with b'<!DOCTYPE.*no JSON"):
        find_annotation(tmp_path, "page.pth")
    assert not (tmp_path / "page.pth").exists()


@pytest.mark.parametrize("url", ["{server}/malformed", "http://[x", "http://name:port/file", "http://a b/file"])
def test_bad_answers_and_addresses_are_told_in_one_line(server, url):
    with pytest.raises(UserError, match="could not be downloaded") as error:
        cached(url.format(server=server))
    assert "\n" not in str(error.value)
