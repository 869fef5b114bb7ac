"""Attention of the text transformer: to its own text, and to images whose keys and values are projected once.

The released code projects an image's keys and values again for every beam, candidate, negative and loss that
reads them. Here `CrossAttention.project` makes them once, `Projection` holds them for all layers, and any
number of texts read them: consecutive texts of one image are folded into one long query sequence, since no
text masks the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each (sources, heads, source length, head width)
FEW_QUERIES = 16  # for fewer, plain products are faster on a CPU than the fused kernel, which packs keys anew


@dataclass(frozen=True)
class Projection:
    """Keys and values of encoder states (image or question tokens), for every layer.

    Attributes:
        layers: per layer, one (keys, values) pair for each set of states: one, or two for NLVR2's two images.
        mask: bool (sources, 1, 1, source length), False where no text may look; None where all may.
        readers: number of consecutive texts that read each source.
    """

    layers: list[list[KeyValue]]
    mask: torch.Tensor | None = None
    readers: int = 1

    def at(self, layer: int) -> Reads:
        """Return what one layer reads."""
        return Reads(self.layers[layer], self.mask, self.readers)

    def read_by(self, readers: int) -> Projection:
        """Let each source be read by `readers` consecutive texts; nothing is copied."""
        return replace(self, readers=readers)

    def contiguous(self) -> Projection:
        """Lay every head's keys and values out in one piece, which pays where they are read many times."""
        layers = [[(key.contiguous(), value.contiguous()) for key, value in sets] for sets in self.layers]
        return replace(self, layers=layers)

    def select(self, index: torch.Tensor) -> Projection:
        """Return rows: text i reads source `index[i]` (int64, any length). Copies, but projects nothing."""
        layers = [[(key[index], value[index]) for key, value in sets] for sets in self.layers]
        return Projection(layers, None if self.mask is None else self.mask[index])


@dataclass(frozen=True)
class Reads:
    """A projection's keys and values for one layer; attributes as `Projection`."""

    sets: list[KeyValue]
    mask: torch.Tensor | None
    readers: int


@dataclass
class LayerCache:
    """One layer's keys and values of the text so far, None before the first position."""

    held: KeyValue | None = None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Append new positions (rows, heads, new, head width) and return all of them."""
        if self.held is not None:
            key, value = torch.cat((self.held[0], key), dim=2), torch.cat((self.held[1], value), dim=2)
        self.held = key, value
        return key, value


@dataclass
class TextCache:
    """Keys and values of the text so far, per layer: what incremental decoding reads instead of recomputing."""

    layers: list[LayerCache] = field(default_factory=list)

    def at(self, layer: int) -> LayerCache:
        """Return one layer's, made when it is first asked for."""
        if layer == len(self.layers):
            self.layers.append(LayerCache())
        return self.layers[layer]

    @property
    def shape(self) -> torch.Size:
        """(rows, heads, positions held, head width), before the first position all 0."""
        return self.layers[0].held[0].shape if self.layers else torch.Size((0, 0, 0, 0))

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self.shape[2]

    def select(self, index: torch.Tensor) -> None:
        """Keep rows `index` (int64): reorders, drops and repeats texts."""
        for layer in self.layers:
            layer.held = layer.held[0][index], layer.held[1][index]


class Heads(nn.Module):
    """Query, key and value maps of one attention, from `width` to heads; states may have their own width."""

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
    """Dense map, dropout, residual and norm, which close attention and feed-forward alike."""

    def __init__(self, in_width: int, width: int, norm_eps: float, dropout: float):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return norm(residual + dropout(dense(x)))."""
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class TwoImageOutput(nn.Module):
    """The same for NLVR2's two images: their maps are averaged, or merged by a learned layer (section 4.4)."""

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
    """Attention of a text to itself."""

    def __init__(self, width: int, num_heads: int, norm_eps: float, dropout: float, attention_dropout: float):
        super().__init__()
        self.self = Heads(width, num_heads, width)
        self.output = Output(width, width, norm_eps, dropout)
        self.attention_dropout = attention_dropout

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        """Attend within texts (rows, length, width), and to their cached past."""
        query, (key, value) = self.self.split(self.self.query(hidden)), self.self.key_value(hidden)
        if cache is not None:
            key, value = cache.extend(key, value)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(merge_heads(context), hidden)


class CrossAttention(nn.Module):
    """Attention of a text to one set of states: an image's tokens, or a question's."""

    def __init__(
        self, width: int, num_heads: int, states_width: int, norm_eps: float, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.self = Heads(width, num_heads, states_width)
        self.output = Output(width, width, norm_eps, dropout)
        self.attention_dropout = attention_dropout
        self.recording: list[torch.Tensor] | None = None  # a list takes the attention of every forward

    def project(self, states: list[torch.Tensor]) -> list[KeyValue]:
        """Project the one set of states."""
        return [self.self.key_value(states[0])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Let texts (sources * readers, length, width) read the projected states."""
        if self.recording is not None:
            context, attention = read_visibly(self.self, hidden, reads, reads.sets[0])
            self.recording.append(attention)
            return self.output(context, hidden)
        dropout = self.attention_dropout if self.training else 0.0
        context = read(self.self, hidden, reads, reads.sets[0], dropout)
        return self.output(context, hidden)


class TwoImageCrossAttention(nn.Module):
    """Attention of a statement to two images, each with its own maps (NLVR2, section 4.4)."""

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
        """Project the states of the left and of the right image."""
        return [self.self0.key_value(states[0]), self.self1.key_value(states[1])]

    def forward(self, hidden: torch.Tensor, reads: Reads) -> torch.Tensor:
        """Let texts (pairs * readers, length, width) read both images."""
        dropout = self.attention_dropout if self.training else 0.0
        left, right = reads.sets
        context0 = read(self.self0, hidden, reads, left, dropout)
        context1 = read(self.self1, hidden, reads, right, dropout)
        return self.output(context0, context1, hidden)


def read(heads: Heads, hidden: torch.Tensor, reads: Reads, key_value: KeyValue, dropout: float) -> torch.Tensor:
    """Attend from texts to projected states; the readers of one source are folded into one query sequence."""
    query = heads.split(fold(heads.query(hidden), reads.readers))
    if is_quick(query) and not dropout:
        context, _ = attend(query, key_value, reads.mask)
    else:
        context = F.scaled_dot_product_attention(query, *key_value, attn_mask=reads.mask, dropout_p=dropout)
    return merge_heads(context).reshape(hidden.shape)


def is_quick(query: torch.Tensor) -> bool:
    """Tell whether queries are few and on a CPU; never in a graph, which should serve any number."""
    return not torch.compiler.is_compiling() and query.device.type == "cpu" and query.shape[2] < FEW_QUERIES


def read_visibly(
    heads: Heads, hidden: torch.Tensor, reads: Reads, key_value: KeyValue
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `read` without dropout, and also the attention (sources, heads, readers * length, source length)."""
    query = heads.split(fold(heads.query(hidden), reads.readers))
    context, attention = attend(query, key_value, reads.mask)
    return merge_heads(context).reshape(hidden.shape), attention


def attend(
    query: torch.Tensor, key_value: KeyValue, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out: context (sources, heads, queries, head width) and weights (..., queries, source length)."""
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
