"""Networks by the released names: BertModel, BertLMHeadModel, their calls and their parts."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from data.images import is_url
from models import attention, med
from models.generation import GenerationConfig, generate
from models.losses import lm_loss, lm_sequence_losses
from models.med import TextDecoder, TextTransformer, share_all_but_self_attention
from models.med_config import load_med_config
from models.pretrained import load_checkpoint
from utils import UserError, all_gather, all_gather_with_grad, get_world_size

SEP_TOKEN_ID = 102
PARTS = {  # released names of the transformer's parts; the parts have their own constructors and calls
    "BertAttention": attention.SelfAttention,
    "BertEmbeddings": med.Embeddings,
    "BertEncoder": med.Encoder,
    "BertIntermediate": med.Intermediate,
    "BertLMPredictionHead": med.LMHead,
    "BertLayer": med.Layer,
    "BertOnlyMLMHead": nn.ModuleDict,
    "BertOutput": attention.Output,
    "BertPreTrainedModel": nn.Module,
    "BertPredictionHeadTransform": nn.ModuleDict,
    "BertSelfAttention": attention.Heads,
    "BertSelfOutput": attention.Output,
}
globals().update(PARTS)
__all__ = [
    *PARTS, "Attention", "BertConfig", "BertLMHeadModel", "BertModel", "BertPooler", "Block", "GatherLayer", "Mlp",
    "call_decoder", "call_encoder", "concat_all_gather", "generate_ids", "is_url", "load_checkpoint",
    "tie_encoder_decoder_weights", "tile",
]  # fmt: skip
concat_all_gather = all_gather


class GatherLayer:
    """The ranks' tensors, with gradient."""

    @staticmethod
    def apply(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every rank's tensor of one shape; backward sums the ranks' gradients."""
        return all_gather_with_grad(tensor).chunk(get_world_size())


def tile(x: torch.Tensor, dim: int, n_tile: int) -> torch.Tensor:
    """Repeat every entry along a dimension `n_tile` times."""
    return x.repeat_interleave(n_tile, dim)


def tie_encoder_decoder_weights(
    encoder: TextTransformer, decoder: TextTransformer, base_model_prefix: str, skip_key: str
) -> None:
    """Make the decoder share the encoder's parameters, self-attention (`skip_key` "/attention") excepted."""
    if skip_key != "/attention":
        raise UserError(f"skip_key is {skip_key!r}; expected '/attention', as in the released pretraining")
    share_all_but_self_attention(decoder, encoder)


# Calls of the text transformer.


def call_encoder(
    text: TextTransformer,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    is_decoder: bool = False,
    mode: str = "multimodal",
    return_dict: bool | None = True,
    **settings: Any,
) -> Any:
    """Call a text transformer as the released BertModel; returns an output with `last_hidden_state`.

    The states are a list for NLVR2's two images, whose masks hide nothing. UserError for further arguments, unless they
    are None or False and so ask for nothing.
    """
    if given := [name for name, value in settings.items() if value is not None and value is not False]:
        raise UserError(f"argument {', '.join(given)} is not supported here; leave it out")
    projection = None
    if encoder_hidden_states is not None and mode != "text":
        two = isinstance(encoder_hidden_states, Sequence)
        states = encoder_hidden_states if two else [encoder_hidden_states]
        projection = text.project(*states, mask=None if two else encoder_attention_mask)
    hidden = TextTransformer.forward(text, input_ids, attention_mask, projection, is_decoder, position_ids)
    pooler = getattr(text, "pooler", None)
    pooled = None if pooler is None else pooler(hidden)
    if return_dict is False:
        return hidden, pooled
    return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def call_decoder(
    decoder: TextDecoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    return_logits: bool = False,
    reduction: str = "mean",
    return_dict: bool | None = True,
    is_decoder: bool = True,
    **settings: Any,
) -> Any:
    """Call a decoder as the released BertLMHeadModel; returns an output with `loss` and `logits`.

    The loss is that of labels, int64 (rows, length), -100 where the likelihood does not count; with reduction "none" it
    is summed over the tokens of each row. `return_logits` returns logits (rows, length - 1, vocabulary) alone.
    """
    logits = decoder.logits(call_encoder(decoder.bert, input_ids, attention_mask, is_decoder=is_decoder, **settings)[0])
    if return_logits:
        return logits[:, :-1]
    loss = None
    if labels is not None:
        loss = (lm_sequence_losses if reduction == "none" else lm_loss)(logits[:, :-1], labels[:, 1:])
    if return_dict is False:
        return logits if loss is None else (loss, logits)
    return CausalLMOutputWithCrossAttentions(loss=loss, logits=logits)


def generate_ids(
    decoder: TextDecoder,
    input_ids: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    eos_token_id: int = SEP_TOKEN_ID,
    pad_token_id: int = 0,
    **settings: Any,
) -> torch.Tensor:
    """Continue prompts (rows, length) as `generate` of the released BertLMHeadModel under transformers 4.15.

    States and their mask have an entry per row, or per row and beam; `settings` are those of `GenerationConfig`.
    Returns int64 (rows * num_return_sequences, longest), prompt and end token included.
    """
    settings = {"max_length": 20, "min_length": 0, "num_beams": 1, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    config = GenerationConfig(sample=do_sample, num_return=num_return_sequences, **settings)
    copies = len(encoder_hidden_states) // len(input_ids)
    mask = None if encoder_attention_mask is None else encoder_attention_mask[::copies]
    projection = decoder.bert.project(encoder_hidden_states[::copies], mask=mask)
    texts = generate(decoder, projection, input_ids, eos_token_id, config).ids
    ended = [torch.cat((text, text.new_tensor([eos_token_id])))[: config.max_length] for text in texts]
    return pad_sequence(ended, batch_first=True, padding_value=pad_token_id).to(input_ids.device)


# Networks from a BertConfig.


class BertPooler(nn.Module):
    """Tanh of a linear map of the first token."""

    def __init__(self, config: Any):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(rows, length, width) -> (rows, width)."""
        return self.dense(hidden_states[:, 0]).tanh()


class BertModel(TextTransformer):
    """A text transformer built from a BertConfig, and called as `call_encoder`."""

    two_images = False

    def __init__(self, config: Any, add_pooling_layer: bool = True):
        super().__init__(load_med_config(vars(config)), self.two_images)
        self.pooler = BertPooler(config) if add_pooling_layer else None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **settings: Any) -> Any:
        """Call `call_encoder`."""
        return call_encoder(self, input_ids, attention_mask, **settings)


class TwoImageBertModel(BertModel):
    """The same for NLVR2: encoder_hidden_states is a list of the two images' states."""

    two_images = True


class BertLMHeadModel(TextDecoder):
    """A decoder built from a BertConfig; its calls are `call_decoder` and `generate_ids`."""

    def __init__(self, config: Any):
        super().__init__(load_med_config(vars(config)))
