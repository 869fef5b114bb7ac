"""Rows of inference: captioning, the image encoder, re-ranking, retrieval evaluation, VQA ranking."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import floor
from benchmarks.case import BASE, SMALL, Case, Size, Work, bfloat16, difference_of, largest_difference, word_texts
from inference.ranking import match_image, wanted_pairs
from models.blip import BLIP_Base, BLIP_Decoder
from models.blip_itm import BLIP_ITM
from models.blip_vqa import BLIP_VQA
from models.cpu_products import use_cpu_products
from models.huggingface import from_huggingface, to_huggingface
from tests import plain

BEAMS, LENGTH = 3, 20


def build(model_class: type, size: Size, device: str, **settings: Any) -> Any:
    """Return a model for inference with random weights, the same in each call."""
    torch.manual_seed(0)
    return use_cpu_products(model_class(**size.settings, **settings).eval().to(device))


def inference(device: str, amp: bool, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return the work without gradients, and in bfloat16 if asked."""
    return torch.no_grad()(bfloat16(device, amp)(work))


def huggingface_config(size: Size) -> Any:
    """Return transformers' configuration of a size."""
    from transformers import BlipConfig

    width, depth, patch_size = size.shape
    text = {"num_attention_heads": 12, **size.text, "initializer_range": 0.06, "encoder_hidden_size": width}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "layer_norm_eps": 1e-6}
    vision |= {"patch_size": patch_size, "image_size": size.image_size, "num_attention_heads": width // 64}
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256)


