"""Rows of training: whole steps of pretraining and captioning."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import floor
from benchmarks.case import BASE, Case, Size, bfloat16, largest_difference, word_texts
from models.blip import BLIP_Decoder
from models.blip_pretrain import MAX_TEXT_TOKENS, BLIP_Pretrain
from models.cpu_products import use_cpu_products
from models.med import TextTransformer
from tests import plain
from training.optimizer import create_optimizer

PRETRAINING = Size(image_size=224)
Losses = Callable[[torch.nn.Module], Sequence[torch.Tensor]]


def build_pretraining(image: bool, text: bool, **settings: Any) -> BLIP_Pretrain:
    """Return a model in training mode whose image or text blocks are recomputed in the backward pass."""
    model = BLIP_Pretrain(vit_grad_ckpt=image, vit_ckpt_layer=24, **settings).train()
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = text
    return model


def training_step(model: torch.nn.Module, losses: Losses, plainly: bool = False) -> Callable[[], float]:
    """Return a step: losses, gradients, AdamW; `plainly` as the released code takes it."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-6, foreach=False) if plainly else create_optimizer(model, 1e-6, 0.05)

    def step() -> float:
        if not plainly and hasattr(model, "begin_step"):
            model.begin_step()
        optimizer.zero_grad(set_to_none=not plainly)
        loss = sum(losses(model))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def loss_difference(model: torch.nn.Module, ours: Losses, theirs: Losses, relative: bool = False) -> float:
    """Return the largest difference of the losses of two ways without dropout; the model is not changed."""
    with torch.no_grad():
        one, other = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        return largest_difference(ours(one), theirs(other), relative)


def pretraining_step(device: str, amp: bool = False, size: Size = PRETRAINING, pairs: int = 8) -> Case:
    """Pairs at 224 px with texts of about 10 words, in one precision."""
    torch.manual_seed(0)
    model = BLIP_Pretrain(**size.settings).train().to(device)
    image, texts = torch.randn(pairs, 3, size.image_size, size.image_size, device=device), word_texts(pairs)
    own = use_cpu_products(copy.deepcopy(model))

    def ours(model: BLIP_Pretrain) -> Sequence[torch.Tensor]:
        with bfloat16(device, amp):
            return model(image, texts, 0.4)

    def theirs(model: BLIP_Pretrain) -> Sequence[torch.Tensor]:
        with bfloat16(device, amp):
            return plain.pretraining_losses(model, image, texts, 0.4)

    def without_matching(losses: Losses) -> Losses:
        return lambda m: losses(m)[::2]  # matching draws its negatives at random; a test compares it

    def difference() -> float:
        return loss_difference(own, without_matching(ours), without_matching(theirs), relative=amp)

    peers = {"released algorithm": training_step(model, theirs, plainly=True)}
    return Case(training_step(own, ours), peers, difference, pretraining_floor(own, texts))


def pretraining_floor(model: BLIP_Pretrain, texts: Sequence[str]) -> list[floor.Part]:
    """Return the least work of a step, with texts padded to the longest, and for the LM to its limit."""
    vit, text, pairs = model.visual_encoder, model.text_config, len(texts)
    length, tokens = max(len(model.tokenizer(t).input_ids) for t in texts), vit.pos_embed.shape[1]
    shape = (vit.embed_dim, len(vit.blocks), vit.patch_embed.patch_size[0])
    image = floor.vit(tokens, *shape)
    matching = 3 * floor.text(length, text, tokens)
    language = floor.text(MAX_TEXT_TOKENS, text, tokens) + floor.head(MAX_TEXT_TOKENS - 1, text)
    forward = image + floor.projection(tokens, text) + floor.text(length, text) + matching + language
    momentum = floor.vit_weights(*shape) + floor.text_weights(text, False)
    return [
        floor.Part(floor.TRAINING * pairs * forward, trained_weights(model)),
        floor.Part(pairs * (image + floor.text(length, text)), floor.MOMENTUM_PASSES * momentum),
    ]


def trained_weights(model: torch.nn.Module) -> float:
    """Return the parameters that a step reads and writes, in thousand millions, each as often as it must."""
    return floor.TRAINING_PASSES * sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9


def captioning_step(device: str, amp: bool = False, size: Size = BASE, images: int = 4) -> Case:
    """A captioning step at 384 px."""
    torch.manual_seed(0)
    model = BLIP_Decoder(**size.settings).train().to(device)
    image = torch.randn(images, 3, size.image_size, size.image_size, device=device)
    texts = [f"a picture of {text}" for text in word_texts(images)]
    own = use_cpu_products(copy.deepcopy(model))

    def ours(model: BLIP_Decoder) -> list[torch.Tensor]:
        with bfloat16(device, amp):
            return [model(image, texts)]

    def theirs(model: BLIP_Decoder) -> list[torch.Tensor]:
        with bfloat16(device, amp):
            return [plain.caption_loss(model, image, texts)]

    text, length = model.text_decoder.config, max(len(model.tokenizer(t).input_ids) for t in texts)
    reading = floor.text(length, text, size.tokens) + floor.head(length, text)
    forward = floor.vit(size.tokens, *size.shape) + floor.projection(size.tokens, text) + reading
    parts = [floor.Part(floor.TRAINING * images * forward, trained_weights(model))]
    peers = {"released algorithm": training_step(model, theirs, plainly=True)}
    return Case(training_step(own, ours), peers, lambda: loss_difference(own, ours, theirs, amp), parts)
