"""An HTTP endpoint for captions, answers, matches and features: python -m demo.serve

    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/answer?question=what+is+it?'

Requests that arrive together become one batch. Without checkpoints it uses the project's small model, which knows a
world of coloured shapes. /docs describes the interface, and /metrics counts requests.
"""

import argparse
import asyncio
import io
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch

from data.images import as_rgb
from data.text import pre_question
from demo.app import SMALL
from demo.interface_page import interface_page
from demo.limits import megapixels, read_text
from inference import load
from inference.predictor import MAX_WORDS, Row
from inference.tasks import CAPTION_DEFAULTS, Answerer, Captioner, Matcher
from models.blip_vqa import MAX_QUESTION_TOKENS
from models.generation import GenerationConfig
from models.losses import similarity
from models.tokenizer import tokenize
from utils import UserError, run_command, user_message

MODEL_OF = {"caption": "caption", "answer": "vqa", "match": "match", "features": "match"}
MAX_BYTES = 20 << 20  # of an image
REFUSALS = {
    422: "the image or text cannot be answered, and why",
    503: "too many requests wait",
    504: "no answer within the time limit",
}
Answer = Callable[[torch.Tensor, list[str]], list[Row]]  # images (batch, 3, H, W), a text for each -> a row for each


# What each task answers.


def caption_rows(model: Captioner, image: torch.Tensor, texts: list[str]) -> list[Row]:
    """Return captions; the texts are empty."""
    config = GenerationConfig(**{name: model.setting(name, None) for name in CAPTION_DEFAULTS})
    found, log_probs = model.model.caption(image, config)
    return [{"caption": t, "log_prob": round(p, 4)} for t, p in zip(found, log_probs.tolist(), strict=True)]


def answer_rows(model: Answerer, image: torch.Tensor, texts: list[str]) -> list[Row]:
    """Return answers to a question for each image; padding is masked, so that no question depends on another."""
    net = model.model
    questions = [pre_question(text, MAX_WORDS) for text in texts]
    tokens = tokenize(net.tokenizer, questions, "enc", MAX_QUESTION_TOKENS, model.device)
    found, log_probs = net.generate_answers(net.question_states(image, tokens), tokens.attention_mask)
    return [{"answer": t, "log_prob": round(p, 4)} for t, p in zip(found, log_probs.tolist(), strict=True)]


def match_rows(model: Matcher, image: torch.Tensor, texts: list[str]) -> list[Row]:
    """Return the probability that each text describes its image, and their cosine."""
    tokens = model.model.visual_encoder(image)
    cosine = similarity(model.image_feat(tokens), model.text_feat(texts)).diagonal().tolist()
    pairs = zip(model.own_probabilities(tokens, [[text] for text in texts]), cosine, strict=True)
    return [{"probability": round(p, 4), "cosine": round(c, 4)} for (p,), c in pairs]


def feature_rows(model: Matcher, image: torch.Tensor, texts: list[str]) -> list[Row]:
    """Return unit-length features; the texts are empty."""
    return [{"features": row} for row in model.image_feat(model.model.visual_encoder(image)).tolist()]


ROWS: dict[str, Callable[[Any, torch.Tensor, list[str]], list[Row]]] = {
    "caption": caption_rows, "answer": answer_rows, "match": match_rows, "features": feature_rows,
}  # fmt: skip


# Batches.


@dataclass
class Job:
    """A request that waits for its row."""

    task: str
    image: torch.Tensor
    text: str
    row: Future = field(default_factory=Future)


