"""Models for people: images in; captions, answers, matches and features out, a row for each image."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.images import ImageSource, image_batches
from data.text import pre_caption, pre_question
from data.transforms import test_transform
from models.architecture import settings_of
from models.blip import blip_decoder, blip_feature_extractor
from models.blip_itm import MAX_TEXT_TOKENS, blip_itm
from models.blip_vqa import MAX_QUESTION_TOKENS, blip_vqa
from models.cpu_products import use_cpu_products
from models.generation import GenerationConfig, seeded_uniforms
from models.losses import similarity, unit_features
from models.precision import autocast
from models.tokenizer import tokenize
from utils import UserError, allow_tf32

Row = dict[str, Any]
MAX_WORDS = 50
SHOWN_ANSWERS = 5
CAPTION_DEFAULTS = {"max_length": 20, "min_length": 5, "num_beams": 3}


class Predictor:
    """A model, its device, and how it reads images.

    Args:
        model: in eval mode, on its device.
        image_size: side in pixels of the square it takes.
        amp: "bf16" for mixed precision.
        config: settings that the checkpoint was trained with, as far as it says.
    """

    def __init__(self, model: nn.Module, image_size: int, amp: str = "", config: Mapping[str, Any] | None = None):
        self.model, self.image_size, self.amp, self.config = model, image_size, amp, config or {}
        self.device = next(model.parameters()).device
        self.transform = test_transform(image_size)

    @torch.no_grad()
    def rows(
        self,
        images: Sequence[ImageSource],
        predict: Callable[[torch.Tensor, list[str]], list[Row]],
        batch_size: int = 16,
        num_workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> Iterator[Row]:
        """Yield a row for each image, in order: {"image", ...}, or {"image", "error"} for one that cannot be read.

        Args:
            images: paths, or open images.
            predict: images (batch, 3, H, W) on the device and their names -> a row for each.
            batch_size: images at once.
            num_workers: processes that read images.
            names: what the rows call the images; None takes their paths.
        """
        names = [image_name(image) for image in images] if names is None else names
        for batch in image_batches(images, self.transform, batch_size, num_workers):
            good = [i for i in batch["index"] if i not in batch["errors"]]
            found: dict[int, Row] = {i: {"error": text} for i, text in batch["errors"].items()}
            if good:
                with autocast(self.amp, self.device):
                    rows = predict(batch["image"].to(self.device), [names[i] for i in good])
                found |= dict(zip(good, rows, strict=True))
            yield from ({"image": names[i], **found[i]} for i in batch["index"])


class Captioner(Predictor):
    """Writes captions (paper section 5.2)."""

    def caption(self, images: Sequence[ImageSource] | ImageSource, **settings: Any) -> list[Row]:
        """Caption images; arguments as `captions`, which does the same one by one."""
        return list(self.captions(images, **settings))

    def captions(
        self,
        images: Sequence[ImageSource] | ImageSource,
        num_captions: int = 1,
        sample: bool = False,
        num_beams: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        seed: int = 42,
        batch_size: int = 16,
        num_workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> Iterator[Row]:
        """Yield {"image", "captions": [{"caption", "log_prob"}, ...]}, the best caption first.

        Args:
            images: paths or open images, one or several.
            num_captions: captions of each image; of a search at most `num_beams`.
            sample: nucleus sampling instead of beam search.
            num_beams: width of the search; 1 is greedy. None: as the checkpoint was evaluated, or 3.
            max_length, min_length: in tokens, prompt and [DEC] included. None: as the checkpoint was evaluated,
                or 20 and 5.
            top_p: share of probability that sampling draws from.
            repetition_penalty: above 1 discourages tokens already said; None: 1.1 in sampling, 1.0 in search.
            seed: of sampling; an image's captions depend on it and on the image's name only.
            batch_size: images at once.
            num_workers: processes that read images.
            names: what the rows call the images; None takes their paths.
        """
        asked = {"max_length": max_length, "min_length": min_length, "num_beams": num_beams}
        config = GenerationConfig(
            **{name: self.setting(name, value) for name, value in asked.items()},
            sample=sample, top_p=top_p, repetition_penalty=repetition_penalty, num_return=num_captions,
        )  # fmt: skip

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            uniforms = seeded_uniforms(seed, names, num_captions, config.max_length, self.device) if sample else None
            texts, log_probs = self.model.caption(image, config, uniforms)
            rows = [{"caption": t, "log_prob": round(p, 4)} for t, p in zip(texts, log_probs.tolist(), strict=True)]
            groups = [rows[i : i + num_captions] for i in range(0, len(rows), num_captions)]
            return [
                {"captions": sorted(group, key=lambda row: -row["log_prob"]) if sample else group} for group in groups
            ]

        yield from self.rows(as_list(images), predict, batch_size, num_workers, names)

    def setting(self, name: str, asked: int | None) -> int:
        """Return what was asked for, or else what the checkpoint was evaluated with, or the released value."""
        return asked if asked is not None else self.config.get(name, CAPTION_DEFAULTS[name])


class Answerer(Predictor):
    """Answers questions (paper section 5.3)."""

    def answer(
        self, images: Sequence[ImageSource] | ImageSource, questions: Sequence[str] | str, **settings: Any
    ) -> list[Row]:
        """Answer questions; arguments as `answers`, which does the same one by one."""
        return list(self.answers(images, questions, **settings))

    def answers(
        self,
        images: Sequence[ImageSource] | ImageSource,
        questions: Sequence[str] | str,
        answers: Sequence[str] = (),
        k_test: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> Iterator[Row]:
        """Yield {"image", "answers": [{"question", "answer", ...}, ...]}, every question asked of every image.

        Args:
            images: paths or open images, one or several.
            questions: one or several.
            answers: to choose among; without them the model writes freely.
            k_test: answers, by their first token, that are scored whole.
            batch_size: images at once.
            num_workers: processes that read images.

        Each answer has "log_prob" when written freely. Chosen ones have "probability", which sums to 1 over the
        scored answers, and the likeliest "candidates".

        Raises:
            UserError: no question, or an empty one.
        """
        texts = [pre_question(text, MAX_WORDS) for text in ([questions] if isinstance(questions, str) else questions)]
        if not texts or not all(texts):
            raise UserError("a question is empty; ask at least one, such as 'what color is the dog?'")
        candidates = tokenize(self.model.tokenizer, answers, "dec", device=self.device) if answers else None

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            projection = self.model.text_encoder.project(self.model.visual_encoder(image))
            columns = []
            for text in texts:  # one at a time, so that no question is padded: written answers read padding
                tokens = tokenize(self.model.tokenizer, [text] * len(image), "enc", MAX_QUESTION_TOKENS, self.device)
                states = self.model.text_encoder(*tokens, projection)
                columns.append(
                    self._write(states) if candidates is None
                    else self._choose(states, tokens.attention_mask, candidates.input_ids, list(answers), k_test)
                )  # fmt: skip
            asked = [questions] if isinstance(questions, str) else questions
            return [
                {"answers": [{"question": q, **column[i]} for q, column in zip(asked, columns, strict=True)]}
                for i in range(len(image))
            ]

        yield from self.rows(as_list(images), predict, batch_size, num_workers)

    def _write(self, states: torch.Tensor) -> list[Row]:
        texts, log_probs = self.model.generate_answers(states)
        return [{"answer": t, "log_prob": round(p, 4)} for t, p in zip(texts, log_probs.tolist(), strict=True)]

    def _choose(
        self, states: torch.Tensor, atts: torch.Tensor, ids: torch.Tensor, answers: list[str], k: int
    ) -> list[Row]:
        losses, candidates = self.model.rank_losses(states, atts, ids, k)
        probabilities, order = (-losses).softmax(dim=1).sort(dim=1, descending=True, stable=True)
        rows = []
        for chosen, probability in zip(candidates.gather(1, order).tolist(), probabilities.tolist(), strict=True):
            ranked = [
                {"answer": answers[c], "probability": round(p, 4)} for c, p in zip(chosen, probability, strict=True)
            ]
            rows.append({**ranked[0], "candidates": ranked[:SHOWN_ANSWERS]})
        return rows


class Matcher(Predictor):
    """Judges whether texts describe images, by the matching head and by cosine (paper section 4.1)."""

    def match(
        self, images: Sequence[ImageSource] | ImageSource, texts: Sequence[str] | str, **settings: Any
    ) -> list[Row]:
        """Match images and texts; arguments as `matches`, which does the same one by one."""
        return list(self.matches(images, texts, **settings))

    def matches(
        self,
        images: Sequence[ImageSource] | ImageSource,
        texts: Sequence[str] | str,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> Iterator[Row]:
        """Yield {"image", "matches": [{"text", "probability", "cosine"}, ...]}, every text with every image.

        Args:
            images: paths or open images, one or several.
            texts: one or several.
            batch_size: images at once.
            num_workers: processes that read images.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        with torch.no_grad():
            text_feat = self.text_feat(texts)

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = self.model.visual_encoder(image)
            probability = self.match_logits(tokens, texts).softmax(dim=-1)[..., 1]
            cosine = similarity(self.image_feat(tokens), text_feat)
            return [
                {
                    "matches": [
                        {"text": t, "probability": round(p, 4), "cosine": round(c, 4)} for t, p, c in zip(texts, *row)
                    ]
                }
                for row in zip(probability.tolist(), cosine.tolist(), strict=True)
            ]

        yield from self.rows(as_list(images), predict, batch_size, num_workers)

    def match_logits(self, tokens: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Logits of "no match" and "match" of images' tokens (images, length, width) and texts: (images, texts, 2)."""
        first = self.model.first_token
        text = tokenize(self.model.tokenizer, clean(texts), first, MAX_TEXT_TOKENS, self.device)
        projection = self.model.text_encoder.project(tokens).read_by(len(texts))
        ids, mask = (x.repeat(len(tokens), 1) for x in text)
        logits = self.model.itm_head(self.model.text_encoder(ids, mask, projection)[:, 0])
        return logits.float().view(len(tokens), len(texts), 2)

    def own_probabilities(self, tokens: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Probability that each image's own texts describe it; an image's tokens are projected once for all of them.

        Args:
            tokens: of images (images, length, width).
            texts: any number for each image.
        """
        owner = torch.tensor([i for i, own in enumerate(texts) for _ in own], device=self.device)
        if not len(owner):
            return [[] for _ in texts]
        flat = clean([text for own in texts for text in own])
        text = tokenize(self.model.tokenizer, flat, self.model.first_token, MAX_TEXT_TOKENS, self.device)
        projection = self.model.text_encoder.project(tokens).select(owner)
        logits = self.model.itm_head(self.model.text_encoder(*text, projection)[:, 0])
        found = iter(logits.float().softmax(dim=1)[:, 1].tolist())
        return [[next(found) for _ in own] for own in texts]

    def text_feat(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features (texts, embed_dim).

        Raises:
            UserError: no text, or an empty one.
        """
        if not texts or not all(clean(texts)):
            raise UserError("a text is empty; give at least one, such as 'a dog on a beach'")
        text = tokenize(self.model.tokenizer, clean(texts), "cls", MAX_TEXT_TOKENS, self.device)
        return unit_features(self.model.text_proj, self.model.text_encoder(*text)[:, 0])

    def image_feat(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit features (images, embed_dim) of images' tokens."""
        return unit_features(self.model.vision_proj, tokens[:, 0])


class Extractor(Predictor):
    """Features of images."""

    def features(self, images: Sequence[ImageSource] | ImageSource, **settings: Any) -> list[Row]:
        """Return features; arguments as `each_features`, which does the same one by one."""
        return list(self.each_features(images, **settings))

    def each_features(
        self, images: Sequence[ImageSource] | ImageSource, kind: str = "cls", batch_size: int = 16, num_workers: int = 0
    ) -> Iterator[Row]:
        """Yield {"image", "features"}, float32.

        Args:
            images: paths or open images, one or several.
            kind: "cls": the [CLS] token (width,); "tokens": all tokens (1 + patches, width).
            batch_size: images at once.
            num_workers: processes that read images.

        Raises:
            UserError: another kind.
        """
        if kind not in ("cls", "tokens"):
            raise UserError(f"kind is {kind!r}; expected 'cls' or 'tokens'")

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = self.model.visual_encoder(image).float().cpu()
            return [{"features": (row[0] if kind == "cls" else row).numpy()} for row in tokens]

        yield from self.rows(as_list(images), predict, batch_size, num_workers)


KINDS: dict[str, tuple[type[Predictor], Callable[..., nn.Module]]] = {
    "caption": (Captioner, blip_decoder),
    "vqa": (Answerer, blip_vqa),
    "match": (Matcher, blip_itm),
    "features": (Extractor, blip_feature_extractor),
}


def load(
    task: str, checkpoint: str | Path, device: str = "", amp: str = "", allow_pickle: bool = False,
    cpu_products: str = "auto", tf32: bool = True, **settings: Any,
) -> Any:  # fmt: skip
    """Load a checkpoint for a task.

    Args:
        task: "caption", "vqa", "match" or "features".
        checkpoint: a path, a URL or `hf:owner/name`.
        device: "cuda", "cpu"; '' for a GPU where there is one.
        amp: "bf16" for mixed precision.
        allow_pickle: accept a file that may run code when it is read.
        cpu_products: float32 products on a CPU, as for `models.cpu_products.use_cpu_products`.
        tf32: float32 products on a GPU use TF32, as the released code did.
        settings: what the checkpoint should not decide itself: image_size, vit, med_config, prompt, ...

    Returns:
        A `Captioner`, `Answerer`, `Matcher` or `Extractor`.

    Raises:
        UserError: another task, or a checkpoint that does not fit it.
    """
    if task not in KINDS:
        raise UserError(f"task is {task!r}; expected one of {', '.join(KINDS)}")
    source = str(checkpoint)
    arguments, config = settings_of(source, allow_pickle)
    arguments |= {key: value for key, value in settings.items() if value is not None}
    kind, factory = KINDS[task]
    if task == "caption" and "prompt" in config:
        arguments.setdefault("prompt", config["prompt"])
    if task == "match":
        arguments.setdefault("first_token", "enc")  # as the head was trained; "cls" is what the released demo does
    else:
        arguments.pop("embed_dim", None)
    allow_tf32(tf32)
    model = factory(pretrained=source, allow_pickle=allow_pickle, **arguments)
    model = use_cpu_products(model.to(choose_device(device)).eval(), cpu_products)
    return kind(model, arguments["image_size"], amp, config)


def choose_device(name: str) -> torch.device:
    """Return a device by its name; '' is a GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device is {name!r}; expected cuda, cuda:0 or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r} and PyTorch sees no GPU; use cpu")
    return device


def image_name(image: ImageSource) -> str:
    """Return an image's path; '' for an encoded one, and for an open one that came from no file."""
    return str(image) if isinstance(image, str | Path) else str(getattr(image, "filename", ""))


def as_list(images: Iterable[ImageSource] | ImageSource) -> list[ImageSource]:
    """Return one or several images as a list."""
    return [images] if isinstance(images, str | Path | bytes) or hasattr(images, "convert") else list(images)


def clean(texts: Sequence[str]) -> list[str]:
    """Return texts as they are in training: lower case, without punctuation."""
    return [pre_caption(text, MAX_WORDS) for text in texts]
