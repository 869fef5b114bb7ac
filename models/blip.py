"""The feature extractor and the captioner."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from models.generation import GenerationConfig, generate
from models.med import TextDecoder, TextTransformer
from models.med_config import MED_CONFIG, create_text_config
from models.pretrained import load_checkpoint, load_pretrained
from models.tokenizer import decode, init_tokenizer, tokenize
from models.vit import create_vit
from released import door
from utils import UserError

__all__ = [
    "BLIP_Base",
    "BLIP_Decoder",
    "blip_decoder",
    "blip_feature_extractor",
    "create_vit",
    "init_tokenizer",
    "load_checkpoint",
]

MAX_CAPTION_TOKENS = 40


class BLIP_Base(nn.Module):
    """Image encoder and text encoder, for features of images, of texts, and of both together.

    Args:
        med_config: configuration of the text transformer, a JSON path or a mapping.
        image_size: side of the square input in pixels.
        vit: "tiny", "small", "base", "large" or a mapping of sizes (see `models.vit.create_vit`).
        vit_grad_ckpt, vit_ckpt_layer: recompute the last `vit_ckpt_layer` ViT blocks in the backward pass.
    """

    def __init__(
        self,
        med_config: str | Path | Mapping = MED_CONFIG,
        image_size: int = 224,
        vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
    ):
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.tokenizer, config = create_text_config(med_config, vision_width)
        self.text_encoder = TextTransformer(config)

    def forward(self, image: torch.Tensor, caption: str | Sequence[str], mode: str) -> torch.Tensor:
        """Return token features.

        Args:
            image: float (batch, 3, H, W); the text is moved to its device.
            caption: a text per image.
            mode: "image": image tokens (batch, 1 + patches, vision width); "text": text tokens alone
                (batch, length, text width); "multimodal": text tokens after cross-attention to the image, same shape.

        Raises:
            UserError: another mode.
        """
        if mode == "image":
            return self.visual_encoder(image)
        if mode == "text":
            return self.text_encoder(*tokenize(self.tokenizer, caption, device=image.device))
        if mode == "multimodal":
            text = tokenize(self.tokenizer, caption, first="enc", device=image.device)
            projection = self.text_encoder.project(self.visual_encoder(image))
            return self.text_encoder(*text, projection)
        raise UserError(f"mode is {mode!r}; expected 'image', 'text' or 'multimodal'")


class BLIP_Decoder(nn.Module):
    """The captioner: image encoder and image-grounded text decoder (sections 3.1 and 5.2).

    Args:
        med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer: as `BLIP_Base`.
        prompt: start of every caption; its tokens are left out of the loss.
        smooth_padding: label smoothing includes padding and prompt, as in the released training.
    """

    def __init__(
        self,
        med_config: str | Path | Mapping = MED_CONFIG,
        image_size: int = 384,
        vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        prompt: str = "a picture of ",
        smooth_padding: bool = True,
    ):
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.tokenizer, config = create_text_config(med_config, vision_width)
        self.text_decoder = TextDecoder(config)
        self.prompt = prompt
        self.prompt_length = len(self.tokenizer(prompt).input_ids) - 1  # without [SEP]
        self.smooth_padding = smooth_padding

    def forward(self, image: torch.Tensor, caption: Sequence[str]) -> torch.Tensor:
        """Return the language-modelling loss, a scalar, of captions that begin with the prompt.

        Args:
            image: float (batch, 3, H, W).
            caption: one per image, with the prompt.
        """
        text = tokenize(self.tokenizer, caption, "dec", MAX_CAPTION_TOKENS)
        projection = self.text_decoder.bert.project(self.visual_encoder(image))
        return self.text_decoder.next_token_loss(text, projection, self.smooth_padding, self.prompt_length)

    @torch.no_grad()
    def generate(
        self,
        image: torch.Tensor,
        sample: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
    ) -> list[str]:
        """Caption images.

        Args:
            image: float (batch, 3, H, W).
            sample: nucleus sampling with `top_p` instead of beam search.
            num_beams: width of the search; 1 is greedy.
            max_length, min_length: in tokens, including [DEC] and the prompt.
            top_p: probability mass of the nucleus.
            repetition_penalty: values above 1 discourage tokens that occur already; None is the released default:
                1.1 in sampling, 1.0 in search.

        Returns:
            A caption per image, without the prompt.
        """
        config = GenerationConfig(
            max_length, min_length, num_beams, sample, top_p=top_p, repetition_penalty=repetition_penalty
        )
        return self.caption(image, config)[0]

    @torch.no_grad()
    def caption(
        self, image: torch.Tensor, config: GenerationConfig, uniforms: torch.Tensor | None = None
    ) -> tuple[list[str], torch.Tensor]:
        """Caption images (batch, 3, H, W).

        Args:
            image: float (batch, 3, H, W).
            config: how to decode; the `num_return` captions of an image are adjacent, best first.
            uniforms: random numbers for sampling, as for `models.generation.generate`.

        Returns:
            Captions without the prompt, and the log-probability of each, given image and prompt
            (batch * num_return,).
        """
        prompt = tokenize(self.tokenizer, self.prompt, "dec", device=image.device).input_ids[:, :-1]
        projection = self.text_decoder.bert.project(self.visual_encoder(image))
        prompts = prompt.expand(len(image), -1)
        found = generate(self.text_decoder, projection, prompts, self.tokenizer.sep_token_id, config, uniforms)
        captions = [text[len(self.prompt) :] for text in decode(self.tokenizer, found.ids)]  # cut as released
        return captions, found.log_probs


def blip_decoder(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Decoder:
    """Build a captioner, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_Decoder(**kwargs), pretrained, "caption", allow_pickle)


def blip_feature_extractor(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Base:
    """Build a feature extractor, with weights from `pretrained` (as `blip_decoder`)."""
    return load_pretrained(BLIP_Base(**kwargs), pretrained, "features", allow_pickle)


__getattr__ = door(__name__)
