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
        """Take a step and return its loss."""
        if not plainly and hasattr(model, "begin_step"):
            model.begin_step()
        optimizer.zero_grad(set_to_none=not plainly)
        loss = sum(losses(model))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_case(
    model: torch.nn.Module, device: str, amp: bool, ours: Losses, theirs: Losses, compared: slice, parts: Any
) -> Case:
    """Return the case of a training step; `compared` picks the losses that do not depend on random numbers."""
    own = use_cpu_products(copy.deepcopy(model))
    ours, theirs = (bfloat16(device, amp)(losses) for losses in (ours, theirs))

    @torch.no_grad()
    def difference() -> float:
        """Return the largest difference of the losses without dropout."""
        without_dropout = (copy.deepcopy(own).eval() for _ in range(2))
        found, expected = (losses(next(without_dropout))[compared] for losses in (ours, theirs))
        return largest_difference(found, expected, relative=amp)

    peers = {"released algorithm": training_step(model, theirs, plainly=True)}
    return Case(training_step(own, ours), peers, difference, parts)


def pretraining_step(device: str, amp: bool = False, size: Size = PRETRAINING, pairs: int = 8) -> Case:
    """Pairs at 224 px with texts of about 10 words, in one precision."""
    torch.manual_seed(0)
    model = BLIP_Pretrain(**size.settings).train().to(device)
    image, texts = size.images(pairs, device), word_texts(pairs)
    ours, theirs = lambda m: m(image, texts, 0.4), lambda m: plain.pretraining_losses(m, image, texts, 0.4)
    compared = slice(None, None, 2)  # matching draws its negatives at random; a test compares it
    return step_case(model, device, amp, ours, theirs, compared, pretraining_floor(model, texts))


def pretraining_floor(model: BLIP_Pretrain, texts: Sequence[str]) -> list[floor.Part]:
    """Return the least work of a step, with texts padded to the longest, and for the LM to its limit."""
    vit, text, pairs = model.visual_encoder, model.text_config, len(texts)
    length, tokens = max(len(model.tokenizer(t).input_ids) for t in texts), vit.pos_embed.shape[1]
    image = floor.vit(1, tokens, vit.embed_dim, len(vit.blocks), vit.patch_embed.patch_size[0])
    alone, language = floor.text(length, text), floor.text(MAX_TEXT_TOKENS, text, tokens)
    matching = [floor.text(length, text, tokens)] * 3
    forward = floor.together(
        image, floor.projection(tokens, text), alone, *matching, language, floor.head(MAX_TEXT_TOKENS - 1, text)
    )
    momentum = floor.together(image, alone)
    return [
        floor.Part(floor.TRAINING * pairs * forward.gflop, trained_weights(model)),
        floor.Part(pairs * momentum.gflop, floor.MOMENTUM_PASSES * momentum.weights),
    ]


def trained_weights(model: torch.nn.Module) -> float:
    """Return the parameters that a step reads and writes, in thousand millions, each as often as it must."""
    return floor.TRAINING_PASSES * sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9


def captioning_step(device: str, amp: bool = False, size: Size = BASE, images: int = 4) -> Case:
    """A captioning step at 384 px."""
    torch.manual_seed(0)
    model = BLIP_Decoder(**size.settings).train().to(device)
    image, texts = size.images(images, device), [f"a picture of {text}" for text in word_texts(images)]
    ours, theirs = lambda m: [m(image, texts)], lambda m: [plain.caption_loss(m, image, texts)]
    text, length = model.text_decoder.config, max(len(model.tokenizer(t).input_ids) for t in texts)
    forward = floor.together(
        floor.vit(1, size.tokens, *size.shape), floor.projection(size.tokens, text),
        floor.text(length, text, size.tokens), floor.head(length, text),
    )  # fmt: skip
    parts = [floor.Part(floor.TRAINING * images * forward.gflop, trained_weights(model))]
    return step_case(model, device, amp, ours, theirs, slice(None), parts)
