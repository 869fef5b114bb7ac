"""Rows of inference: captioning, the image encoder, re-ranking, retrieval evaluation, VQA ranking."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import floor
from benchmarks.case import BASE, SMALL, Case, Size, bfloat16, largest_difference, word_texts
from inference.ranking import match_image, wanted_pairs
from models.blip import BLIP_Base, BLIP_Decoder
from models.blip_itm import BLIP_ITM
from models.blip_vqa import BLIP_VQA
from models.cpu_products import use_cpu_products
from models.huggingface import from_huggingface, to_huggingface
from tests import plain

BEAMS, LENGTH = 3, 20


def huggingface_config(size: Size) -> Any:
    """Return transformers' configuration of a size."""
    from transformers import BlipConfig

    width, depth, patch_size = size.shape
    text = {"num_attention_heads": 12} | dict(size.text)
    text |= {"initializer_range": 0.06, "encoder_hidden_size": width}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "layer_norm_eps": 1e-6}
    vision |= {"patch_size": patch_size, "image_size": size.image_size, "num_attention_heads": width // 64}
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256)


def captioning(device: str, amp: bool = False, size: Size = BASE, images: int = 2) -> Case:
    """Captions by beam search, against transformers in the same precision."""
    from transformers import BlipForConditionalGeneration

    torch.manual_seed(0)
    theirs = BlipForConditionalGeneration(huggingface_config(size)).eval().to(device)
    ours = use_cpu_products(BLIP_Decoder(**size.settings).eval().to(device))
    missing = ours.load_state_dict(from_huggingface(theirs.state_dict()), strict=False).missing_keys
    assert not missing, missing
    image = torch.randn(images, 3, size.image_size, size.image_size, device=device)
    prompt = ours.tokenizer([ours.prompt] * images, return_tensors="pt").input_ids.to(device)
    settings = {"num_beams": BEAMS, "max_length": LENGTH, "min_length": LENGTH}

    def generate(model: Any, dtype: torch.dtype = torch.float32) -> list[str]:
        with torch.no_grad():
            rows = model.generate(pixel_values=image.to(dtype), input_ids=prompt, do_sample=False, **settings)
        return [ours.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def caption() -> list[str]:
        with bfloat16(device, amp):
            return ours.generate(image, **settings)

    @torch.no_grad()
    def difference() -> float:
        texts = generate(theirs)
        if amp:  # beams of random weights lie too close for equal strings, so the loss of one text is compared
            with bfloat16(device, True):
                loss = ours(image, texts)
            return largest_difference([loss], [ours(image, texts)], relative=True)
        captions = caption()
        assert captions == [text[len(ours.prompt) :] for text in texts], (captions, texts)
        return 0.0

    peers = {"transformers": lambda: generate(theirs)}
    if amp:
        half = BlipForConditionalGeneration(theirs.config).eval().to(device, torch.bfloat16)
        half.load_state_dict(theirs.state_dict())
        peers = {"transformers in bfloat16": lambda: generate(half, torch.bfloat16), **peers}
    compiled = BlipForConditionalGeneration(theirs.config).eval().to(device, torch.bfloat16 if amp else torch.float32)
    compiled.load_state_dict(theirs.state_dict())
    compiled.vision_model.forward = torch.compile(compiled.vision_model.forward)
    peers["transformers, image encoder compiled"] = lambda: generate(compiled, next(compiled.parameters()).dtype)
    return Case(caption, peers, difference, captioning_floor(ours, size, images))


def captioning_floor(model: BLIP_Decoder, size: Size, images: int) -> list[floor.Part]:
    """Return the least work of captions of LENGTH tokens, of which the prompt has 5."""
    text, tokens = model.text_decoder.config, size.tokens
    step = images * BEAMS * (floor.text(1, text, tokens, 12) + floor.head(1, text))
    weights = floor.text_weights(text, True)
    return [
        size.vit_floor(images),
        size.projection_floor(images, text),
        floor.Part(images * floor.text(5, text, tokens), weights),
        *[floor.Part(step, weights + floor.head_weights(text))] * (LENGTH - 5),
    ]


def image_encoder(device: str, size: Size = BASE, images: int = 4) -> Case:
    """The image encoder, against compiled PyTorch, ONNX Runtime and OpenVINO where they are installed."""
    torch.manual_seed(0)
    model = BLIP_Base(**size.settings).eval().to(device).visual_encoder
    image = torch.randn(images, 3, size.image_size, size.image_size, device=device)
    compiled = torch.compile(model)
    peers = {
        "PyTorch": torch.no_grad()(lambda: model(image)),
        "PyTorch, compiled": torch.no_grad()(lambda: compiled(image)),
    }
    if device == "cpu":
        peers |= onnx_peers(model, image)
    own = use_cpu_products(BLIP_Base(**size.settings).eval().to(device).visual_encoder)
    own.load_state_dict(model.state_dict())
    ours = torch.no_grad()(lambda: own(image))

    def difference() -> float:
        found = ours()
        return max(largest_difference([found], [torch.as_tensor(peer())]) for peer in peers.values())

    return Case(ours, peers, difference, [size.vit_floor(images)])


def onnx_peers(model: torch.nn.Module, image: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the model run by ONNX Runtime and by OpenVINO, those that are installed."""
    peers: dict[str, Callable[[], Any]] = {}
    try:
        import onnxruntime
    except ImportError:
        return peers
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "vit.onnx")
        torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name, array = session.get_inputs()[0].name, image.numpy()
        peers["ONNX Runtime"] = lambda: session.run(None, {name: array})[0]
        try:
            import openvino
        except ImportError:
            return peers
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        network = openvino.Core().compile_model(path, "CPU", settings)
        peers["OpenVINO"] = lambda: network(array)[0]
    return peers


def reranking(device: str, amp: bool = False, size: Size = BASE, count: int = 32) -> Case:
    """One image against texts, which the released code pads to 35 tokens."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_ITM(**size.settings).eval().to(device))
    states, texts = torch.randn(1, size.tokens, size.shape[0], device=device), word_texts(count)
    ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
    rows = [model.tokenizer(text).input_ids for text in texts]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        with bfloat16(device, amp):
            return match_image(model, states, rows, 64)

    @torch.no_grad()
    def plainly() -> torch.Tensor:
        with bfloat16(device, amp):
            return plain.match_logits(model, states.expand(count, -1, -1), ids, mask)

    transformers = huggingface_matcher(model, size, device)

    @torch.no_grad()
    def by_transformers() -> torch.Tensor:
        with bfloat16(device, amp):
            return transformers(ids, mask, states.expand(count, -1, -1))

    def difference() -> float:
        return max(largest_difference([ours()], [way()], relative=amp) for way in (plainly, by_transformers))

    text = model.text_encoder.config
    parts = [
        size.projection_floor(1, text),
        floor.Part(sum(floor.text(len(row), text, size.tokens) for row in rows), floor.text_weights(text, True)),
    ]
    return Case(ours, {"released algorithm": plainly, "transformers": by_transformers}, difference, parts)


def huggingface_matcher(model: BLIP_ITM, size: Size, device: str) -> Callable[..., torch.Tensor]:
    """Return transformers' matching head: (ids, mask, image tokens) -> logit of a match minus that of none."""
    from transformers import BlipForImageTextRetrieval

    theirs = BlipForImageTextRetrieval(huggingface_config(size)).eval().to(device)
    theirs.load_state_dict(to_huggingface(model.state_dict()), strict=False)

    def match(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        hidden = theirs.text_encoder(ids, mask, encoder_hidden_states=states, return_dict=True).last_hidden_state
        return theirs.itm_head(hidden[:, 0])[:, 1]

    return match


def retrieval_evaluation(device: str, share: int = 100, size: Size = SMALL) -> Case:
    """A hundredth of 500 images x 2,500 texts: the pairs of 5 images, and of 25 texts the other way."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_ITM(**size.settings).eval().to(device))
    images, texts, k = 500, word_texts(2500), 64
    states = torch.randn(images, size.tokens, size.shape[0], device=device)
    image_feat, text_feat = (F.normalize(torch.randn(n, 256, device=device), dim=-1) for n in (images, 2500))
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
            index = torch.tensor(wanted, device=device)
            found[image] = scored.index_copy(0, index, logits + similarity[image, index])
        return found

    @torch.no_grad()
    def theirs() -> list[torch.Tensor]:
        rows = [plain.image_scores(model, states[i : i + 1], image_feat[i], ids, mask, text_feat, k) for i in own]
        for t in range(0, 2500, share):
            plain.text_scores(model, ids[t : t + 1], mask[t : t + 1], text_feat[t], states, image_feat, k)
        return rows

    def difference() -> float:
        found, expected = ours(), theirs()
        picked = zip(own.tolist(), to_texts, expected, strict=True)
        return max(largest_difference([found[i][best.to(device)]], [row[best.to(device)]]) for i, best, row in picked)

    text = model.text_encoder.config
    parts = [size.projection_floor(len(own), text)]
    for wanted in wanted_pairs(to_texts, to_images, own):
        work = sum(floor.text(len(rows[t]), text, size.tokens) for t in wanted)
        parts.append(floor.Part(work, floor.text_weights(text, True)))
    return Case(ours, {"released algorithm": theirs}, difference, parts)


def answer_tokens(model: BLIP_VQA, count: int = 3128, longest: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of candidate answers: mostly one or two tokens, at most 8, many with one beginning."""
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


def answer_ranking(device: str, smooth_padding: bool, amp: bool = False, size: Size = BASE, k: int = 128) -> Case:
    """Two questions of 12 tokens, k of 3,128 candidates, without the ViT."""
    torch.manual_seed(0)
    model = use_cpu_products(BLIP_VQA(**size.settings, smooth_padding=smooth_padding).eval().to(device))
    text = model.text_decoder.config
    ids, mask = (x.to(device) for x in answer_tokens(model))
    states = torch.randn(2, 12, text.hidden_size, device=device)
    seen = torch.ones(2, 12, dtype=torch.long, device=device)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        with bfloat16(device, amp):
            return model.rank_losses(states, seen, ids, k)[0]

    def theirs() -> torch.Tensor:
        with bfloat16(device, amp):
            return plain.rank_answers(model, states, seen, ids, mask, k)[1]

    @torch.no_grad()
    def difference() -> float:
        if amp:  # rounding changes which of many candidates are the k best, so k are given
            with bfloat16(device, True):
                found = model.rank_losses(states, seen, ids[:k], k)[0].sort().values
            expected = plain.rank_answers(model, states, seen, ids[:k], mask[:k], k)[1].sort().values
            return largest_difference([found], [expected], relative=True)
        expected = plain.rank_answers(model, states, seen, ids, mask, k)[0]
        assert torch.equal(model.rank_answer(states, seen, ids, mask, k), expected)
        return largest_difference([ours()], [theirs()])

    _, chosen = model.rank_losses(states, seen, ids, k)
    tokens = sum(needed_tokens(ids[row], mask[row], smooth_padding) for row in chosen)
    work = 2 * floor.projection(12, text) + floor.text(tokens, text, 12, 6) + floor.head(tokens, text)
    weights = floor.projection_weights(text) + 2 * (floor.text_weights(text, True) + floor.head_weights(text))
    return Case(ours, {"released algorithm": theirs}, difference, [floor.Part(work, weights)])


def needed_tokens(ids: torch.Tensor, mask: torch.Tensor, padding: bool) -> int:
    """Return the number of positions to compute: each distinct beginning once, and padding where it counts."""
    rows = [row[: int(seen.sum())].tolist()[:-1] for row, seen in zip(ids, mask, strict=True)]
    distinct = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    # the positions from the end token on, except the last, count only for the smoothing term
    return len(distinct) + (sum(ids.shape[1] - 1 - len(row) for row in rows) if padding else 0)
