"""MED, the text transformer: text encoder, image-grounded encoder and decoder in one class (paper section 3.1).

Arguments of a call choose the mode: without a projection the transformer encodes text alone, with one it attends to
an image (or a question), with `causal` it decodes. Architecture: BERT, post-norm, no token types.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.attention import (
    CrossAttention,
    LayerCache,
    Output,
    Projection,
    Reads,
    SelfAttention,
    TextCache,
    TwoImageCrossAttention,
)
from models.losses import IGNORED, labelled_positions, lm_loss
from models.med_config import MedConfig, activation
from models.tokenizer import TokenBatch
from released import door, find

FIRST_MERGE_LAYER = 6  # NLVR2: from this layer on the two images are merged by a learned layer


class Embeddings(nn.Module):
    """Sum of word and position embeddings, norm and dropout."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_load_state_dict_pre_hook(drop_position_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed ids (rows, length) at positions (length,) or (rows, length)."""
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions)))


def drop_position_ids(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave out the position numbers that released checkpoints hold, before they are loaded."""
    state.pop(f"{prefix}position_ids", None)


class Intermediate(nn.Module):
    """First linear layer of the feed-forward network, and its activation."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, length, width) -> (rows, length, intermediate width)."""
        return self.activation(self.dense(hidden))


class Layer(nn.Module):
    """Self-attention, cross-attention if there is a projection, feed-forward."""

    def __init__(self, config: MedConfig, index: int, two_images: bool):
        super().__init__()
        self.attention = SelfAttention(config)
        if two_images:
            self.crossattention: nn.Module = TwoImageCrossAttention(config, merge=index >= FIRST_MERGE_LAYER)
            # the released order of parameters, by which the state of an optimizer is saved
            self.attention.output.dense = self.attention.output._modules.pop("dense")
        else:
            self.crossattention = CrossAttention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, reads: Reads | None, cache: LayerCache | None
    ) -> torch.Tensor:
        """Transform hidden states (rows, length, width)."""
        hidden = self.attention(hidden, mask, cache)
        if reads is not None:
            hidden = self.crossattention(hidden, reads)
        return self.output(self.intermediate(hidden), hidden)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: MedConfig, two_images: bool):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index, two_images) for index in range(config.num_hidden_layers))


class TextTransformer(nn.Module):
    """BERT with cross-attention, to two images for NLVR2."""

    def __init__(self, config: MedConfig, two_images: bool = False):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, two_images)
        init_weights(self, config.initializer_range)

    def project(self, *states: torch.Tensor, mask: torch.Tensor | None = None) -> Projection:
        """Project states to the keys and values of every layer, once for all texts that read them.

        The states are (sources, length, encoder width), of two images for NLVR2; `mask` (sources, length) is 0 at
        states that no text attends to.
        """
        layers = [layer.crossattention.project(list(states)) for layer in self.encoder.layer]
        return Projection(layers, None if mask is None else mask.bool()[:, None, None, :])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        projection: Projection | None = None, causal: bool = False, positions: torch.Tensor | None = None,
        cache: TextCache | None = None, **released: Any,
    ) -> Any:  # fmt: skip
        """Transform texts.

        Args:
            input_ids: int64 (rows, length). With a projection, rows = sources * readers.
            attention_mask: (rows, length), 0 at padding; or a mask per query (rows, length, length); or None.
            projection: what cross-attention reads; None skips it.
            causal: a position attends only to itself and earlier ones.
            positions: int64 (length,) or (rows, length); by default 0, 1, 2 ... after what the cache holds.
            cache: keys and values of earlier positions, to which the new ones are added; none may be padding.
            released: arguments of the released BertModel, such as `encoder_hidden_states` and `mode`.

        Returns:
            Hidden states (rows, length, width); called with released arguments, an output with `last_hidden_state`.
        """
        if released:
            return find(__name__, "call_encoder")(self, input_ids, attention_mask, **released)
        past, length = cache.length if cache is not None else 0, input_ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)
        hidden = self.embeddings(input_ids, positions)
        if cache is not None and cache.static:
            mask = cache.mask(positions)
        else:
            mask = attention_bias(attention_mask, length, past, causal, input_ids.device)
        for index, layer in enumerate(self.encoder.layer):
            # layers do not see their index, so that one compiled graph serves all
            reads = None if projection is None else projection.at(index)
            held = None if cache is None else cache.at(index, positions)
            if self.grad_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, mask, reads, held, use_reentrant=False)
            else:
                hidden = layer(hidden, mask, reads, held)
        if cache is not None:
            cache.length += length
        return hidden


