"""Attention of the text transformer: within a text, and to images whose keys and values are projected once.

The released code projects the keys and values of an image again for every beam, candidate, negative and loss. Here
`CrossAttention.project` computes them once, `Projection` holds them for all layers, and any number of texts share
them: consecutive texts of one image are folded into one query sequence, since texts do not mask the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.med_config import MedConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (sources, heads, source length, head width)
FEW_QUERIES = 16  # for fewer, plain products on a CPU are faster than the fused kernel, which repacks the keys


@dataclass(frozen=True)
class Projection:
    """Keys and values of encoder states (image or question tokens), for every layer."""

    layers: list[list[KeyValue]]  # per layer, a pair for each set of states: one, or two for NLVR2's two images
    mask: torch.Tensor | None = None  # bool (sources, 1, 1, source length), False at states that no text attends to
    readers: int = 1  # number of consecutive texts that attend to each source

    def at(self, layer: int) -> Reads:
        """Return the keys and values of one layer."""
        return Reads(self.layers[layer], self.mask, self.readers)

    def read_by(self, readers: int) -> Projection:
        """Return the projection for `readers` consecutive texts per source; nothing is copied."""
        return replace(self, readers=readers)

    def contiguous(self) -> Projection:
        """Copy the keys and values of each head to contiguous memory, for many reads."""
        layers = [[(key.contiguous(), value.contiguous()) for key, value in sets] for sets in self.layers]
        return replace(self, layers=layers)

    def select(self, index: torch.Tensor) -> Projection:
        """Return the sources `index`, int64 of any length, as a copy."""
        layers = [[(key[index], value[index]) for key, value in sets] for sets in self.layers]
        return Projection(layers, None if self.mask is None else self.mask[index], self.readers)


@dataclass(frozen=True)
class Reads:
    """A projection's keys and values for one layer; attributes as `Projection`."""

    sets: list[KeyValue]
    mask: torch.Tensor | None
    readers: int


@dataclass
class LayerCache:
    """The keys and values of one layer of a `TextCache`, each (rows, heads, capacity, head width)."""

    key: torch.Tensor
    value: torch.Tensor
    start: int  # with `stop` the positions that are written next
    stop: int
    positions: torch.Tensor | None  # the same as a tensor, for a static cache

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Write new positions (rows, heads, new, head width); return all so far, or of a static cache the whole."""
        if self.positions is not None:
            return self.key.index_copy_(2, self.positions, key), self.value.index_copy_(2, self.positions, value)
        self.key[:, :, self.start : self.stop] = key
        self.value[:, :, self.start : self.stop] = value
        return self.key[:, :, : self.stop], self.value[:, :, : self.stop]


@dataclass
class TextCache:
    """Keys and values of earlier positions of texts, for incremental decoding, in one preallocated buffer."""

    buffer: torch.Tensor  # (layers, 2, rows, heads, capacity, head width)
    static: bool  # attention reads the whole buffer under a mask, so that shapes do not change from token to token
    length: int = 0  # number of positions held, equal for all rows

    def at(self, layer: int, positions: torch.Tensor) -> LayerCache:
        """Return the cache of one layer, to be extended at `positions`, int64 (new,)."""
        stop = self.length + len(positions)
        return LayerCache(*self.buffer[layer], self.length, stop, positions if self.static else None)

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the causal mask of a static cache, bool (new, capacity)."""
        return torch.arange(self.buffer.shape[-2], device=positions.device) <= positions[:, None]

    def select(self, index: torch.Tensor) -> None:
        """Keep the rows `index`, int64: reorders, drops and repeats texts."""
        self.buffer = self.buffer[:, :, index]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, start: int) -> None:
        """Copy the positions from `start` on of rows `source` to rows `target`, both int64 (copied rows,)."""
        held = self.buffer[:, :, :, :, start : self.length]
        held[:, :, target] = held[:, :, source]


