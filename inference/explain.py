"""Maps of an image's relevance for each word of a text, from cross-attention or Grad-CAM.

Grad-CAM multiplies the attention of a layer by the gradient of the explained score: the matching logit, or the
log-probability of a caption word or of an answer (after section 3.1 of Selvaraju et al., Grad-CAM, ICCV 2017,
with attention in place of activations).
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.images import ImageSource, as_rgb
from data.text import pre_question
from files import write_whole
from inference.predictor import MAX_WORDS, Predictor, Row
from inference.tasks import Answerer, Captioner, Matcher
from models.attention import Projection
from models.blip_vqa import MAX_QUESTION_TOKENS
from models.med import TextDecoder, TextTransformer
from models.tokenizer import TokenBatch, tokenize
from utils import UserError

WHOLE = "(all)"  # names the map of the text as a whole
COLORS = ((0, (30, 30, 160)), (0.35, (0, 180, 220)), (0.65, (250, 230, 60)), (1, (220, 30, 20)))
TILE = 224  # pixels of the longer side of an image in a sheet
Maps = list[tuple[str, np.ndarray]]


def explain(
    model: Predictor, image: ImageSource, text: str, answer: str = "", method: str = "gradcam", layer: int | None = None
) -> Maps:
    """Return a map for the text as a whole, and one for each of its words.

    Args:
        model: a `Captioner`, `Matcher` or `Answerer`.
        image: in any form that `data.images.as_rgb` takes.
        text: the caption, the text matched, or the question.
        answer: what was answered, for an `Answerer`; the caption's own prompt, if any, for a `Captioner`.
        method: "gradcam", or "attention", the mean over heads.
        layer: of the text transformer that reads the image, 0 first; None: the one at 2/3 of the depth.

    Returns:
        (word, float32 (grid, grid)) pairs; non-negative, of each image patch.

    Raises:
        UserError: another method, no such layer, a text without words, or a model that reads no text.
    """
    if method not in ("gradcam", "attention"):
        raise UserError(f"method is {method!r}; expected 'gradcam' or 'attention'")
    pixels = model.transform(as_rgb(image))[None].to(model.device)
    with torch.enable_grad():
        if isinstance(model, Captioner):
            maps = _explain_caption(model, pixels, text, answer or model.model.prompt, method, layer)
        elif isinstance(model, Matcher | Answerer):
            maps = _explain_text(model, pixels, text, answer, method, layer)
        else:
            raise UserError(f"a {type(model).__name__} reads no text; explain captions, matches or answers")
    if not maps:
        raise UserError("the text has no word to explain; give one")
    return [(WHOLE, np.mean([grid for _, grid in maps], axis=0)), *maps]


def _explain_caption(
    model: Captioner, pixels: torch.Tensor, caption: str, prompt: str, method: str, layer: int | None
) -> Maps:
    net = model.model
    text = tokenize(net.tokenizer, prompt + caption, "dec", device=model.device)
    with recorded(net.text_decoder.bert, layer) as recording:
        projection = net.text_decoder.bert.project(net.visual_encoder(pixels))
        log_probs = token_log_probs(net.text_decoder, text.input_ids, projection)
    maps = []
    for word, places in words_of(net.tokenizer, text, len(net.tokenizer(prompt).input_ids) - 1):
        before = [place - 1 for place in places]  # a token is predicted at the position before it
        relevance = weigh(recording[0], log_probs[before].sum(), method)
        maps.append((word, to_grid(relevance[before])))
    return maps


def _explain_text(
    model: Matcher | Answerer, pixels: torch.Tensor, text: str, answer: str, method: str, layer: int | None
) -> Maps:
    """Explain the matching logit of a text, or the log-probability of the answer to a question."""
    net = model.model
    if isinstance(model, Matcher):
        tokens = model.tokens_of([text], net.first_token)
    else:
        tokens = tokenize(net.tokenizer, pre_question(text, MAX_WORDS), "enc", MAX_QUESTION_TOKENS, model.device)
    with recorded(net.text_encoder, layer) as recording:
        hidden = net.text_encoder(*tokens, net.text_encoder.project(net.visual_encoder(pixels)))
    if isinstance(model, Matcher):
        no_match, match = net.itm_head(hidden[0, 0])
        score = match - no_match
    else:
        ids = tokenize(net.tokenizer, answer, "dec", device=model.device).input_ids
        score = token_log_probs(net.text_decoder, ids, net.text_decoder.bert.project(hidden)).sum()
    relevance = weigh(recording[0], score, method)
    return [(word, to_grid(relevance[places])) for word, places in words_of(net.tokenizer, tokens)]


def token_log_probs(decoder: TextDecoder, ids: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Return the log-probability (length - 1,) of each token of one text (1, length) after the first."""
    hidden = decoder.hidden_states(ids, projection=projection)
    return decoder.logits(hidden[0, :-1]).log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]


