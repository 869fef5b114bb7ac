"""The web page, started by its command and used through a browser, and by many people at once."""

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

from data.miniature_scene import draw_scene, render
from data.miniature_text import caption_is_exact

ROOT = Path(__file__).parent.parent
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures with one object each, and their scenes."""
    folder = tmp_path_factory.mktemp("uploads")
    scenes = [draw_scene(random.Random(seed), 1) for seed in range(3)]
    for number, scene in enumerate(scenes):
        render(scene, 256).save(folder / f"{number}.png")
    return folder, scenes


@pytest.fixture(scope="module")
def address(pictures):
    """The page, started as people start it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "demo.app", "--port", str(port), "--folder", str(pictures[0])]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=1)
            break
        except OSError:
            assert process.poll() is None, "the page ended"
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(20)


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


def test_upload_click_read(browser, address, pictures, tmp_path):
    browser.get(address)
    wait_for(browser, lambda b: b.find_elements("id", "caption-button"))
    assert "that comes with the project" in browser.page_source and "device: cpu" in browser.page_source
    browser.find_element("css selector", "#caption-picture input[type=file]").send_keys(str(pictures[0] / "0.png"))
    wait_for(browser, lambda b: b.find_elements("css selector", "#caption-picture img"))
    by_id(browser, "caption-button").click()
    wait_for(browser, lambda b: "log-probability" in by_id(b, "caption-result").text)
    wait_for(browser, lambda b: b.find_elements("css selector", "#caption-maps img"))
    caption = by_id(browser, "caption-result").text.splitlines()[-1].rsplit(" ", 1)[0]
    assert caption_is_exact(caption, [(i.color, i.shape) for i in pictures[1][0].items])
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)) > 1000  # more than a blank page


def test_a_file_that_is_no_picture_is_told(browser, address, tmp_path):
    (tmp_path / "fake.jpg").write_bytes(b"this is a text")
    browser.get(address)
    wait_for(browser, lambda b: b.find_elements("id", "caption-button"))
    browser.find_element("css selector", "#caption-picture input[type=file]").send_keys(str(tmp_path / "fake.jpg"))
    time.sleep(1)
    by_id(browser, "caption-button").click()
    wait_for(browser, lambda b: "no picture that can be read" in b.page_source)


# Through the page's interface.


def test_ask_match_and_search(client, pictures):
    item = pictures[1][0].items[0]
    answer, maps = client.predict(uploaded(pictures[0] / "0.png"), "how many objects are there?", api_name="/ask")
    assert cells(answer)[0] == "1" and Image.open(maps).width > 400
    match, _ = client.predict(uploaded(pictures[0] / "0.png"), f"a {item.color} {item.shape}", api_name="/match")
    assert float(cells(match)[0].rstrip("%")) > 50
    note, found = client.predict([uploaded(pictures[0] / f"{i}.png") for i in range(3)], "a circle", api_name="/search")
    assert note == "searched 3 pictures" and len(found) == 3
    note, found = client.predict(None, "a circle", api_name="/search")  # the folder the page was started with
    assert note == "searched 3 pictures" and len(found) == 3


@pytest.mark.parametrize(
    ("inputs", "name", "said"),
    [
        ((None, False, 1), "/caption", "there is no picture yet"),
        (("0.png", "   "), "/ask", "question is empty"),
        (("0.png", "x" * 500), "/ask", "shorten it"),
        (("0.png", ""), "/match", "text is empty"),
    ],
)
def test_what_is_missing_is_told(client, pictures, inputs, name, said):
    inputs = [uploaded(pictures[0] / value) if value == "0.png" else value for value in inputs]
    with pytest.raises(gradio_client.exceptions.AppError, match=said):
        client.predict(*inputs, api_name=name)


def test_html_in_a_text_is_shown_as_text(client, pictures):
    answer, _ = client.predict(uploaded(pictures[0] / "0.png"), "<script>alert(1)</script> what?", api_name="/ask")
    assert "<script" not in answer


def test_a_photograph_of_50_megapixels(client, tmp_path):
    Image.new("RGB", (8660, 5774), (200, 30, 30)).save(tmp_path / "large.jpg")
    captions, _ = client.predict(uploaded(tmp_path / "large.jpg"), False, 1, api_name="/caption")
    assert cells(captions)[0]


def test_a_bomb_is_refused(client, tmp_path):
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="megapixels|no picture"):
        client.predict(uploaded(tmp_path / "bomb.png"), False, 1, api_name="/caption")


def test_ten_people_at_once(client, pictures):
    """Everyone gets the answer to his own picture."""

    def ask(number):
        return cells(client.predict(uploaded(pictures[0] / f"{number % 3}.png"), False, 1, api_name="/caption")[0])[0]

    alone = [ask(number) for number in range(3)]
    with ThreadPoolExecutor(10) as people:
        assert list(people.map(ask, range(10))) == [alone[number % 3] for number in range(10)]


def test_files_outside_the_page_are_out_of_reach(address):
    for path in ("/etc/passwd", str(ROOT / "README.md")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)
