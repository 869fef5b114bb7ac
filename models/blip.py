"""The feature extractor and the captioner."""

from collections.abc import Mapping, Sequence

import torch

from models.base import ImageTextModel
from models.generation import GenerationConfig, generate
from models.med import TextDecoder, TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.pretrained import load_checkpoint, load_pretrained
from models.tokenizer import decode, init_tokenizer, tokenize
from models.vit import create_vit
from released import door
from utils import UserError

__all__ = [
    "BLIP_Base", "BLIP_Decoder", "blip_decoder", "blip_feature_extractor", "create_vit", "init_tokenizer",
    "load_checkpoint",
]  # fmt: skip

MAX_CAPTION_TOKENS = 40


class BLIP_Base(ImageTextModel):
    """Image and text encoder, for features of images, of texts, and of both together; arguments as the base's."""

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 224, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer)
        self.text_encoder = TextTransformer(self.text_config)

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


class BLIP_Decoder(ImageTextModel):
    """The captioner: image encoder and image-grounded text decoder (sections 3.1 and 5.2).

    Args:
        med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer: as `ImageTextModel`.
        prompt: start of every caption; its tokens are left out of the loss.
        smooth_padding: label smoothing includes padding and prompt, as in the released training.
    """

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 384, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, prompt: str = "a picture of ",
        smooth_padding: bool = True,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer)
        self.text_decoder = TextDecoder(self.text_config)
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
        self, image: torch.Tensor, sample: bool = False, num_beams: int = 3, max_length: int = 30, min_length: int = 10,
        top_p: float = 0.9, repetition_penalty: float | None = None,
    ) -> list[str]:  # fmt: skip
        """Return a caption for each image (batch, 3, H, W), without the prompt; settings as `GenerationConfig`'s."""
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