@contextmanager
def recorded(text: TextTransformer, layer: int | None) -> Iterator[list[torch.Tensor]]:
    """Record a layer's attention to the image, (1, heads, length, 1 + patches) per forward; UserError for no layer."""
    layers = text.encoder.layer
    layer = max(2 * len(layers) // 3 - 1, 0) if layer is None else layer
    if not 0 <= layer < len(layers):
        raise UserError(f"layer is {layer}; this text transformer has layers 0 to {len(layers) - 1}")
    attention = layers[layer].crossattention
    attention.recording = []
    try:
        yield attention.recording
    finally:
        attention.recording = None


def weigh(attention: torch.Tensor, score: torch.Tensor, method: str) -> torch.Tensor:
    """Return each patch's relevance for each token (length, patches): attention, times its positive gradient."""
    if method == "gradcam":
        (grad,) = torch.autograd.grad(score, attention, retain_graph=True)
        attention = attention * grad.clamp_min(0)
    return attention[0].mean(dim=0)[:, 1:].detach().float().cpu()


def to_grid(relevance: torch.Tensor) -> np.ndarray:
    """Return the mean relevance (tokens, patches) of tokens as a square grid of patches."""
    side = round(relevance.shape[1] ** 0.5)
    return relevance.mean(dim=0).view(side, side).numpy()


def words_of(tokenizer: Any, text: TokenBatch, start: int = 1) -> list[tuple[str, list[int]]]:
    """Return the words of one tokenized text from a position on, and the positions of their tokens."""
    words: list[tuple[str, list[int]]] = []
    tokens = tokenizer.convert_ids_to_tokens(text.input_ids[0].tolist())
    for place, token in enumerate(tokens):
        if place < start or token == "[SEP]":
            continue
        if token.startswith("##") and words:
            word, places = words[-1]
            words[-1] = (word + token[2:], [*places, place])
        else:
            words.append((token, [place]))
    return words


# Images.


def overlay(image: Image.Image, grid: np.ndarray) -> Image.Image:
    """Blend a map over an image of any size; relevant places get warm and opaque colors."""
    heat = Image.fromarray((grid / max(grid.max(), 1e-12)).astype(np.float32))
    heat = np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops, colors = zip(*COLORS, strict=True)
    color = np.stack([np.interp(heat, stops, channel) for channel in zip(*colors, strict=True)], axis=-1)
    share = (0.15 + 0.55 * heat)[..., None]
    return Image.fromarray((np.asarray(image) * (1 - share) + color * share).round().astype(np.uint8))


def sheet(image: Image.Image, title: str, maps: Maps, columns: int = 5) -> Image.Image:
    """Draw an image and its maps side by side, each with its word below, under a title."""
    image = image.convert("RGB")
    scale = TILE / max(image.size)
    image = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.BICUBIC)
    tiles = [("", image), *((word, overlay(image, grid)) for word, grid in maps)]
    width, height, gap = image.width, image.height + 26, 8
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap + 28), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    draw.text((gap, gap - 2), cut_to_width(title, canvas.width, font), "black", font)
    for number, (word, tile) in enumerate(tiles):
        left, top = gap + number % columns * (width + gap), gap + 28 + number // columns * (height + gap)
        canvas.paste(tile, (left, top))
        draw.text((left, top + image.height + 2), cut_to_width(word, width, font), "black", font)
    return canvas


def cut_to_width(text: str, width: int, font: Any) -> str:
    """Cut a text to a width in pixels."""
    while font.getlength(text) > width - 8 and len(text) > 1:
        text = text[:-2] + "…"
    return text


def explain_rows(model: Predictor, rows: Iterable[Row], folder: Path, method: str, layer: int | None) -> Iterator[Row]:
    """Add to each row of a predictor "maps": paths of a sheet for its best caption, or each text or question."""
    for row in rows:
        if "error" in row:
            yield row
            continue
        paths = []
        for number, (text, answer, title) in enumerate(_explained(row)):
            if not text.strip():
                continue
            digest = hashlib.sha256(row["image"].encode("utf-8", "surrogateescape")).hexdigest()[:8]
            path = folder / f"{Path(row['image']).stem}-{digest}-{number}.png"
            maps = explain(model, row["image"], text, answer, method, layer)
            save_image(sheet(as_rgb(row["image"]), title, maps), path)
            paths.append(str(path))
        yield {**row, "maps": paths}


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, as `files.write_whole`."""
    with write_whole(path, "wb") as file:
        image.save(file, "PNG")


def _explained(row: Row) -> Iterator[tuple[str, str, str]]:
    """Yield text, answer and title for each text of a row."""
    if "captions" in row:
        yield row["captions"][0]["caption"], row.get("prompt", ""), row["captions"][0]["caption"]
    for found in row.get("answers", ()):
        yield found["question"], found["answer"], f"{found['question']}  {found['answer']}"
    for found in row.get("matches", ()):
        yield found["text"], "", f"{found['text']}  {found['probability']:.1%}"
