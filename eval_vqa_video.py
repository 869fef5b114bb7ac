"""Zero-shot video question answering with an image VQA model, MSRVTT-QA and MSVD-QA (paper section 5.6)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import make_loaders, prefetch
from data.video import read_frames
from files import read_json, write_json
from launch.config import VideoQAConfig
from launch.run import Run, launch
from metrics.knowledge import exact_match
from models.blip_vqa import BLIP_VQA, MAX_QUESTION_TOKENS, blip_vqa
from models.tokenizer import TokenBatch, tokenize
from training.results import evaluate_only, report_scores
from utils import UserError, gather_results, on_main_process, track

EXAMPLES = (
    "python eval_vqa_video.py --config configs/miniature/video_qa.yaml",
    "python -m torch.distributed.run --nproc_per_node=8 eval_vqa_video.py --config configs/msvd_qa.yaml",
)
KINDS = ("what", "who", "how", "when", "where")  # of questions, by their first word, as published


def video_tokens(model: BLIP_VQA, video: torch.Tensor) -> torch.Tensor:
    """Encode clips (batch, frames, 3, H, W) to the tokens of all frames in turn (batch, frames * tokens, width)."""
    embeds = model.visual_encoder(video.flatten(0, 1))  # (batch * frames, tokens, width)
    return embeds.reshape(len(video), -1, embeds.shape[-1])


def answer(model: BLIP_VQA, loader: DataLoader, config: VideoQAConfig, run: Run) -> list[dict[str, Any]]:
    """Answer all questions, on every process; a clip is encoded and projected once for all of its questions."""
    dataset, candidates = loader.dataset, None
    if config.inference == "rank":
        candidates = tokenize(model.tokenizer, dataset.answer_list, "dec", device=run.device)
    found: list[list[dict[str, Any]]] = []  # rows of each clip
    for batch in prefetch(track(loader, "answering"), run.device):
        projection = model.text_encoder.project(video_tokens(model, batch["video"]))
        for place, (clip, error) in enumerate(zip(batch["index"].tolist(), batch["error"], strict=True)):
            asked, rows = dataset.questions[clip], [{"error": error}]
            own = projection.select(torch.arange(place, place + 1, device=run.device))
            for start in range(0, len(asked), config.batch_size):
                part = asked[start : start + config.batch_size]
                questions = [row["question"] for row in part]
                text = tokenize(model.tokenizer, questions, "enc", MAX_QUESTION_TOKENS, run.device)
                states = model.text_encoder(*text, own.read_by(len(part)))
                answers = choose(model, states, text, candidates, dataset.answer_list, config.k_test)
                for row, said in zip(part, answers, strict=True):
                    rows.append({"question_id": row["question_id"], "answer": "" if error else said})
            found.append(rows)
    return [row for own in gather_results(found) for row in own]


def choose(
    model: BLIP_VQA, states: torch.Tensor, text: TokenBatch, candidates: TokenBatch | None, names: list[str],
    k_test: int,
) -> list[str]:  # fmt: skip
    """Answer questions from their states (questions, length, width), freely or by one of the candidates."""
    if candidates is None:
        return model.generate_answers(states, text.attention_mask)[0]
    return [names[i] for i in model.rank_answer(states, text.attention_mask, *candidates, k_test).tolist()]


def evaluate(model: BLIP_VQA, loader: DataLoader, config: VideoQAConfig, run: Run) -> dict[str, float]:
    """Write the result file, and score it where the test file has answers. Unreadable clips count as wrong."""
    rows = answer(model, loader, config, run)
    if bad := [row["error"] for row in rows if row.get("error")]:
        run.note(f"{len(bad)} of {len(loader.dataset)} clips cannot be read, the first: {bad[0]}; their answers are ''")
    if len(bad) == len(loader.dataset):
        raise UserError(f"no clip can be read, the first because of {bad[0]}; correct video_root")
    rows = [row for row in rows if "error" not in row]
    on_main_process(lambda: write_json(run.result("video_qa"), rows))
    truth = [row for row in loader.dataset.annotation if "answer" in row]
    return {f"test_{name}": value for name, value in score(rows, truth).items()}


def score(rows: list[dict[str, Any]], truth: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of right answers in percent, over all questions and for each kind of question."""
    scores = exact_match(rows, truth) if truth else {}
    for kind in KINDS:
        if own := [row for row in truth if row["question"].split()[:1] == [kind]]:
            scores[kind] = exact_match(rows, own)["overall"]
    return scores


def examples(dataset: Any, run: Run, count: int = 24) -> list[dict[str, Any]]:
    """Return questions with frames of their clips and the answers, for the report."""
    annotation, cards = {row["question_id"]: row for row in dataset.annotation}, []
    answered = [row for row in read_json(run.result("video_qa")) if row["answer"]]  # '' of clips that cannot be read
    for row in answered[:count]:
        asked = annotation[row["question_id"]]
        right = asked.get("answer")
        tone = "" if right is None else "good" if right == row["answer"] else "bad"
        lines = [("question", asked["question"], ""), ("answer", row["answer"], tone)]
        lines += [] if right is None else [("right", right, "")]
        cards.append({"images": read_frames(dataset.path(asked["clip"]), 3, dataset.upright), "lines": lines})
    return cards


def main(config: VideoQAConfig, run: Run) -> None:
    """Answer the questions and report."""
    loader = make_loaders("video_qa", config)["test"]
    model = blip_vqa(**config.model_settings("smooth_padding"), mask_padding=True)
    scores = evaluate_only(run, config, model, lambda model: evaluate(model, loader, config, run))
    report_scores(run, "Questions about clips", scores, lambda: examples(loader.dataset, run))


if __name__ == "__main__":
    sys.exit(launch(main, VideoQAConfig, "configs/msrvtt_qa.yaml", "output/video_qa", __doc__, EXAMPLES))
