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
            mode: "image": image tokens (batch, 1 + patches, vision width); "text": text tokens alone (batch, length,
                text width); "multimodal": text tokens after cross-attention to the image, same shape.
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
    """The captioner: image encoder and image-grounded text decoder (sections 3.1, 5.2); more arguments as the base's.

    Args:
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
        """Return the language-modelling loss, a scalar, of images (batch, 3, H, W) and captions with the prompt."""
        text = tokenize(self.tokenizer, caption, "dec", MAX_CAPTION_TOKENS)
        projection = self.text_decoder.bert.project(self.visual_encoder(image))
        return self.text_decoder.next_token_loss(text, projection, self.smooth_padding, self.prompt_length)

    @torch.no_grad()
    def generate(
        self, image: torch.Tensor, sample: bool = False, num_beams: int = 3, max_length: int = 30, min_length: int = 10,
        top_p: float = 0.9, repetition_penalty: float | None = None, prompt: str | Sequence[str] | None = None,
    ) -> list[str]:  # fmt: skip
        """Return a caption for each image (batch, 3, H, W), without the prompt.

        Settings are those of `GenerationConfig`; `prompt` is the beginning of all captions, or one for each image, in
        place of the model's own.
        """
        config = GenerationConfig(
            max_length, min_length, num_beams, sample, top_p=top_p, repetition_penalty=repetition_penalty
        )
        prompts = [prompt] * len(image) if isinstance(prompt, str) else prompt
        return self.caption(image, config, prompts=prompts)[0]

    @torch.no_grad()
    def caption(
        self, image: torch.Tensor, config: GenerationConfig, uniforms: torch.Tensor | None = None,
        prompts: Sequence[str] | None = None,
    ) -> tuple[list[str], torch.Tensor]:  # fmt: skip
        """Caption images (batch, 3, H, W).

        Args:
            config: how to decode; the `num_return` captions of an image are adjacent, best first.
            uniforms: random numbers for sampling, as for `models.generation.generate`.
            prompts: what the captions of each image begin with, in place of the model's own prompt.

        Returns:
            Captions without the prompt, and the log-probability of each, given image and prompt (batch * num_return,).
        """
        projection = self.text_decoder.bert.project(self.visual_encoder(image))
        texts = [self.prompt] * len(image) if prompts is None else list(prompts)
        ids = {text: tokenize(self.tokenizer, text, "dec").input_ids[0, :-1] for text in set(texts)}
        num, captions, log_probs = config.num_return, {}, torch.empty(len(texts) * config.num_return)
        for length in {len(tokens) for tokens in ids.values()}:  # texts that are decoded together are of one length
            images = [i for i, text in enumerate(texts) if len(ids[text]) == length]
            rows = [i * num + j for i in images for j in range(num)]
            prompt = torch.stack([ids[texts[i]] for i in images]).to(image.device)
            part = projection if len(images) == len(texts) else projection.select(torch.tensor(images).to(image.device))
            numbers = None if uniforms is None else uniforms[rows]
            found = generate(self.text_decoder, part, prompt, self.tokenizer.sep_token_id, config, numbers)
            captions |= dict(zip(rows, decode(self.tokenizer, found.ids), strict=True))
            log_probs[rows] = found.log_probs
        return [captions[row][len(texts[row // num]) :] for row in sorted(captions)], log_probs  # cut as released


def blip_decoder(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Decoder:
    """Build a captioner, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_Decoder(**kwargs), pretrained, "caption", allow_pickle)


def blip_feature_extractor(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Base:
    """Build a feature extractor, with weights from `pretrained` (as `blip_decoder`)."""
    return load_pretrained(BLIP_Base(**kwargs), pretrained, "features", allow_pickle)


__getattr__ = door(__name__)
