"""Scores of visual dialogue: where answers stand among the options of a question (VisDial v1.0)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from utils import id_text, refuse_nan

Key = tuple[str, int]  # text of image_id, round_id


def option_ranks(scores: ArrayLike) -> np.ndarray:
    """Return the ranks of options by their scores (options,), 1 for the highest; of equal scores the later is first."""
    scores = np.asarray(scores)
    refuse_nan(scores)
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(scores, kind="stable")[::-1]] = np.arange(1, len(scores) + 1)
    return ranks


def ndcg(ranks: ArrayLike, relevance: ArrayLike) -> float:
    """Return VisDial's normalised discounted cumulative gain of one question, in [0, 1].

    `ranks` (options,) count from 1, `relevance` (options,) is the share of people who found an option right. Only the
    first k options count, where k is the number of options with a relevance other than 0, at least one.
    """
    ranks, relevance = np.asarray(ranks), np.asarray(relevance, dtype=np.float64)
    k = np.count_nonzero(relevance)
    discounts = np.log2(np.arange(k) + 2)
    found, best = relevance[np.argsort(ranks)][:k], np.sort(relevance)[::-1][:k]
    return float((found / discounts).sum() / (best / discounts).sum())


def dialogue_scores(
    rows: Iterable[dict], right: Mapping[Key, int], relevance: Mapping[Key, Sequence[float]]
) -> dict[str, float]:
    """Return the scores of rows {"image_id", "round_id", "ranks": the rank of each option}.

    They are mrr, the mean reciprocal rank, r1, r5 and r10, the share among the first, in percent, and mean_rank, of the
    options whose numbers are `right`; and ndcg, in percent, of questions whose options have a `relevance`. What nothing
    is known about is left out.
    """
    ranks = {(id_text(row["image_id"]), row["round_id"]): row["ranks"] for row in rows}
    scores: dict[str, float] = {}
    if right:
        found = np.array([ranks[key][option] for key, option in right.items()])
        scores["mrr"] = 100.0 * float((1 / found).mean())
        scores |= {f"r{k}": 100.0 * float((found <= k).mean()) for k in (1, 5, 10)}
        scores["mean_rank"] = float(found.mean())
    if relevance:
        scores["ndcg"] = 100.0 * float(np.mean([ndcg(ranks[key], value) for key, value in relevance.items()]))
    return scores
