"""The HTTP endpoint: right answers to many clients at once, in batches, and limits that hold."""

import http.client
import io
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from html import escape

import pytest
import torch
from PIL import Image

from inference import load
from miniature.scene import draw_scene, render
from utils import UserError

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from demo.app import SMALL  # noqa: E402
from demo.serve import MAX_BYTES, Batcher, Job, create_app  # noqa: E402

QUESTIONS = ("how many objects are there?", "what color is the circle?", "is there a red ring left of a square?")


@pytest.fixture(scope="module")
def models():
    loaded = {task: load(task, source, "cpu") for task, source in SMALL.items()}
    loaded["vqa"].model.mask_padding = True
    return loaded


@pytest.fixture(scope="module")
def images():
    rng = random.Random(4)
    return [render(draw_scene(rng, 1 + number % 3)) for number in range(16)]


class Serving:
    """An application on a free port, in a thread."""

    def __init__(self, app):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
            return answer.read().decode()

    def post(self, task, content, **query):
        """Return status and content of the response."""
        url = f"http://127.0.0.1:{self.port}/{task}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, content, method="POST"), timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def served(models):
    batcher = Batcher(models, 16, 64)
    serving = Serving(create_app(batcher, 60))
    serving.batcher = batcher
    yield serving
    serving.stop()


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_answers_are_those_of_python(served, models, images):
    content = encoded(images[0])
    caption = models["caption"].caption(images[0])[0]["captions"][0]
    assert served.post("caption", content) == (200, caption)
    for question in QUESTIONS:
        found = models["vqa"].answer(images[0], question)[0]["answers"][0]
        status, row = served.post("answer", content, question=question)
        assert status == 200 and row["answer"] == found["answer"]
        assert row["log_prob"] == pytest.approx(found["log_prob"], abs=1e-3)
    found = models["match"].match(images[0], "a red circle")[0]["matches"][0]
    row = served.post("match", content, text="a red circle")[1]
    assert (row["probability"], row["cosine"]) == pytest.approx((found["probability"], found["cosine"]), abs=1e-3)
    feats = load("features", SMALL["match"], "cpu").features(images[0], kind="image")[0]["features"]
    assert served.post("features", content)[1]["features"] == pytest.approx(feats.tolist(), abs=1e-5)


def test_sixteen_clients_at_once_share_batches(served, models, images):
    """Each gets the answer to its own image and question, whatever else is in the batch."""
    contents = [encoded(image) for image in images]
    captions = [row["captions"][0]["caption"] for row in models["caption"].captions(images)]
    answers = [row["answers"] for row in models["vqa"].answers(images, QUESTIONS)]
    before = dict(served.batcher.counts)

    def ask(number):
        index, question = number % 16, number % 3
        if number % 2:
            return served.post("caption", contents[index])[1]["caption"] == captions[index]
        found = served.post("answer", contents[index], question=QUESTIONS[question])[1]["answer"]
        return found == answers[index][question]["answer"]

    with ThreadPoolExecutor(16) as clients:
        assert all(clients.map(ask, range(160)))
    counts = served.batcher.counts
    for task in ("caption", "answer"):
        images_of, batches = (
            counts[name, task] - before.get((name, task), 0) for name in ("blip_images_total", "blip_batches_total")
        )
        assert images_of == 80 and batches < 60


def test_metrics_and_description(served, images):
    served.post("features", encoded(images[0]))
    metrics = served.get("metrics")
    assert 'blip_requests_total{task="features",status="200"}' in metrics and "blip_queue_length 0" in metrics
    paths = json.loads(served.get("openapi.json"))["paths"]
    assert {"/caption", "/answer", "/match", "/features"} <= paths.keys()
    assert "application/octet-stream" in paths["/answer"]["post"]["requestBody"]["content"]


def test_the_page_describes_every_operation_and_loads_nothing_else(served):
    page, operations = served.get("docs"), json.loads(served.get("openapi.json"))["paths"]
    for path, methods in operations.items():
        for method, operation in methods.items():
            assert f"<b>{method.upper()}</b> {path}</h2><p>{escape(operation['description'])}</p>" in page
    assert '<input type="text" name="question" required>' in page and page.count('<input type="file"') == 4
    assert "503: too many requests wait" in page
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", page) and "import" not in page


def test_what_cannot_be_answered(served, images):
    content = encoded(images[0])
    bomb = encoded(Image.new("1", (13_000, 13_000)))
    for task, body, query, said in (
        ("caption", b"no image", {}, "no image that can be read"),
        ("caption", b"", {}, "no image that can be read"),
        ("caption", bomb, {}, "169 megapixels"),
        ("caption", b" " * (MAX_BYTES + 1), {}, "more than 20 MB"),
        ("answer", content, {"question": " "}, "question is empty"),
        ("match", content, {"text": "x" * 400}, "shorten it"),
    ):
        status, row = served.post(task, body, **query)
        assert status == 422 and said in row["error"], row
    assert served.post("answer", content)[0] == 422  # FastAPI's own: no question


def test_a_text_that_cannot_be_matched_fails_alone(models, images):
    batcher = Batcher(models, max_batch=4, max_queue=4)
    jobs = [Job("match", models["match"].transform(images[0]), text) for text in ("a red ring", "!!!", "a star")]
    batcher._answer("match", jobs)
    assert isinstance(jobs[1].row.exception(), UserError)
    assert all(0 <= job.row.result()["probability"] <= 1 for job in (jobs[0], jobs[2]))


def test_a_client_that_leaves_takes_nothing_with_it(served, models, images):
    content = encoded(images[1])
    expected = models["caption"].caption(images[1])[0]["captions"][0]["caption"]
    for cut in (100, len(content)):
        leaving = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        leaving.putrequest("POST", "/caption")
        leaving.putheader("Content-Length", str(len(content)))
        leaving.endheaders(content[:cut])
        leaving.close()
    assert served.post("caption", content)[1]["caption"] == expected


class Slow:
    """A captioner that waits for a signal."""

    def __init__(self, model):
        self.model, self.go, self.transform = model, threading.Event(), model.transform

    def predict_in_parts(self, predict, image, names):
        self.go.wait(20)
        if names == ["fail"]:
            raise RuntimeError("broken")
        return [{"caption": str(len(names))} for _ in names]


def test_a_full_queue_and_a_slow_answer_are_refused(models, images):
    slow = Slow(models["caption"])
    batcher = Batcher({"caption": slow}, max_batch=1, max_queue=2)
    serving = Serving(create_app(batcher, 4))
    try:
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda _: serving.post("caption", encoded(images[0])), range(8)))
        statuses = [status for status, _ in found]
        assert statuses.count(504) in (2, 3)  # two in the queue, and one in work if it was there first
        assert statuses.count(503) == 8 - statuses.count(504)
        assert "too many requests wait" in found[statuses.index(503)][1]["error"]
        slow.go.set()
        assert serving.post("caption", encoded(images[0])) == (200, {"caption": "1"})
        assert f'blip_requests_total{{task="caption",status="503"}} {statuses.count(503)}' in serving.get("metrics")
        assert batcher.counts["blip_images_total", "caption"] == 2  # those that gave up in the queue are left out
    finally:
        serving.stop()


def test_a_failed_batch_is_its_own_jobs_error(models):
    slow = Slow(models["caption"])
    slow.go.set()
    batcher = Batcher({"caption": slow}, max_batch=1, max_queue=8)
    bad, good = (batcher.submit("caption", torch.zeros(3, 8, 8), text) for text in ("fail", "fine"))
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(20)
    assert good.result(20) == {"caption": "1"}
