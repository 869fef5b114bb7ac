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

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (sources, heads, source length, head width)
FEW_QUERIES = 16  # for fewer, plain products on a CPU are faster than the fused kernel, which repacks the keys


@dataclass(frozen=True)
class Projection:
    """Keys and values of encoder states (image or question tokens), for every layer.

    Attributes:
        layers: per layer, one (keys, values) pair for each set of states: one, or two for NLVR2's two images.
        mask: bool (sources, 1, 1, source length), False at states that no text attends to; None if there are none.
        readers: number of consecutive texts that attend to each source.
    """

    layers: list[list[KeyValue]]
    mask: torch.Tensor | None = None
    readers: int = 1

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
    """Room for the keys and values of one layer, each (rows, heads, capacity, head width).

    Attributes:
        key, value: views of the buffer of a `TextCache`.
        start, stop: the positions that are written next.
        positions: the same as a tensor, for a static cache; None otherwise.
    """

    key: torch.Tensor
    value: torch.Tensor
    start: int
    stop: int
    positions: torch.Tensor | None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Write new positions (rows, heads, new, head width); return all so far, or of a static cache the whole."""
        if self.positions is not None:
            return self.key.index_copy_(2, self.positions, key), self.value.index_copy_(2, self.positions, value)
        self.key[:, :, self.start : self.stop] = key
        self.value[:, :, self.start : self.stop] = value
        return self.key[:, :, : self.stop], self.value[:, :, : self.stop]


@dataclass
class TextCache:
    """Keys and values of earlier positions of texts, for incremental decoding, in one preallocated buffer.

    Attributes:
        buffer: (layers, 2, rows, heads, capacity, head width).
        length: number of positions held, equal for all rows.
        static: attention reads the whole buffer under a mask, so that shapes do not change from token to token.
    """

    buffer: torch.Tensor
    static: bool
    length: int = 0

    @property
    def rows(self) -> int:
        """Number of texts."""
        return self.buffer.shape[2]

    @property
    def capacity(self) -> int:
        """Number of positions there is room for."""
        return self.buffer.shape[-2]

    def at(self, layer: int, positions: torch.Tensor) -> LayerCache:
        """Return the cache of one layer, to be extended at `positions`, int64 (new,)."""
        key, value = self.buffer[layer].unbind()
        return LayerCache(
            key, value, self.length, self.length + len(positions), positions if self.static else None
        )

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the causal mask of a static cache, bool (new, capacity)."""
        return torch.arange(self.capacity, device=positions.device) <= positions[:, None]

    def select(self, index: torch.Tensor) -> None:
        """Keep the rows `index`, int64: reorders, drops and repeats texts."""
        self.buffer = self.buffer[:, :, index]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, start: int) -> None:
        """Copy the positions from `start` on of rows `source` to rows `target`, both int64 (copied rows,)."""
        held = self.buffer[:, :, :, :, start : self.length]
        held[:, :, target] = held[:, :, source]


class Heads(nn.Module):
    """Query, key and value layers of an attention, from `width` and `states_width` to heads."""

    def __init__(self, width: int, num_heads: int, states_width: int):
        super().__init__()
        self.num_heads = num_heads
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

    def __init__(self, in_width: int, width: int, norm_eps: float, dropout: float):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return norm(residual + dropout(dense(x)))."""
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class TwoImageOutput(nn.Module):
    """The same for the two images of NLVR2, averaged or merged by a linear layer (section 4.4)."""

    def __init__(self, width: int, norm_eps: float, dropout: float, merge: bool):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return norm(residual + dropout(merge(dense0(x0), dense1(x1))))."""
        x0, x1 = self.dense0(x0), self.dense1(x1)
        merged = (x0 + x1) / 2 if self.merge_layer is None else self.merge_layer(torch.cat((x0, x1), dim=-1))
        return self.LayerNorm(residual + self.dropout(merged))


