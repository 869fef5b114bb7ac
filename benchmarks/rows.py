"""The rows of the table: for each, both ways, what must be equal, and the least that must be computed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import floor
from inference.ranking import match_image, wanted_pairs
from models.blip import BLIP_Decoder
from models.blip_itm import BLIP_ITM
from models.blip_pretrain import MAX_TEXT_TOKENS, BLIP_Pretrain
from models.blip_vqa import BLIP_VQA
from models.cpu_products import use_cpu_products
from models.huggingface import from_huggingface
from tests import plain
from training.optimizer import create_optimizer

TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2  # of scores; of those above 1 in bfloat16, which has 8 bits, the share
SMALL_TEXT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}


@dataclass
class Case:
    """One row, ready to run.

    Attributes:
        ours, theirs: the two ways.
        difference: largest difference of their scores; raises where strings or ranks differ.
        floor: what must be done at least, by stages.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[], float]
    floor: list[floor.Part]


@dataclass(frozen=True)
class Row:
    """What a row is called, asked to reach, and made by; `amp` tells that ours runs in bfloat16, theirs in float32."""

    title: str
    at_least: float
    aim: float
    make: Callable[[str], Case]
    repeats: int = 5
    amp: bool = False

    @property
    def tolerance(self) -> float:
        """How far apart scores may be."""
        return TOLERANCE_BF16 if self.amp else TOLERANCE


def word_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts as long as COCO's captions, 10 or 11 words."""
    rng = np.random.default_rng(seed)
    words = ["a", "the", "man", "woman", "dog", "red", "table", "with", "on", "in", "of", "two", "plate", "field", "to"]
    return [" ".join(rng.choice(words, n)) for n in rng.normal(10.5, 2.4, count).round().clip(7, 25).astype(int)]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference."""
    return (found.float().cpu() - expected.float().cpu()).abs().max().item()


def mixed(device: str, amp: bool) -> torch.autocast:
    """Return bfloat16 for matrix products, or nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=amp)


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of several numbers."""
    return max(difference(a, b) for a, b in zip(found, expected, strict=True))


def shares_apart(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of numbers, relative to those above 1."""
    return max(difference(a, b) / max(1.0, abs(float(b))) for a, b in zip(found, expected, strict=True))


# Inference.


def captioning(device: str, amp: bool = False) -> Case:
    """Two images, beams of 3, 20 tokens, against Hugging Face in float32."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    config = BlipConfig(text_config={"initializer_range": 0.06, "num_attention_heads": 12, "encoder_hidden_size": 768})
    config.vision_config.layer_norm_eps = 1e-6
    theirs = BlipForConditionalGeneration(config).eval().to(device)
    ours = use_cpu_products(BLIP_Decoder().eval().to(device))
    missing = ours.load_state_dict(from_huggingface(theirs.state_dict()), strict=False).missing_keys
    assert not missing, missing
    image = torch.randn(2, 3, 384, 384, device=device)
    prompt = ours.tokenizer([ours.prompt] * 2, return_tensors="pt").input_ids.to(device)
    settings = {"num_beams": 3, "max_length": 20, "min_length": 20}

    @torch.no_grad()
    def ask() -> list[str]:
        found = theirs.generate(pixel_values=image, input_ids=prompt, do_sample=False, **settings)
        return [ours.tokenizer.decode(row, skip_special_tokens=True) for row in found]

    def answer() -> list[str]:
        with mixed(device, amp):
            return ours.generate(image, **settings)

    @torch.no_grad()
    def same() -> float:
        theirs = ask()
        if amp:  # beams of random weights lie too close for equal strings: the scores of one text are compared
            with mixed(device, True):
                fast = ours(image, theirs)
            return shares_apart([fast], [ours(image, theirs)])
        own, theirs = answer(), [text[len(ours.prompt) :] for text in theirs]  # ours drops as many characters
        assert own == theirs, (own, theirs)
        return 0.0

    text, new = ours.text_decoder.config, 20 - 5
    step = 2 * 3 * (floor.text(1, text, 577, 12) + floor.head(1, text))
    parts = [
        floor.Part(2 * floor.vit(577), floor.vit_weights()),
        floor.Part(2 * floor.projection(577, text), floor.projection_weights(text)),
        floor.Part(2 * floor.text(5, text, 577), floor.text_weights(text, True)),
        *[floor.Part(step, floor.text_weights(text, True) + floor.head_weights(text))] * new,
    ]
    return Case(answer, ask, same, parts)


def reranking(device: str) -> Case:
    """One image against 32 texts, which the released code pads to 35 tokens."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_ITM().eval().to(device))
    states, texts = torch.randn(1, 577, 768, device=device), word_texts(32)
    ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
    rows = [model.tokenizer(text).input_ids for text in texts]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return match_image(model, states, rows, 64)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return plain.match_logits(model, states.expand(32, -1, -1), ids, mask)

    text = model.text_encoder.config
    parts = [
        floor.Part(floor.projection(577, text), floor.projection_weights(text)),
        floor.Part(sum(floor.text(len(row), text, 577) for row in rows), floor.text_weights(text, True)),
    ]
    return Case(ours, theirs, lambda: difference(ours(), theirs()), parts)


