"""Accuracy of classification, and consistency over examples that share a sentence (NLVR2)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from utils import refuse_nan


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of predictions that equal their labels, in [0, 1].

    Labels are classes (examples,); predictions too, or scores (examples, classes), whose highest counts.
    """
    return float(_right(predictions, labels).mean())


def consistency(sentences: Sequence[str], predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of sentences whose examples are all judged rightly, in [0, 1]; other arguments as `accuracy`."""
    all_right: dict[str, bool] = {}
    for sentence, right in zip(sentences, _right(predictions, labels), strict=True):
        all_right[sentence] = all_right.get(sentence, True) and bool(right)
    return sum(all_right.values()) / len(all_right)


def _right(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    predicted, labels = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim == 2:
        refuse_nan(predicted)
        predicted = predicted.argmax(1)
    if predicted.shape != labels.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(f"predictions of {predicted.shape} for labels of {labels.shape}; expected one for each")
    return predicted == labels