def attention_bias(
    attention_mask: torch.Tensor | None, length: int, past: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Return a bool mask that broadcasts to (rows, heads, length, past + length), or None if nothing is masked."""
    mask = None
    if attention_mask is not None:
        mask = attention_mask.bool()
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    if causal and length > 1:
        order = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
        mask = order if mask is None else mask & order
    return mask


class LMHead(nn.Module):
    """Linear layer, activation, norm, and an output layer with bias whose weight is that of the word embeddings."""

    def __init__(self, config: MedConfig, word_embeddings: nn.Embedding):
        super().__init__()
        width = config.hidden_size
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.activation = activation(config.hidden_act)
        init_weights(self, config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = nn.Linear(width, config.vocab_size)
        self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) -> logits (..., vocabulary)."""
        hidden = self.activation(self.transform["dense"](hidden))
        return self.decoder(self.transform["LayerNorm"](hidden))


class TextDecoder(nn.Module):
    """A causal text transformer (`bert`) with a language-modelling head (`cls.predictions`).

    Embeddings, cross-attention and feed-forward are those of the encoder `shared_with`, if any (section 3.2).
    """

    def __init__(self, config: MedConfig, shared_with: TextTransformer | None = None):
        super().__init__()
        self.config = config
        self.bert = TextTransformer(config)
        if shared_with is not None:
            share_all_but_self_attention(self.bert, shared_with)
        self.cls = nn.ModuleDict({"predictions": LMHead(config, self.bert.embeddings.word_embeddings)})
        self.static_cache = False  # see `create_cache`

    def hidden_states(self, *text: torch.Tensor, **kwargs) -> torch.Tensor:
        """Decode (rows, length) to hidden states; arguments as `TextTransformer.forward`."""
        return self.bert(*text, causal=True, **kwargs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., vocabulary)."""
        return self.cls["predictions"](hidden)

    def create_cache(self, rows: int, capacity: int, device: torch.device) -> TextCache:
        """Return an empty cache for `rows` texts of at most `capacity` tokens.

        On a GPU, or with `static_cache`, shapes are the same for every token, as CUDA graphs and compiled layers need.
        """
        layers, heads, width = self.config.num_hidden_layers, self.config.num_attention_heads, self.config.hidden_size
        dtype = self.bert.embeddings.word_embeddings.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        buffer = torch.zeros(layers, 2, rows, heads, capacity, width // heads, dtype=dtype, device=device)
        return TextCache(buffer, self.static_cache or device.type != "cpu")

    def next_token_loss(
        self, text: TokenBatch, projection: Projection, smooth_padding: bool, prompt_length: int = 0
    ) -> torch.Tensor:
        """Mean language-modelling loss of texts without their first `prompt_length` tokens, a scalar.

        The text is on the CPU, where labelled positions are counted without waiting for the device; without
        `smooth_padding` (see `models.losses.lm_loss`) the LM head runs on these positions only.
        """
        device = projection.layers[0][0][0].device
        labels = text.input_ids.masked_fill(text.attention_mask == 0, IGNORED)
        labels[:, :prompt_length] = IGNORED
        labels = labels[:, 1:].flatten()
        ids, mask = text.to(device)
        hidden = self.hidden_states(ids, attention_mask=mask, projection=projection)[:, :-1].flatten(0, 1)
        if not smooth_padding:
            labelled = labelled_positions(labels)
            hidden, labels = hidden[labelled.to(device, non_blocking=True)], labels[labelled]
        return lm_loss(self.logits(hidden), labels.to(device, non_blocking=True), smooth_padding)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decode as the released BertLMHeadModel; see `released.networks.call_decoder`."""
        return find(__name__, "call_decoder")(self, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate as the released BertLMHeadModel; see `released.networks.generate_ids`."""
        return find(__name__, "generate_ids")(self, *args, **kwargs)


def share_all_but_self_attention(decoder: TextTransformer, encoder: TextTransformer) -> None:
    """Replace the decoder's embeddings, cross-attention and feed-forward with the encoder's."""
    decoder.embeddings = encoder.embeddings
    for own, other in zip(decoder.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention, own.intermediate, own.output = other.crossattention, other.intermediate, other.output


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Initialise as BERT does: weights and embeddings normal, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()


__getattr__ = door(__name__)