class SelfAttention(nn.Module):
    """Self-attention of texts."""

    def __init__(self, width: int, num_heads: int, norm_eps: float, dropout: float, attention_dropout: float):
        super().__init__()
        self.self = Heads(width, num_heads, width)
        self.output = Output(width, width, norm_eps, dropout)
        self.attention_dropout = attention_dropout

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        """Attend within texts (rows, length, width), including cached positions."""
        query, (key, value) = self.self.split(self.self.query(hidden)), self.self.key_value(hidden)
        if cache is not None:
            key, value = cache.extend(key, value)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(merge_heads(context), hidden)


class CrossAttention(nn.Module):
    """Attention of texts to one set of states: image tokens, or question states."""

    def __init__(
        self, width: int, num_heads: int, states_width: int, norm_eps: float, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.self = Heads(width, num_heads, states_width)
        self.output = Output(width, width, norm_eps, dropout)
        self.attention_dropout = attention_dropout
        self.recording: list[torch.Tensor] | None = None  # if a list, every forward appends its attention

    def project(self, states: list[torch.Tensor]) -> list[KeyValue]:
        """Project the one set of states."""
        return [self.self.key_value(states[0])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Attend from texts (sources * readers, length, width) to projected states."""
        if self.recording is not None:
            context, attention = read_with_weights(self.self, hidden, reads, reads.sets[0])
            self.recording.append(attention)
            return self.output(context, hidden)
        dropout = self.attention_dropout if self.training else 0.0
        context = read(self.self, hidden, reads, reads.sets[0], dropout)
        return self.output(context, hidden)


class TwoImageCrossAttention(nn.Module):
    """Attention of statements to two images with separate weights (NLVR2, section 4.4)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        states_width: int,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
        merge: bool,
    ):
        super().__init__()
        self.self0 = Heads(width, num_heads, states_width)
        self.self1 = Heads(width, num_heads, states_width)
        self.output = TwoImageOutput(width, norm_eps, dropout, merge)
        self.attention_dropout = attention_dropout

    def project(self, states: list[torch.Tensor]) -> list[KeyValue]:
        """Project the states of the left and the right image."""
        return [self.self0.key_value(states[0]), self.self1.key_value(states[1])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Attend from texts (pairs * readers, length, width) to both images."""
        dropout = self.attention_dropout if self.training else 0.0
        left, right = reads.sets
        context0 = read(self.self0, hidden, reads, left, dropout)
        context1 = read(self.self1, hidden, reads, right, dropout)
        return self.output(context0, context1, hidden)


def read(heads: Heads, hidden: torch.Tensor, reads: Reads, key_value: KeyValue, dropout: float) -> torch.Tensor:
    """Attend from texts to projected states; texts of one source are folded into one query sequence."""
    query = heads.split(fold(heads.query(hidden), reads.readers))
    if uses_plain_products(query) and not dropout:
        context, _ = attend(query, key_value, reads.mask)
    else:
        context = F.scaled_dot_product_attention(query, *key_value, attn_mask=reads.mask, dropout_p=dropout)
    return merge_heads(context).reshape(hidden.shape)


def uses_plain_products(query: torch.Tensor) -> bool:
    """Return True for few queries on a CPU, in eager mode (a graph should not depend on their number)."""
    return not torch.compiler.is_compiling() and query.device.type == "cpu" and query.shape[2] < FEW_QUERIES


def read_with_weights(
    heads: Heads, hidden: torch.Tensor, reads: Reads, key_value: KeyValue
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `read` without dropout; also return the attention (sources, heads, readers * length, source length)."""
    query = heads.split(fold(heads.query(hidden), reads.readers))
    context, attention = attend(query, key_value, reads.mask)
    return merge_heads(context).reshape(hidden.shape), attention


def attend(
    query: torch.Tensor, key_value: KeyValue, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return context (sources, heads, queries, head width) and attention weights (..., queries, source length)."""
    key, value = key_value
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attention = scores.softmax(dim=-1)
    return attention @ value, attention


def fold(x: torch.Tensor, readers: int) -> torch.Tensor:
    """(sources * readers, length, width) -> (sources, readers * length, width)."""
    return x if readers == 1 else x.reshape(x.shape[0] // readers, readers * x.shape[1], x.shape[2])


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """(rows, heads, length, head width) -> (rows, length, width)."""
    return context.transpose(1, 2).flatten(2)
