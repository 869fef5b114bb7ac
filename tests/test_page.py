"""The web page, started by its command and used through a browser, and by many people at once."""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from demo import app
from miniature.scene import draw_scene, render
from miniature.text import caption_is_exact

ROOT = Path(__file__).parent.parent
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images with one object each, and their scenes."""
    folder = tmp_path_factory.mktemp("uploads")
    scenes = [draw_scene(random.Random(seed), 1) for seed in range(3)]
    for number, scene in enumerate(scenes):
        render(scene, 256).save(folder / f"{number}.png")
    return folder, scenes


@pytest.fixture(scope="module")
def page(images):
    """The page, started as people start it; its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "demo.app", "--port", str(port), "--folder", str(images[0])]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=1)
            break
        except OSError:
            assert process.poll() is None, "the page ended"
            time.sleep(0.2)
    yield url, process
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def address(page):
    return page[0]


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        assert os.environ.get("BLIP_BROWSER") != "required", "the tests need chromium and chromium-driver"
        pytest.skip("no browser here: install chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
                     "--no-first-run", "--disable-background-networking", "--disable-component-update",
                     "--disable-sync", f"--user-data-dir={profile}", "--window-size=1300,1300"):  # fmt: skip
            options.add_argument(flag)
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield found
        found.quit()


def uploaded(path):
    return gradio_client.handle_file(str(path))


def cells(html):
    return re.findall(r"<td>(.*?)</td>", html)


def wait_for(browser, what):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 90).until(what)


def by_id(browser, name):
    return browser.find_element("id", name)


# Through a browser.


def test_upload_click_read(browser, address, images, tmp_path):
    browser.get(address)
    wait_for(browser, lambda b: b.find_elements("id", "caption-button"))
    assert "Tasks without a checkpoint use the project" in browser.page_source and "device: cpu" in browser.page_source
    browser.find_element("css selector", "#caption-image input[type=file]").send_keys(str(images[0] / "0.png"))
    wait_for(browser, lambda b: b.find_elements("css selector", "#caption-image img"))
    by_id(browser, "caption-button").click()
    wait_for(browser, lambda b: "log-probability" in by_id(b, "caption-result").text)
    wait_for(browser, lambda b: b.find_elements("css selector", "#caption-maps img"))
    caption = by_id(browser, "caption-result").text.splitlines()[-1].rsplit(" ", 1)[0]
    assert caption_is_exact(caption, [(i.color, i.shape) for i in images[1][0].items])
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)) > 1000  # more than a blank page


def test_a_file_that_is_no_image_is_reported(browser, address, tmp_path):
    (tmp_path / "fake.jpg").write_bytes(b"this is a text")
    browser.get(address)
    wait_for(browser, lambda b: b.find_elements("id", "caption-button"))
    browser.find_element("css selector", "#caption-image input[type=file]").send_keys(str(tmp_path / "fake.jpg"))
    time.sleep(1)
    by_id(browser, "caption-button").click()
    wait_for(browser, lambda b: "no image that can be read" in b.page_source)


# Through the page's interface.


def test_ask_match_and_search(client, images):
    item = images[1][0].items[0]
    answer, maps = client.predict(uploaded(images[0] / "0.png"), "how many objects are there?", api_name="/ask")
    assert cells(answer)[0] == "1" and Image.open(maps).width > 400
    match, _ = client.predict(uploaded(images[0] / "0.png"), f"a {item.color} {item.shape}", api_name="/match")
    assert float(cells(match)[0].rstrip("%")) > 50
    note, found = client.predict([uploaded(images[0] / f"{i}.png") for i in range(3)], "a circle", api_name="/search")
    assert note == "searched 3 images" and len(found) == 3
    note, found = client.predict(None, "a circle", api_name="/search")  # the folder the page was started with
    assert note == "searched 3 images" and len(found) == 3


@pytest.mark.parametrize(
    ("inputs", "name", "said"),
    [
        ((None, False, 1), "/caption", "there is no image yet"),
        (("0.png", "   "), "/ask", "question is empty"),
        (("0.png", "x" * 500), "/ask", "shorten it"),
        (("0.png", ""), "/match", "text is empty"),
    ],
)
def test_what_is_missing_is_reported(client, images, inputs, name, said):
    inputs = [uploaded(images[0] / value) if value == "0.png" else value for value in inputs]
    with pytest.raises(gradio_client.exceptions.AppError, match=said):
        client.predict(*inputs, api_name=name)


def test_html_in_a_text_is_shown_as_text(client, images):
    answer, _ = client.predict(uploaded(images[0] / "0.png"), "<script>alert(1)</script> what?", api_name="/ask")
    assert "<script" not in answer