def captioning(device: str, amp: bool = False, size: Size = BASE, images: int = 2) -> Case:
    """Captions by beam search, against transformers in the same precision."""
    from transformers import BlipForConditionalGeneration

    ours = build(BLIP_Decoder, size, device)
    theirs = BlipForConditionalGeneration(huggingface_config(size)).eval().to(device)
    missing = ours.load_state_dict(from_huggingface(theirs.state_dict()), strict=False).missing_keys
    assert not missing, missing
    image, settings = size.images(images, device), {"num_beams": BEAMS, "max_length": LENGTH, "min_length": LENGTH}
    prompt = ours.tokenizer([ours.prompt] * images, return_tensors="pt").input_ids.to(device)

    @torch.no_grad()
    def generate(model: Any) -> list[str]:
        """Return captions of a model of transformers."""
        pixels = image.to(next(model.parameters()).dtype)
        rows = model.generate(pixel_values=pixels, input_ids=prompt, do_sample=False, **settings)
        return [ours.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    caption = inference(device, amp, lambda: ours.generate(image, **settings))

    def difference() -> float:
        """Return the largest difference; AssertionError where strings or ranks differ."""
        texts = generate(theirs)
        if amp:  # beams of random weights lie too close for equal strings, so the loss of one text is compared
            losses = (inference(device, in_bfloat16, ours)(image, texts) for in_bfloat16 in (True, False))
            return largest_difference([next(losses)], [next(losses)], relative=True)
        captions = caption()
        assert captions == [text[len(ours.prompt) :] for text in texts], (captions, texts)
        return 0.0

    dtype = torch.bfloat16 if amp else torch.float32
    compiled = copy.deepcopy(theirs).to(dtype)
    compiled.vision_model.forward = torch.compile(compiled.vision_model.forward)
    models = {"transformers": theirs, "transformers, image encoder compiled": compiled}
    if amp:
        models["transformers in bfloat16"] = copy.deepcopy(theirs).to(dtype)
    peers = {name: lambda model=model: generate(model) for name, model in models.items()}
    return Case(caption, peers, difference, captioning_floor(ours, size, images))


def captioning_floor(model: BLIP_Decoder, size: Size, images: int) -> list[floor.Part]:
    """Return the least work of captions of LENGTH tokens, prompt (5 tokens) included."""
    text, tokens = model.text_decoder.config, size.tokens
    rows = images * BEAMS
    layers, words = floor.text(1, text, tokens, 12), floor.head(1, text)
    step = floor.Part(rows * (layers.gflop + words.gflop), layers.weights + words.weights)
    reading = floor.text(5, text, tokens)
    return [
        floor.vit(images, tokens, *size.shape),
        floor.projection(images * tokens, text),
        floor.Part(images * reading.gflop, reading.weights),
        *[step] * (LENGTH - 5),
    ]


def image_encoder(device: str, size: Size = BASE, images: int = 4) -> Case:
    """The image encoder, against compiled PyTorch, ONNX Runtime and OpenVINO where they are installed."""
    own, model = build(BLIP_Base, size, device).visual_encoder, build(BLIP_Base, size, device).visual_encoder
    use_cpu_products(model, "torch")
    image, compiled = size.images(images, device), torch.compile(model)
    ways = {"PyTorch": lambda: model(image), "PyTorch, compiled": lambda: compiled(image)}
    peers: dict[str, Work] = {name: inference(device, False, way) for name, way in ways.items()}
    if device == "cpu":
        peers |= onnx_peers(model, image)
    ours = inference(device, False, lambda: own(image))
    return Case(ours, peers, difference_of(ours, [*peers.values()]), [floor.vit(images, size.tokens, *size.shape)])


def onnx_peers(model: torch.nn.Module, image: torch.Tensor) -> dict[str, Work]:
    """Return the model run by ONNX Runtime and by OpenVINO, those that are installed."""
    peers: dict[str, Work] = {}
    try:
        import onnxruntime
    except ImportError:
        return peers
    with tempfile.TemporaryDirectory() as folder:
        path, threads = str(Path(folder) / "vit.onnx"), torch.get_num_threads()
        torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name, array = session.get_inputs()[0].name, image.numpy()
        peers["ONNX Runtime"] = lambda: session.run(None, {name: array})[0]
        try:
            import openvino
        except ImportError:
            return peers
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        network = openvino.Core().compile_model(path, "CPU", settings)
        peers["OpenVINO"] = lambda: network(array)[0]
    return peers


def reranking(device: str, amp: bool = False, size: Size = BASE, count: int = 32) -> Case:
    """One image against texts, which the released code pads to 35 tokens."""
    from transformers import BlipForImageTextRetrieval

    model = build(BLIP_ITM, size, device)
    states, texts = torch.randn(1, size.tokens, size.shape[0], device=device), word_texts(count)
    ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
    rows, all_states = [model.tokenizer(text).input_ids for text in texts], states.expand(count, -1, -1)
    theirs = BlipForImageTextRetrieval(huggingface_config(size)).eval().to(device)
    theirs.load_state_dict(to_huggingface(model.state_dict()), strict=False)

    def by_transformers() -> torch.Tensor:
        """Return the logits of matches by transformers."""
        hidden = theirs.text_encoder(ids, mask, encoder_hidden_states=all_states, return_dict=True).last_hidden_state
        return theirs.itm_head(hidden[:, 0])[:, 1]

    ours = inference(device, amp, lambda: match_image(model, states, rows, 64))
    peers = {
        "released algorithm": inference(device, amp, lambda: plain.match_logits(model, all_states, ids, mask)),
        "transformers": inference(device, amp, by_transformers),
    }
    text = model.text_encoder.config
    parts = [floor.projection(size.tokens, text), matching_floor(rows, size, text)]
    return Case(ours, peers, difference_of(ours, [*peers.values()], relative=amp), parts)


def matching_floor(rows: list[list[int]], size: Size, text: Any) -> floor.Part:
    """Return the least work of texts that attend to one image."""
    parts = [floor.text(len(row), text, size.tokens) for row in rows]
    return floor.together(*parts, weights=parts[0].weights)


def retrieval_evaluation(device: str, share: int = 100, size: Size = SMALL) -> Case:
    """A hundredth of 500 images x 2,500 texts: the pairs of 5 images, and of 25 texts the other way."""
    model = build(BLIP_ITM, size, device)
    images, texts, k = 500, word_texts(2500), 64
    states = torch.randn(images, size.tokens, size.shape[0], device=device)
    image_feat, text_feat = (F.normalize(torch.randn(n, 256, device=device), dim=-1) for n in (images, 2500))
    ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
    rows = [model.tokenizer(text).input_ids for text in texts]
    own, similarity = torch.arange(0, images, share), image_feat @ text_feat.T
    to_texts, to_images = similarity[own].topk(k).indices.cpu(), similarity.T.topk(k).indices.cpu()

    def score() -> list[torch.Tensor]:
        """Return a row of scores for each image."""
        found = []
        for image, wanted in zip(own.tolist(), wanted_pairs(to_texts, to_images, own), strict=True):
            logits = match_image(model, states[image : image + 1], [rows[t] for t in wanted], 64)
            index = torch.tensor(wanted, device=device)
            scored = torch.full((2500,), -100.0, device=device)
            found.append(scored.index_copy(0, index, logits + similarity[image, index]))
        return found

    def plainly() -> list[torch.Tensor]:
        """Return the same by the released algorithm."""
        scored = [plain.image_scores(model, states[i : i + 1], image_feat[i], ids, mask, text_feat, k) for i in own]
        for t in range(0, 2500, share):
            plain.text_scores(model, ids[t : t + 1], mask[t : t + 1], text_feat[t], states, image_feat, k)
        return scored

    def of_best(scored: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the scores of the k best texts of each image."""
        return [row[best.to(device)] for best, row in zip(to_texts, scored, strict=True)]

    ours, theirs = (inference(device, False, way) for way in (score, plainly))
    parts = [floor.projection(len(own) * size.tokens, model.text_encoder.config)]
    for wanted in wanted_pairs(to_texts, to_images, own):
        parts.append(matching_floor([rows[t] for t in wanted], size, model.text_encoder.config))
    peers = {"released algorithm": theirs}
    return Case(ours, peers, lambda: largest_difference(of_best(ours()), of_best(theirs())), parts)


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
    model = build(BLIP_VQA, size, device, smooth_padding=smooth_padding)
    text = model.text_decoder.config
    ids, mask = (x.to(device) for x in answer_tokens(model))
    states = torch.randn(2, 12, text.hidden_size, device=device)
    seen = torch.ones(2, 12, dtype=torch.long, device=device)
    rank = inference(device, amp, lambda count: model.rank_losses(states, seen, ids[:count], k))
    rank_plainly = inference(
        device, amp, lambda count: plain.rank_answers(model, states, seen, ids[:count], mask[:count], k)
    )

    @torch.no_grad()
    def difference() -> float:
        """Return the largest difference; AssertionError where strings or ranks differ."""
        if amp:  # rounding changes which of many candidates are the k best, so k are given
            exact = plain.rank_answers(model, states, seen, ids[:k], mask[:k], k)[1]
            return largest_difference([rank(k)[0].sort().values], [exact.sort().values], relative=True)
        best, losses = rank_plainly(None)
        assert torch.equal(model.rank_answer(states, seen, ids, mask, k), best)
        return largest_difference([rank(None)[0]], [losses])

    tokens = sum(needed_tokens(ids[row], mask[row], smooth_padding) for row in rank(None)[1])
    once = floor.text(1, text, 12).weights + floor.head(1, text).weights
    parts = floor.projection(24, text), floor.text(tokens, text, 12, 6), floor.head(tokens, text)
    least = floor.together(*parts, weights=parts[0].weights + 2 * once)
    return Case(lambda: rank(None), {"released algorithm": lambda: rank_plainly(None)}, difference, [least])


def needed_tokens(ids: torch.Tensor, mask: torch.Tensor, padding: bool) -> int:
    """Return the number of positions to compute: each distinct beginning once, and padding where it counts."""
    rows = [row[: int(seen.sum())].tolist()[:-1] for row, seen in zip(ids, mask, strict=True)]
    distinct = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    # the positions from the end token on, except the last, count only for the smoothing term
    return len(distinct) + (sum(ids.shape[1] - 1 - len(row) for row in rows) if padding else 0)
