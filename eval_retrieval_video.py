"""Zero-shot text-to-video retrieval with an image-text model, MSRVTT (paper section 5.6)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import make_loaders
from data.video import read_frames
from files import read_json, write_json
from inference.ranking import Scores, two_stage_scores
from launch.config import VideoConfig
from launch.run import Run, launch
from metrics.retrieval import retrieval_scores
from models.blip_retrieval import BLIP_Retrieval, blip_retrieval
from models.losses import unit_features
from training.results import evaluate_only, report_scores
from utils import UserError, all_gather_object, on_main_process

EXAMPLES = (
    "python eval_retrieval_video.py --config configs/miniature/retrieval_msrvtt.yaml",
    "python -m torch.distributed.run --nproc_per_node=8 eval_retrieval_video.py --config configs/retrieval_msrvtt.yaml",
)


def encode_video(model: BLIP_Retrieval, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of all frames, one after the other, and the feature: the mean of the frames' projections.

    Clips are float (batch, frames, 3, H, W), tokens (batch, frames * tokens, width), features (batch, embed_dim).
    """
    batch, frames = video.shape[:2]
    embeds = model.visual_encoder(video.flatten(0, 1))  # (batch * frames, tokens, width)
    mean = embeds[:, 0].float().unflatten(0, (batch, frames)).mean(dim=1)  # its projection is the projections' mean
    return embeds.reshape(batch, -1, embeds.shape[-1]), unit_features(model.vision_proj, mean)


def evaluate(model: BLIP_Retrieval, loader: DataLoader, config: VideoConfig, run: Run) -> dict[str, float]:
    """Rank clips for texts and texts for clips, without the clips that cannot be read."""
    bad: dict[int, str] = {}

    def encode(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and features of clips, and note those that cannot be read."""
        bad.update({int(i): error for i, error in zip(batch["index"], batch["error"], strict=True) if error})
        return encode_video(model, batch["video"].to(run.device, non_blocking=True))

    def left_out() -> tuple[list[int], list[int]]:
        bad.update({i: error for found in all_gather_object(bad.copy()) for i, error in found.items()})
        for error in bad.values():
            run.note(f"left out of the ranking: {error}")
        if bad:
            run.note(f"{len(bad)} of {len(dataset)} clips cannot be read")
        if len(bad) == len(dataset):
            raise UserError(f"no clip can be read, the first because of {bad[min(bad)]}; correct video_root")
        return list(bad), [text for text, video in dataset.txt2video.items() if video in bad]

    dataset, sizes = loader.dataset, (config.k_test, config.batch_size)
    scores = two_stage_scores(model, encode, loader, dataset.text, *sizes, config.keep_images, left_out)
    return on_main_process(lambda: measure(scores, dataset, set(bad), run))


def measure(scores: Scores, dataset: Any, unreadable: set[int], run: Run) -> dict[str, float]:
    """Write each text's best clips, and return recalls and median ranks over the readable clips."""
    videos = [i for i in range(len(dataset)) if i not in unreadable]
    texts = [t for t in range(len(dataset.text)) if dataset.txt2video[t] not in unreadable]
    v2t, t2v = scores.i2t[np.ix_(videos, texts)], scores.t2i[np.ix_(texts, videos)]
    txt2vid = {n: videos.index(dataset.txt2video[t]) for n, t in enumerate(texts)}
    vid2txt = {n: [m for m, v in txt2vid.items() if v == n] for n in range(len(videos))}
    best = (-t2v).argsort(axis=1, kind="stable")[:, :5]
    rows = [
        {"text": dataset.text[t], "clips": [videos[i] for i in row], "right": dataset.txt2video[t]}
        for t, row in zip(texts, best.tolist(), strict=True)
    ]
    write_json(run.result("test"), rows)
    return {f"test_{name}": value for name, value in retrieval_scores(v2t, t2v, txt2vid, vid2txt, "vid").items()}


def examples(dataset: Any, run: Run, count: int = 12) -> list[dict[str, Any]]:
    """Return texts with the middle frames of the clips found for them, for the report."""
    return [
        {
            "images": [read_frames(dataset.path(i), 1, dataset.upright)[0] for i in row["clips"]],
            "tones": ["good" if i == row["right"] else "" for i in row["clips"]],
            "lines": [("text", row["text"], "good" if row["clips"][0] == row["right"] else "bad")],
        }
        for row in read_json(run.result("test"))[:count]
    ]


def main(config: VideoConfig, run: Run) -> None:
    """Rank clips and texts, and report."""
    loader = make_loaders("retrieval_msrvtt", config)["test"]
    model = blip_retrieval(**config.model_settings("embed_dim"))
    scores = evaluate_only(run, config, model, lambda model: evaluate(model, loader, config, run))
    report_scores(run, "Text-to-video retrieval", scores, lambda: examples(loader.dataset, run))


if __name__ == "__main__":
    sys.exit(launch(main, VideoConfig, "configs/retrieval_msrvtt.yaml", "output/msrvtt", __doc__, EXAMPLES))