def test_a_photograph_of_50_megapixels(client, tmp_path):
    Image.new("RGB", (8660, 5774), (200, 30, 30)).save(tmp_path / "large.jpg")
    captions, _ = client.predict(uploaded(tmp_path / "large.jpg"), False, 1, api_name="/caption")
    assert cells(captions)[0]


def test_a_bomb_is_refused(client, tmp_path):
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="megapixels|no image"):
        client.predict(uploaded(tmp_path / "bomb.png"), False, 1, api_name="/caption")


def test_ten_people_at_once(client, images):
    """Each client gets the answer to its own image."""

    def ask(number):
        return cells(client.predict(uploaded(images[0] / f"{number % 3}.png"), False, 1, api_name="/caption")[0])[0]

    alone = [ask(number) for number in range(3)]
    with ThreadPoolExecutor(10) as people:
        assert list(people.map(ask, range(10))) == [alone[number % 3] for number in range(10)]


def test_files_outside_the_page_are_out_of_reach(address):
    for path in ("/etc/passwd", str(ROOT / "README.md")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)


# Hostile requests.


def memory(page, name):
    """MiB of the page's process: VmRSS now, VmHWM at its most."""
    status = Path(f"/proc/{page[1].pid}/status")
    if not status.exists():
        pytest.skip("memory is read from Linux's /proc")
    return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 1024


def connect(address):
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)


def ask_raw(address, name, data):
    """Call the page as no browser would, and return what it answers."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{name}", body, {"Content-Type": "application/json"}, method="POST"
    )
    event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}", timeout=60).read().decode()


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_images_of_the_machine_are_not_read_for_a_request(address, images, meta):
    for name, rest in (("caption", [False, 1]), ("ask", ["what?"]), ("match", ["a circle"])):
        answer = ask_raw(address, name, [{"path": str(images[0] / "0.png"), **meta}, *rest])
        assert answer.startswith("event: error") and "table" not in answer
    assert ask_raw(address, "search", [[{"path": str(images[0] / "0.png"), **meta}], "x"]).startswith("event: error")


def test_paths_that_climb(address, images, tmp_path):
    name = "../../../../../../../" + str(tmp_path / "evil.png").lstrip("/")
    where = upload(address, name, (images[0] / "0.png").read_bytes())
    assert not (tmp_path / "evil.png").exists() and Path(where).name == "evil.png" and ".." not in where
    folder = where.rpartition("/")[0]
    for path in (f"file={folder}/../../../etc/passwd", f"file={folder}/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
                 "file=../../../../etc/passwd", "file=%2fetc%2fpasswd"):  # fmt: skip
        connection = connect(address)
        connection.request("GET", f"/gradio_api/{path}")
        answer = connection.getresponse()
        assert answer.status >= 400 and b"root:" not in answer.read()
    for path in ("/static/../../../etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd"):
        connection = connect(address)
        connection.request("GET", path)
        assert b"root:" not in connection.getresponse().read()


def upload(address, name, content):
    """Upload a file under any name; return where the page keeps it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers, method="POST")
    return json.load(urllib.request.urlopen(request, timeout=20))[0]


def test_html_in_file_names_does_not_come_back(address, images):
    where = upload(address, "<img src=x onerror=alert(1)>.png", (images[0] / "0.png").read_bytes())
    file = {"path": where, "meta": {"_type": "gradio.FileData"}, "orig_name": "<img src=x onerror=alert(1)>.png"}
    for name, data in (("search", [[file], "a circle"]), ("caption", [file, False, 1])):
        answer = ask_raw(address, name, data)
        assert answer.startswith("event: complete") and "<img" not in answer
    where = upload(address, "<img src=x>.png", b"no image")
    file = {"path": where, "meta": {"_type": "gradio.FileData"}}
    assert "<img" not in ask_raw(address, "search", [[file], "a circle"])


def test_equal_results_are_files_of_their_own(client, images):
    """Or one request's image is written while another's is read."""
    search = [client.predict([uploaded(images[0] / "0.png")], "a circle", api_name="/search")[1] for _ in range(2)]
    ask = [client.predict(uploaded(images[0] / "0.png"), "what?", api_name="/ask")[1] for _ in range(2)]
    for one, other in (ask, [found[0]["image"] for found in search]):
        assert list(Image.open(one).getdata()) == list(Image.open(other).getdata())
        assert Path(one).read_bytes() != Path(other).read_bytes()


def test_html_in_captions_and_answers_is_shown_as_text(images, monkeypatch):
    evil = "<script>alert(1)</script>"

    class Model:
        def caption(self, *_, **__):
            return [{"captions": [{"caption": evil, "log_prob": 0.0}]}]

        def answer(self, *_):
            return [{"answers": [{"answer": evil, "log_prob": 0.0}]}]

    monkeypatch.setattr(app, "explain", lambda *_: None)
    monkeypatch.setattr(app, "sheet", lambda *_: Image.new("RGB", (4, 4)))
    shown = app.Page({})
    shown.models = {"caption": Model(), "vqa": Model()}
    path = str(images[0] / "0.png")
    for html in (shown.caption(path, False, 1)[0], shown.ask(path, "what?")[0]):
        assert "<script" not in html and "&lt;script&gt;" in html


