"""ITC, ITM with hard negatives, and LM as functions of tensors (paper section 3.2)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError

LABEL_SMOOTHING = 0.1
IGNORED = -100  # label of a position whose likelihood does not count


def unit_features(projection: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return normalised projections of states (rows, width), float32 also under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return F.normalize(projection(states.float()), dim=-1)


def similarity(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return cosine similarities (rows, others) of unit features, float32 also under autocast.

    In bfloat16, at a temperature of 0.07, similarities would be off by up to 0.03.
    """
    with torch.autocast(features.device.type, enabled=False):
        return features.float() @ others.float().T


def soft_targets(similarity_m: torch.Tensor, hard_targets: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Mix the momentum model's softmax into the hard targets; all (batch, candidates), rows sum to 1."""
    return alpha * F.softmax(similarity_m, dim=1) + (1 - alpha) * hard_targets


def itc_loss(
    sim_i2t: torch.Tensor, sim_t2i: torch.Tensor, targets_i2t: torch.Tensor, targets_t2i: torch.Tensor
) -> torch.Tensor:
    """Mean of both directions' cross-entropy of similarities over temperature and soft targets (batch, candidates)."""
    loss_i2t, loss_t2i = F.cross_entropy(sim_i2t, targets_i2t), F.cross_entropy(sim_t2i, targets_t2i)
    return (loss_i2t + loss_t2i) / 2


@torch.no_grad()
def draw_negatives(similarities: torch.Tensor, same: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Draw one hard negative for each row, int64 (batch,), with probabilities by similarity.

    The first of exponential races at the rates of the probabilities has their distribution. Unlike `torch.multinomial`
    this does not wait for the device and does not raise on NaN, which the loss shows.

    Args:
        similarities: over temperature (batch, candidates); UserError if there is only one candidate.
        same: bool, the same shape, True at candidates that belong to the row; if all do, any is drawn, else none of
            them.
        floor: added to every probability (1e-4 in pretraining).
    """
    if similarities.shape[1] < 2:
        raise UserError("a batch of one pair has no negatives for matching; use a batch of at least 2 per process")
    weights = (F.softmax(similarities.float(), dim=1) + floor).masked_fill(same, 0)
    weights = weights + (weights.sum(dim=1, keepdim=True) == 0)
    times = torch.empty_like(weights).exponential_() / weights
    return times.masked_fill(weights == 0, torch.inf).argmin(dim=1)


def itm_loss(logits_positive: torch.Tensor, logits_negative: torch.Tensor) -> torch.Tensor:
    """Image-text matching loss of positives (batch, 2), of class 1, and negatives (2 * batch, 2), of class 0."""
    logits = torch.cat((logits_positive, logits_negative))
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(logits_positive)] = 1
    return F.cross_entropy(logits.float(), labels)


def lm_token_losses(
    log_z: torch.Tensor, mean: torch.Tensor, chosen: torch.Tensor, labels: torch.Tensor, smooth_padding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each position's likelihood term, 0.9 * -log p(label), and smoothing term, 0.1 * the mean of -log p.

    Args:
        log_z, mean, chosen: float32, of each position's logits the logarithm of the summed exponentials, the
            mean over the vocabulary, and the label's own.
        labels: int64, the same shape, IGNORED where the likelihood does not count.
        smooth_padding: ignored positions keep their smoothing term, as under PyTorch 1.10, with which the
            released weights were trained.
    """
    labelled = labels != IGNORED
    likelihood = (1 - LABEL_SMOOTHING) * (log_z - chosen) * labelled
    smooth = LABEL_SMOOTHING * (log_z - mean)
    return likelihood, smooth if smooth_padding else smooth * labelled


def labelled_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the flat positions of labels that count, int64, of labels on the CPU."""
    return torch.from_numpy(np.flatnonzero(labels.numpy() != IGNORED))


def summarize_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the loss needs of logits (..., vocabulary): log_z, mean and chosen, float32 (...)."""
    logits = logits.float()
    chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(dim=-1), logits.mean(dim=-1), chosen


def lm_loss(logits: torch.Tensor, labels: torch.Tensor, smooth_padding: bool = True) -> torch.Tensor:
    """Mean language-modelling loss over labelled positions, a scalar; labels are smoothed by 0.1.

    Args:
        logits: (..., vocabulary), each at the position before its label's.
        labels: int64 (...), IGNORED where the likelihood does not count.
        smooth_padding: the smoothing term is averaged over all positions instead, ignored ones too.
    """
    likelihood, smooth = lm_token_losses(*summarize_logits(logits, labels), labels, smooth_padding)
    num_labelled = (labels != IGNORED).sum().clamp_min(1)
    num_smoothed = labels.numel() if smooth_padding else num_labelled
    return likelihood.sum() / num_labelled + smooth.sum() / num_smoothed


def lm_sequence_losses(logits: torch.Tensor, labels: torch.Tensor, smooth_padding: bool = True) -> torch.Tensor:
    """Token-summed loss of each sequence: (rows, length, vocabulary) and (rows, length) -> (rows,)."""
    likelihood, smooth = lm_token_losses(*summarize_logits(logits, labels), labels, smooth_padding)
    return (likelihood + smooth).sum(dim=1)