def retrieval_evaluation(device: str, share: int = 100) -> Case:
    """A hundredth of 500 images x 2,500 texts, `small`: the pairs of 5 images, and of 25 texts the other way."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_ITM(med_config=SMALL_TEXT, vit="small").eval().to(device))
    images, texts, k = 500, word_texts(2500), 64
    states = torch.randn(images, 577, 384, device=device)
    image_feat, text_feat = (
        torch.nn.functional.normalize(torch.randn(n, 256, device=device), dim=-1) for n in (images, 2500)
    )
    ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
    rows = [model.tokenizer(text).input_ids for text in texts]
    own, similarity = torch.arange(0, images, share), image_feat @ text_feat.T
    to_texts, to_images = similarity[own].topk(k).indices.cpu(), similarity.T.topk(k).indices.cpu()

    @torch.no_grad()
    def ours() -> dict[int, torch.Tensor]:
        found = {}
        for image, wanted in zip(own.tolist(), wanted_pairs(to_texts, to_images, own), strict=True):
            logits = match_image(model, states[image : image + 1], [rows[t] for t in wanted], 64)
            scored = torch.full((2500,), -100.0, device=device)
            found[image] = scored.index_copy(0, wanted.to(device), logits + similarity[image, wanted.to(device)])
        return found

    @torch.no_grad()
    def theirs() -> list[torch.Tensor]:
        rows = [plain.image_scores(model, states[i : i + 1], image_feat[i], ids, mask, text_feat, k) for i in own]
        for t in range(0, 2500, share):
            plain.text_scores(model, ids[t : t + 1], mask[t : t + 1], text_feat[t], states, image_feat, k)
        return rows

    def same() -> float:
        found, expected = ours(), theirs()
        picked = zip(own.tolist(), to_texts, expected, strict=True)
        return max(difference(found[i][best.to(device)], row[best.to(device)]) for i, best, row in picked)

    text = model.text_encoder.config
    asked = wanted_pairs(to_texts, to_images, own)
    parts = [floor.Part(len(own) * floor.projection(577, text), floor.projection_weights(text))]
    parts += [
        floor.Part(sum(floor.text(len(rows[t]), text, 577) for t in wanted), floor.text_weights(text, True))
        for wanted in asked
    ]
    return Case(ours, theirs, same, parts)


def answer_tokens(model: BLIP_VQA, count: int = 3128, longest: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of candidate answers: mostly one or two tokens, the longest 8, many with one beginning."""
    rng, tokenizer = np.random.default_rng(0), model.tokenizer
    lengths = rng.choice(np.arange(1, longest + 1), count, p=[0.55, 0.3, 0.09, 0.03, 0.015, 0.008, 0.005, 0.002])
    lengths[0] = longest
    beginnings = rng.choice(np.arange(1000, 29000), count // 2, replace=False)
    ids = torch.full((count, longest + 2), tokenizer.pad_token_id)
    ids[:, 0] = tokenizer.bos_token_id
    for row, length in enumerate(lengths):
        answer = rng.integers(1000, 29000, length)
        answer[0] = rng.choice(beginnings)
        ids[row, 1 : length + 1], ids[row, length + 1] = torch.from_numpy(answer), tokenizer.sep_token_id
    return ids, (ids != tokenizer.pad_token_id).long()


def answer_ranking(device: str, smooth_padding: bool) -> Case:
    """Two questions of 12 tokens, 128 of 3,128 candidates, without the ViT."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_VQA(smooth_padding=smooth_padding).eval().to(device))
    ids, mask = (x.to(device) for x in answer_tokens(model))
    states, k = torch.randn(2, 12, 768, device=device), 128
    seen = torch.ones(2, 12, dtype=torch.long, device=device)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return model.rank_losses(states, seen, ids, k)[0]

    def theirs() -> torch.Tensor:
        return plain.rank_answers(model, states, seen, ids, mask, k)[1]

    def same() -> float:
        expected = plain.rank_answers(model, states, seen, ids, mask, k)[0]
        assert torch.equal(model.rank_answer(states, seen, ids, mask, k), expected)
        return difference(ours(), theirs())

    text = model.text_decoder.config
    _, chosen = model.rank_losses(states, seen, ids, k)
    tokens = sum(needed_tokens(ids[row], mask[row], smooth_padding) for row in chosen)
    work = 2 * floor.projection(12, text) + floor.text(tokens, text, 12, 6) + floor.head(tokens, text)
    weights = floor.projection_weights(text) + 2 * (floor.text_weights(text, True) + floor.head_weights(text))
    return Case(ours, theirs, same, [floor.Part(work, weights)])


def needed_tokens(ids: torch.Tensor, mask: torch.Tensor, padding: bool) -> int:
    """Return how many positions must be computed: each distinct beginning once, and padding where it counts."""
    rows = [row[: int(seen.sum())].tolist()[:-1] for row, seen in zip(ids, mask, strict=True)]
    distinct = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    # a text's positions from its end token on, but for the last, predict nothing but the smoothing term
    return len(distinct) + (sum(ids.shape[1] - 1 - len(row) for row in rows) if padding else 0)


# Training.


def training_step(model: torch.nn.Module, losses: Callable[[torch.nn.Module], Sequence[torch.Tensor]], plainly: bool):
    """Return a whole step: losses, gradients, AdamW."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-6, foreach=False) if plainly else create_optimizer(model, 1e-6, 0.05)

    def step() -> float:
        optimizer.zero_grad(set_to_none=not plainly)
        loss = sum(losses(model))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def loss_difference(
    model: torch.nn.Module,
    ours: Callable[[torch.nn.Module], Any],
    theirs: Callable[[torch.nn.Module], Any],
    apart: Callable[..., float] | None = None,
) -> float:
    """Return how far the losses of two ways are apart, without dropout; the model is not changed."""
    with torch.no_grad():
        one, other = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        return (apart or largest_difference)(ours(one), theirs(other))


def pretraining_step(device: str, amp: bool = False) -> Case:
    """Eight pairs at 224 px with texts of about 10 words; theirs in float32."""
    torch.manual_seed(0)
    model = BLIP_Pretrain().train().to(device)
    image, texts = torch.randn(8, 3, 224, 224, device=device), word_texts(8)
    other = copy.deepcopy(model)

    def ours(model: BLIP_Pretrain) -> tuple[torch.Tensor, ...]:
        with mixed(device, amp):
            return model(image, texts, 0.4)

    def contrast_and_language(losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [losses[0], losses[2]]  # matching draws its negatives at random; its equality is tested apart

    def same() -> float:
        return loss_difference(
            model,
            lambda m: contrast_and_language(ours(m)),
            lambda m: contrast_and_language(plain.pretraining_losses(m, image, texts, 0.4)),
            shares_apart if amp else None,
        )

    return Case(
        training_step(model, ours, plainly=False),
        training_step(other, lambda m: plain.pretraining_losses(m, image, texts, 0.4), plainly=True),
        same,
        pretraining_floor(model, texts),
    )


def pretraining_floor(model: BLIP_Pretrain, texts: Sequence[str]) -> list[floor.Part]:
    """Return the least that a step must do, with texts padded to the longest and, for the LM, to its limit."""
    vit, text, pairs = model.visual_encoder, model.text_config, len(texts)
    length, tokens = max(len(model.tokenizer(t).input_ids) for t in texts), vit.pos_embed.shape[1]
    shape = (vit.embed_dim, len(vit.blocks), vit.patch_embed.patch_size[0])
    image = floor.vit(tokens, *shape)
    matching = 3 * floor.text(length, text, tokens)
    language = floor.text(MAX_TEXT_TOKENS, text, tokens) + floor.head(MAX_TEXT_TOKENS - 1, text)
    forward = image + floor.projection(tokens, text) + floor.text(length, text) + matching + language
    twin = floor.vit_weights(*shape) + floor.text_weights(text, False)
    return [
        floor.Part(floor.TRAINING * pairs * forward, trained_weights(model)),
        floor.Part(pairs * (image + floor.text(length, text)), floor.TWIN_PASSES * twin),
    ]


def trained_weights(model: torch.nn.Module) -> float:
    """Return the parameters that a step must fetch and write, in thousand millions."""
    return floor.TRAINING_PASSES * sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9


def captioning_step(device: str) -> Case:
    """Four images at 384 px."""
    torch.manual_seed(0)
    model = BLIP_Decoder().train().to(device)
    image, texts = torch.randn(4, 3, 384, 384, device=device), [f"a picture of {text}" for text in word_texts(4)]
    other = copy.deepcopy(model)
    text, length = model.text_decoder.config, max(len(model.tokenizer(t).input_ids) for t in texts)
    forward = floor.vit(577) + floor.projection(577, text) + floor.text(length, text, 577) + floor.head(length, text)
    return Case(
        training_step(model, lambda m: [m(image, texts)], plainly=False),
        training_step(other, lambda m: [plain.caption_loss(m, image, texts)], plainly=True),
        lambda: loss_difference(model, lambda m: [m(image, texts)], lambda m: [plain.caption_loss(m, image, texts)]),
        [floor.Part(floor.TRAINING * 4 * forward, trained_weights(model))],
    )


ROWS = {
    "captioning": Row("captioning 2 images, beam 3, 20 tokens, against Hugging Face", 1.5, 1.7, captioning),
    "reranking": Row("re-ranking one image against 32 texts", 6, 8, reranking, 3),
    "retrieval": Row("retrieval evaluation, a hundredth of 500 x 2,500, k 64, small", 6, 8, retrieval_evaluation, 2),
    "vqa": Row("VQA ranking without the ViT", 4, 5, lambda device: answer_ranking(device, False), 3),
    "vqa_padding": Row("the same, smooth_padding", 1.2, 1.4, lambda device: answer_ranking(device, True), 3),
    "pretraining": Row("pretraining step, 8 pairs", 1.5, 1.8, pretraining_step, 3),
    "captioning_step": Row("captioning step, 4 images", 1.1, 1.2, captioning_step, 3),
    "captioning_bf16": Row(
        "captioning in bfloat16, against Hugging Face in float32", 3, 3, lambda d: captioning(d, True), 5, True
    ),
    "pretraining_bf16": Row(
        "pretraining step in bfloat16, theirs in float32", 2.5, 3.5, lambda d: pretraining_step(d, True), 3, True
    ),
}
