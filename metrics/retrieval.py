"""Recall and median rank of retrieval between images (or videos) and texts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from utils import UserError, refuse_nan


def retrieval_scores(
    scores_i2t: ArrayLike, scores_t2i: ArrayLike, txt2img: Mapping[int, int], img2txt: Mapping[int, Sequence[int]],
    side: str = "img",
) -> dict[str, float]:  # fmt: skip
    """Return recalls in percent and median ranks of both directions; UserError if scores are not numbers.

    Args:
        scores_i2t, scores_t2i: (images, texts) and (texts, images), higher is nearer.
        txt2img: the image of each text.
        img2txt: the texts of each image; finding the best-ranked one counts.
        side: prefix of the scores of images; "vid" if they are videos.

    Returns:
        txt_r1, txt_r5, txt_r10 (texts found for images), txt_r_mean, txt_mdR (median rank of the right text, 1 at
        best), the same for img_ (images found for texts), and r_mean, the mean of both means.
    """
    i2t, t2i = np.asarray(scores_i2t), np.asarray(scores_t2i)
    if i2t.shape != t2i.shape[::-1]:
        raise ValueError(f"scores of {i2t.shape} and {t2i.shape}; expected (images, texts) and (texts, images)")
    ranks = {
        "txt": _ranks(i2t, [img2txt[i] for i in range(len(i2t))]),
        side: _ranks(t2i, [[txt2img[t]] for t in range(len(t2i))]),
    }
    scores: dict[str, float] = {}
    for name, found in ranks.items():
        recalls = {f"{name}_r{k}": 100.0 * float((found < k).mean()) for k in (1, 5, 10)}
        scores |= recalls | {f"{name}_r_mean": sum(recalls.values()) / 3}
    scores["r_mean"] = (scores["txt_r_mean"] + scores[f"{side}_r_mean"]) / 2
    return scores | {f"{name}_mdR": float(np.median(found + 1)) for name, found in ranks.items()}


def itm_eval(
    scores_i2t: ArrayLike, scores_t2i: ArrayLike, txt2img: Mapping[int, int], img2txt: Mapping[int, Sequence[int]]
) -> dict[str, float]:
    """Return the recalls of `retrieval_scores`, as the released code does."""
    scores = retrieval_scores(scores_i2t, scores_t2i, txt2img, img2txt)
    return {name: value for name, value in scores.items() if not name.endswith("_mdR")}


def _ranks(scores: np.ndarray, right: Sequence[Sequence[int]]) -> np.ndarray:
    """Return, for each row, how many columns come before the best of its right ones."""
    refuse_nan(scores)
    ranks = np.empty(len(scores), dtype=np.int64)
    for n, (row, columns) in enumerate(zip(scores, right, strict=True)):
        if not len(columns):
            raise UserError(f"row {n} of the retrieval scores has no right answer; give every image a text")
        best = max(columns, key=lambda column: (row[column], column))
        # Of equal scores the later column comes first, as in a sorted row read backwards.
        ranks[n] = (row > row[best]).sum() + (row[best + 1 :] == row[best]).sum()
    return ranks