def test_bombs_in_a_search_are_refused_and_memory_stays(page, client, tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")  # 169 megapixels, 500 MB as RGB, in 25 KB
    Image.new("1", (9_900, 9_900)).save(tmp_path / "large.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="megapixels are too many"):
        client.predict([uploaded(tmp_path / "large.png")] * 26, "a circle", api_name="/search")
    before = memory(page, "VmHWM")
    with pytest.raises(gradio_client.exceptions.AppError, match="169 megapixels"):
        client.predict([uploaded(tmp_path / "bomb.png")], "a circle", api_name="/search")
    assert memory(page, "VmHWM") - before < 100


@pytest.mark.parametrize("path", ["upload", "queue/join", "call/caption", "run/caption"])
def test_gigabytes_are_refused_before_they_come(page, path):
    connection = connect(page[0])
    connection.putrequest("POST", f"/gradio_api/{path}")
    for name, value in (("Content-Length", 5 << 30), ("Content-Type", "multipart/form-data; boundary=x")):
        connection.putheader(name, str(value))
    connection.endheaders(b"--x")
    assert connection.getresponse().status == 413


FORM = b'--x\r\nContent-Disposition: form-data; name="files"%s\r\n\r\n'
IN_FORM, IN_JSON = "multipart/form-data; boundary=x", "application/json"
# What is sent without end: where to, as what, what begins it, and MiB that the page reads of it.
ENDLESS = {
    "a file": ("upload", IN_FORM, FORM % b'; filename="a.png"', 200),
    "a field": ("upload", IN_FORM, FORM % b"", 1),
    "a header": ("upload", IN_FORM, b"--x\r\nContent-Disposition: ", 1),
    "behind a form": ("upload", IN_FORM, FORM % b'; filename="a.png"' + b"\r\n--x--\r\n", 1),
    "no form": ("upload", IN_FORM, b"nothing", 1),
    "JSON": ("queue/join", IN_JSON, b"[", 1),
    "JSON for an upload": ("call/upload", IN_JSON, b"[", 1),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_gigabytes_that_are_not_announced_are_cut_off(page, kind):
    """In pieces, and the page's memory stays as it was."""
    path, content_type, piece, most = ENDLESS[kind]
    before = memory(page, "VmHWM")
    connection, sent = connect(page[0]), 0
    connection.putrequest("POST", f"/gradio_api/{path}")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Content-Type", content_type)
    connection.endheaders()
    with contextlib.suppress(OSError):
        while sent < 4 << 30:
            connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
            piece = b" " * (1 << 20)
    assert sent < (most + 20) << 20, "what the system's buffers hold comes on top"
    assert memory(page, "VmHWM") - before < 50
    assert urllib.request.urlopen(page[0], timeout=10).status == 200


def crowd(page, images, seconds, people=50):
    """Keep many requests going; return answers, the memory they took in MiB, and others' longest wait in seconds."""
    client = gradio_client.Client(page[0], verbose=False, max_workers=people + 10)

    def ask(number):
        return client.predict(uploaded(images[0] / f"{number % 3}.png"), "how many?", api_name="/ask")[0]

    expected = [ask(number) for number in range(3)]
    before, until, waits = memory(page, "VmRSS"), time.monotonic() + seconds, []

    def one_of_them(number):
        answers = 0
        while time.monotonic() < until:
            assert ask(number) == expected[number % 3]
            answers += 1
        return answers

    def onlooker():
        while time.monotonic() < until:
            began = time.monotonic()
            assert urllib.request.urlopen(page[0], timeout=30).status == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.2)

    with ThreadPoolExecutor(people + 1) as pool:
        watching = pool.submit(onlooker)
        answers = list(pool.map(one_of_them, range(people)))
        watching.result()
    return answers, memory(page, "VmHWM") - before, max(waits)


def test_fifty_people_at_once(page, images):
    answers, grown, wait = crowd(page, images, 1)
    assert min(answers) >= 1 and grown < 500 and wait < 10


@pytest.mark.skipif("BLIP_SLOW" not in os.environ, reason="a minute of load; BLIP_SLOW=1 runs it")
def test_fifty_people_for_a_minute(page, images):
    answers, grown, wait = crowd(page, images, 60)
    print(f"{sum(answers)} answers, all right, {min(answers)} to {max(answers)} each, {grown:.0f} MiB more, "
          f"others waited {wait:.1f} s at most")  # fmt: skip
    assert min(answers) >= 1 and grown < 500 and wait < 10
