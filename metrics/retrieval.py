"""Recall and median rank of retrieval between images (or videos) and texts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from utils import UserError


def itm_eval(
    scores_i2t: ArrayLike,
    scores_t2i: ArrayLike,
    txt2img: Mapping[int, int],
    img2txt: Mapping[int, Sequence[int]],
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 of both directions, in percent.

    Args:
        scores_i2t: (images, texts), higher is nearer.
        scores_t2i: (texts, images).
        txt2img: the image of each text.
        img2txt: the texts of each image; finding the best-ranked one counts.

    Returns:
        txt_r1, txt_r5, txt_r10 (texts found for images), txt_r_mean, the same for img_ (images found for
        texts), and r_mean, the mean of both means.

    Raises:
        UserError: scores that are not numbers, which would otherwise rank anywhere.
    """
    texts, images = _both_ranks(scores_i2t, scores_t2i, txt2img, img2txt)
    return _recalls(texts, "txt") | _recalls(images, "img") | {"r_mean": _mean(texts, images)}


def median_ranks(
    scores_i2t: ArrayLike,
    scores_t2i: ArrayLike,
    txt2img: Mapping[int, int],
    img2txt: Mapping[int, Sequence[int]],
) -> dict[str, float]:
    """Return the median rank of the right text (txt_mdR) and image (img_mdR), 1 at best.

    Arguments and errors are those of `itm_eval`.
    """
    texts, images = _both_ranks(scores_i2t, scores_t2i, txt2img, img2txt)
    return {"txt_mdR": float(np.median(texts + 1)), "img_mdR": float(np.median(images + 1))}


def video_eval(
    scores_v2t: ArrayLike,
    scores_t2v: ArrayLike,
    txt2vid: Mapping[int, int],
    vid2txt: Mapping[int, Sequence[int]],
) -> dict[str, float]:
    """Return recalls in percent and median ranks of both directions.

    Arguments and errors are those of `itm_eval`, with videos for images.

    Returns:
        txt_r1, txt_r5, txt_r10, txt_r_mean, txt_mdR, the same for vid_ (videos found for texts), and r_mean.
    """
    texts, videos = _both_ranks(scores_v2t, scores_t2v, txt2vid, vid2txt)
    medians = {"txt_mdR": float(np.median(texts + 1)), "vid_mdR": float(np.median(videos + 1))}
    return _recalls(texts, "txt") | _recalls(videos, "vid") | medians | {"r_mean": _mean(texts, videos)}


def _both_ranks(
    scores_i2t: ArrayLike,
    scores_t2i: ArrayLike,
    txt2img: Mapping[int, int],
    img2txt: Mapping[int, Sequence[int]],
) -> tuple[np.ndarray, np.ndarray]:
    i2t, t2i = np.asarray(scores_i2t), np.asarray(scores_t2i)
    if i2t.shape != t2i.shape[::-1]:
        raise ValueError(
            f"scores of {i2t.shape} and {t2i.shape}; expected (images, texts) and (texts, images)"
        )
    texts = _ranks(i2t, [img2txt[i] for i in range(len(i2t))])
    return texts, _ranks(t2i, [[txt2img[t]] for t in range(len(t2i))])


def _ranks(scores: np.ndarray, right: Sequence[Sequence[int]]) -> np.ndarray:
    """Return, for each row, how many columns come before the best of its right ones."""
    if np.isnan(scores).any():
        raise UserError(
            "retrieval scores are not numbers (NaN); the model has diverged: take an earlier checkpoint"
        )
    ranks = np.empty(len(scores), dtype=np.int64)
    for n, (row, columns) in enumerate(zip(scores, right, strict=True)):
        if not len(columns):
            raise UserError(f"row {n} of the retrieval scores has no right answer; give every image a text")
        best = max(columns, key=lambda column: (row[column], column))
        # Of equal scores the later column comes first, as in a sorted row read backwards.
        ranks[n] = (row > row[best]).sum() + (row[best + 1 :] == row[best]).sum()
    return ranks


def _recalls(ranks: np.ndarray, side: str) -> dict[str, float]:
    recalls = {f"{side}_r{k}": 100.0 * float((ranks < k).mean()) for k in (1, 5, 10)}
    return recalls | {f"{side}_r_mean": sum(recalls.values()) / 3}


def _mean(texts: np.ndarray, others: np.ndarray) -> float:
    return (_recalls(texts, "a")["a_r_mean"] + _recalls(others, "a")["a_r_mean"]) / 2