class Batcher:
    """One thread that answers the jobs in a bounded queue, all that have arrived at once.

    Args:
        models: task -> model.
        max_batch: jobs at once.
        max_queue: jobs that wait.
    """

    def __init__(self, models: dict[str, Any], max_batch: int, max_queue: int):
        self.models, self.max_batch = models, max_batch
        self.queue: queue.Queue[Job] = queue.Queue(max_queue)
        self.counts: Counter[tuple[str, ...]] = Counter()  # name of a metric and its labels -> value
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, task: str, image: torch.Tensor, text: str) -> Future:
        """Return the row to come; raises `queue.Full`."""
        job = Job(task, image, text)
        self.queue.put_nowait(job)
        return job.row

    def _work(self) -> None:
        while True:
            jobs = [self.queue.get()]
            while len(jobs) < self.max_batch and not self.queue.empty():
                jobs.append(self.queue.get())
            for task in dict.fromkeys(job.task for job in jobs):
                # whoever has given up waiting is left out
                self._answer(task, [j for j in jobs if j.task == task and j.row.set_running_or_notify_cancel()])

    @torch.no_grad()
    def _answer(self, task: str, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        model, start = self.models[MODEL_OF[task]], time.monotonic()
        try:
            rows = model.predict_in_parts(
                lambda image, texts: ROWS[task](model, image, texts),
                torch.stack([job.image for job in jobs]), [job.text for job in jobs],
            )  # fmt: skip
            for job, row in zip(jobs, rows, strict=True):
                job.row.set_result(row)
        except Exception as error:
            if len(jobs) > 1:  # one job may be at fault, so each is answered alone
                for job in jobs:
                    self._answer(task, [job])
                return
            jobs[0].row.set_exception(error)
        self.counts["blip_batches_total", task] += 1
        self.counts["blip_images_total", task] += len(jobs)
        self.counts["blip_busy_seconds_total", task] += time.monotonic() - start

    def metrics(self) -> str:
        """Return the counts in the format of Prometheus."""
        lines = [f"blip_queue_length {self.queue.qsize()}"]
        for (name, *labels), value in sorted(self.counts.items()):
            pairs = ",".join(f'{key}="{label}"' for key, label in zip(("task", "status"), labels))
            lines.append(f"{name}{{{pairs}}} {value:.12g}")
        return "\n".join(lines) + "\n"


# The interface.


def create_app(batcher: Batcher, timeout: float) -> Any:
    """Return the application.

    Args:
        batcher: answers the requests.
        timeout: seconds that a request may take, from its first byte.

    Raises:
        UserError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    except ImportError:
        raise UserError("the endpoint needs FastAPI and uvicorn; pip install fastapi uvicorn") from None
    app = FastAPI(title="BLIP", docs_url=None, redoc_url=None)  # FastAPI's pages load scripts from another server
    image = {"schema": {"type": "string", "format": "binary", "description": "an image"}}
    described: dict[str, Any] = {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/octet-stream": image}}},
        "responses": {status: {"description": text} for status, text in REFUSALS.items()},
    }

    async def respond(task: str, request: Request, text: str = "") -> JSONResponse:
        status, content = await outcome(batcher, task, request.stream(), text, timeout)
        batcher.counts["blip_requests_total", task, str(status)] += 1
        return JSONResponse(content, status, {"Retry-After": "1"} if status in (503, 504) else {})

    @app.post("/caption", **described)
    async def caption(request: Request) -> JSONResponse:
        """Caption the image in the body."""
        return await respond("caption", request)

    @app.post("/answer", **described)
    async def answer_question(request: Request, question: str) -> JSONResponse:
        """Answer a question about the image in the body."""
        return await respond("answer", request, question)

    @app.post("/match", **described)
    async def match(request: Request, text: str) -> JSONResponse:
        """Return the probability that a text describes the image in the body."""
        return await respond("match", request, text)

    @app.post("/features", **described)
    async def features(request: Request) -> JSONResponse:
        """Return the unit-length feature of the image in the body."""
        return await respond("features", request)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Return counts of requests, batches and images, and the queue's length, in the format of Prometheus."""
        return PlainTextResponse(batcher.metrics())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(interface_page(app.openapi()))

    return app


async def outcome(
    batcher: Batcher, task: str, stream: AsyncIterator[bytes], text: str, timeout: float
) -> tuple[int, Row]:
    """Return the status and content of the response to a request."""
    from starlette.requests import ClientDisconnect

    try:
        return 200, await asyncio.wait_for(answer(batcher, task, stream, text), timeout)
    except UserError as error:
        return 422, {"error": user_message(error)}
    except queue.Full:
        return 503, {"error": "too many requests wait; try again"}
    except asyncio.TimeoutError:
        return 504, {"error": f"no answer within {timeout:g} seconds; try again"}
    except ClientDisconnect:
        return 499, {}


async def answer(batcher: Batcher, task: str, stream: AsyncIterator[bytes], text: str) -> Row:
    """Return the row that answers a request with an image in its body.

    Raises:
        UserError: the body is no image, or it or the text is too large.
    """
    content = bytearray()
    async for piece in stream:
        content += piece
        if len(content) > MAX_BYTES:
            raise UserError(f"the image has more than {MAX_BYTES >> 20} MB; send a smaller one")
    image, text = await asyncio.to_thread(prepare, batcher.models[MODEL_OF[task]], task, bytes(content), text)
    return await asyncio.wrap_future(batcher.submit(task, image, text))


def prepare(model: Any, task: str, content: bytes, text: str) -> tuple[torch.Tensor, str]:
    """Return an image as a tensor (3, H, W), and the checked text."""
    megapixels(io.BytesIO(content))
    text = read_text(text, "question" if task == "answer" else "text") if task in ("answer", "match") else ""
    return model.transform(as_rgb(content)), text


def main() -> None:
    """Start the endpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for task, text in (("caption", "captions"), ("vqa", "answers"), ("match", "matching and features")):
        parser.add_argument(f"--{task}", default="", metavar="CHECKPOINT", help=f"weights for {text}: path, URL or hf:")
    parser.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--amp", choices=("", "bf16", "fp16", "auto"), default="", help="mixed precision")
    parser.add_argument("--max_batch", type=int, default=16, help="images at once (default: 16)")
    parser.add_argument("--max_queue", type=int, default=256, help="requests that wait; more get 503 (default: 256)")
    parser.add_argument("--timeout", type=float, default=30, help="seconds of a request (default: 30)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    args = parser.parse_args()
    with redirect_stdout(sys.stderr):
        models = {task: load(task, getattr(args, task) or SMALL[task], args.device, args.amp) for task in SMALL}
    models["vqa"].model.mask_padding = True
    app = create_app(Batcher(models, args.max_batch, args.max_queue), args.timeout)
    import uvicorn

    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", limit_concurrency=4 * args.max_queue)


if __name__ == "__main__":
    sys.exit(run_command(main))