class Heads(nn.Module):
    """Query, key and value layers of an attention, from the text's width and `states_width` to heads."""

    def __init__(self, config: MedConfig, states_width: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(states_width, width)
        self.value = nn.Linear(states_width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, width) -> (rows, heads, length, head width)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def key_value(self, states: torch.Tensor) -> KeyValue:
        """Project states (sources, length, states width) to keys and values."""
        return self.split(self.key(states)), self.split(self.value(states))


class Output(nn.Module):
    """Linear layer, dropout, residual and norm at the end of attention and feed-forward."""

    def __init__(self, config: MedConfig, in_width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return norm(residual + dropout(dense(x)))."""
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class TwoImageOutput(nn.Module):
    """The same for the two images of NLVR2, averaged or merged by a linear layer (section 4.4)."""

    def __init__(self, config: MedConfig, merge: bool):
        super().__init__()
        width = config.hidden_size
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return norm(residual + dropout(merge(dense0(x0), dense1(x1))))."""
        x0, x1 = self.dense0(x0), self.dense1(x1)
        merged = (x0 + x1) / 2 if self.merge_layer is None else self.merge_layer(torch.cat((x0, x1), dim=-1))
        return self.LayerNorm(residual + self.dropout(merged))


class SelfAttention(nn.Module):
    """Self-attention of texts."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.self = Heads(config, config.hidden_size)
        self.output = Output(config, config.hidden_size)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache | None) -> torch.Tensor:
        """Attend within texts (rows, length, width), including cached positions."""
        query, (key, value) = self.self.split(self.self.query(hidden)), self.self.key_value(hidden)
        if cache is not None:
            key, value = cache.extend(key, value)
        dropout = self.dropout_p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(merge_heads(context), hidden)


class CrossAttention(nn.Module):
    """Attention of texts to one set of states: image tokens, or question states."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.self = Heads(config, config.encoder_width)
        self.output = Output(config, config.hidden_size)
        self.dropout_p = config.attention_probs_dropout_prob
        self.recording: list[torch.Tensor] | None = None  # if a list, every forward appends its attention

    def project(self, states: list[torch.Tensor]) -> list[KeyValue]:
        """Project the one set of states."""
        return [self.self.key_value(states[0])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Attend from texts (sources * readers, length, width) to projected states."""
        dropout = self.dropout_p if self.training else 0.0
        return self.output(read(self.self, hidden, reads, reads.sets[0], dropout, self.recording), hidden)


class TwoImageCrossAttention(nn.Module):
    """Attention of statements to two images with separate weights (NLVR2, section 4.4)."""

    def __init__(self, config: MedConfig, merge: bool):
        super().__init__()
        self.self0 = Heads(config, config.encoder_width)
        self.self1 = Heads(config, config.encoder_width)
        self.output = TwoImageOutput(config, merge)
        self.dropout_p = config.attention_probs_dropout_prob

    def project(self, states: list[torch.Tensor]) -> list[KeyValue]:
        """Project the states of the left and the right image."""
        return [self.self0.key_value(states[0]), self.self1.key_value(states[1])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Attend from texts (pairs * readers, length, width) to both images."""
        dropout = self.dropout_p if self.training else 0.0
        context0 = read(self.self0, hidden, reads, reads.sets[0], dropout)
        context1 = read(self.self1, hidden, reads, reads.sets[1], dropout)
        return self.output(context0, context1, hidden)


def read(
    heads: Heads, hidden: torch.Tensor, reads: Reads, key_value: KeyValue, dropout: float,
    recording: list[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attend from texts to projected states; texts of one source are folded into one query sequence.

    A recording receives the attention (sources, heads, readers * length, source length), computed without dropout.
    """
    query = heads.query(hidden)
    if reads.readers > 1:  # (sources * readers, length, width) -> (sources, readers * length, width)
        query = query.reshape(-1, reads.readers * query.shape[1], query.shape[2])
    query = heads.split(query)
    few = not torch.compiler.is_compiling() and query.device.type == "cpu" and query.shape[2] < FEW_QUERIES
    if recording is not None or (few and not dropout):
        context, attention = attend(query, key_value, reads.mask)
        if recording is not None:
            recording.append(attention)
    else:
        context = F.scaled_dot_product_attention(query, *key_value, attn_mask=reads.mask, dropout_p=dropout)
    return merge_heads(context).reshape(hidden.shape)


def attend(query: torch.Tensor, key_value: KeyValue, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return context (sources, heads, queries, head width) and attention weights (..., queries, source length)."""
    key, value = key_value
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attention = scores.softmax(dim=-1)
    return attention @ value, attention


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """(rows, heads, length, head width) -> (rows, length, width)."""
    return context.transpose(1, 2).flatten(2)
