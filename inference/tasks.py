"""Three tasks of inference: captions, answers and matches, a row for each image."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from data.text import pre_question
from inference.predictor import MAX_WORDS, Images, Predictor, Row, note_cut
from models.blip_vqa import MAX_QUESTION_TOKENS
from models.generation import GenerationConfig, seeded_uniforms
from models.losses import similarity, unit_features
from models.tokenizer import tokenize
from utils import UserError

SHOWN_ANSWERS = 5
CAPTION_DEFAULTS = {"max_length": 20, "min_length": 5, "num_beams": 3}


class Captioner(Predictor):
    """Writes captions (paper section 5.2)."""

    def caption(self, images: Images, **settings: Any) -> list[Row]:
        """Caption images; arguments as for `captions`, which yields them as they come."""
        return list(self.captions(images, **settings))

    def captions(
        self,
        images: Images,
        num_captions: int = 1,
        banned: Sequence[str] = (),
        seed: int = 42,
        rank_by: "Matcher | None" = None,
        prompts: Mapping[str, str] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        names: Sequence[str] | None = None,
        **decoding: Any,
    ) -> Iterator[Row]:
        """Yield {"image", "captions": [{"caption", "log_prob"}, ...]}, the best caption first.

        Args:
            images, batch_size, num_workers, names: as for `Predictor.rows`.
            num_captions: captions of each image; of a search at most `num_beams`.
            banned: words and phrases that no caption has.
            seed: of sampling; an image's captions depend on it and on the image's name only.
            rank_by: a matching model that takes images of the same size; the captions come in the order of the
                "probability" that they match the image, which their rows then have.
            prompts: by name of an image, what its captions continue in place of the model's prompt; its row has it.
            decoding: `sample`, `num_beams`, `temperature`, `length_penalty` and the other settings of
                `models.generation.GenerationConfig`. Without `max_length`, `min_length` or `num_beams`, or with None:
                as the checkpoint was evaluated, or 20, 5 and 3.

        Raises:
            UserError: settings that do not go together, such as more captions than beams.
        """
        decoding |= {name: self.setting(name, decoding.get(name)) for name in CAPTION_DEFAULTS}
        config = GenerationConfig(**decoding, num_return=num_captions, banned=self.token_ids(banned))
        if rank_by and rank_by.pixels != self.pixels:
            raise UserError(f"the ranking model reads images with {rank_by.pixels}, the captioner with {self.pixels}")
        predict = partial(self._write, config=config, seed=seed, rank_by=rank_by, prompts=prompts or {})
        yield from self.rows(images, predict, batch_size, num_workers, names)

    def _write(
        self, image: torch.Tensor, names: list[str], config: GenerationConfig, seed: int, rank_by: "Matcher | None",
        prompts: Mapping[str, str],
    ) -> list[Row]:  # fmt: skip
        num, uniforms = config.num_return, None
        if config.sample:
            uniforms = seeded_uniforms(seed, names, num, config.max_length, self.device)
        own = [prompts.get(name, self.model.prompt) for name in names]
        texts, log_probs = self.model.caption(image, config, uniforms, own)
        rows = [{"caption": t, "log_prob": round(p, 4)} for t, p in zip(texts, log_probs.tolist(), strict=True)]
        groups = [rows[i : i + num] for i in range(0, len(rows), num)]
        if rank_by:
            groups = rank_by.rank(image, groups)
        elif config.sample:
            groups = [sorted(group, key=lambda row: -row["log_prob"]) for group in groups]
        said = [{"prompt": prompts[name]} if name in prompts else {} for name in names]
        return [{**prompt, "captions": group} for prompt, group in zip(said, groups, strict=True)]

    def token_ids(self, phrases: Sequence[str] | str) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of words and phrases; raises UserError for an empty one."""
        phrases = [phrases] if isinstance(phrases, str) else list(phrases)
        ids = [tokenize(self.model.tokenizer, phrase).input_ids[0, 1:-1].tolist() for phrase in phrases]
        if not all(ids):
            raise UserError("a banned phrase is empty; give words, such as 'image'")
        return tuple(map(tuple, ids))

    def setting(self, name: str, asked: int | None) -> int:
        """Return what was asked for, or else what the checkpoint was evaluated with, or the released value."""
        return asked if asked is not None else self.config.get(name, CAPTION_DEFAULTS[name])


class Answerer(Predictor):
    """Answers questions (paper section 5.3)."""

    def answer(self, images: Images, questions: Sequence[str] | str, **settings: Any) -> list[Row]:
        """Answer questions; arguments as for `answers`, which yields them as they come."""
        return list(self.answers(images, questions, **settings))

    def answers(
        self,
        images: Images,
        questions: Sequence[str] | str,
        answers: Sequence[str] = (),
        k_test: int = 128,
        **reading: Any,
    ) -> Iterator[Row]:
        """Yield {"image", "answers": [{"question", "answer", ...}, ...]}, every question asked of every image.

        Args:
            images, reading: as for `Predictor.rows`.
            questions: one or several.
            answers: to choose among; without them the model writes freely.
            k_test: answers, by their first token, that are scored whole.

        Each answer has "log_prob" when written freely. Chosen ones have "probability", which sums to 1 over the
        scored answers, and the likeliest "candidates".

        Raises:
            UserError: no question, or an empty one.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        texts = [pre_question(text, MAX_WORDS) for text in asked]
        if not texts or not all(texts):
            raise UserError("a question is empty; ask at least one, such as 'what color is the dog?'")
        note_cut(self.model.tokenizer, asked, MAX_QUESTION_TOKENS, "questions")
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
            return [
                {"answers": [{"question": q, **column[i]} for q, column in zip(asked, columns, strict=True)]}
                for i in range(len(image))
            ]

        yield from self.rows(images, predict, **reading)

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
            scores = zip(chosen, probability, strict=True)
            ranked = [{"answer": answers[c], "probability": round(p, 4)} for c, p in scores]
            rows.append({**ranked[0], "candidates": ranked[:SHOWN_ANSWERS]})
        return rows


class Matcher(Predictor):
    """Judges whether texts describe images, by the matching head and by cosine (paper section 4.1)."""

    def match(self, images: Images, texts: Sequence[str] | str, **settings: Any) -> list[Row]:
        """Match images and texts; arguments as for `matches`, which yields them as they come."""
        return list(self.matches(images, texts, **settings))

    def matches(self, images: Images, texts: Sequence[str] | str, **reading: Any) -> Iterator[Row]:
        """Yield {"image", "matches": [{"text", "probability", "cosine"}, ...]}, every text with every image.

        Arguments beside the texts are those of `Predictor.rows`.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        text_feat = self.text_feat(texts)

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = self.model.visual_encoder(image)
            probability = self.match_logits(tokens, texts).softmax(dim=-1)[..., 1]
            cosine = similarity(self.image_feat(tokens), text_feat)
            rows = []
            for columns in zip(probability.tolist(), cosine.tolist(), strict=True):
                scores = zip(texts, *columns, strict=True)
                found = [{"text": t, "probability": round(p, 4), "cosine": round(c, 4)} for t, p, c in scores]
                rows.append({"matches": found})
            return rows

        yield from self.rows(images, predict, **reading)

    def match_logits(self, tokens: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Logits of "no match" and "match" of images' tokens (images, length, width) and texts: (images, texts, 2)."""
        text = self.tokens_of(texts, self.model.first_token)
        projection = self.model.text_encoder.project(tokens).read_by(len(texts))
        ids, mask = (x.repeat(len(tokens), 1) for x in text)
        logits = self.model.itm_head(self.model.text_encoder(ids, mask, projection)[:, 0])
        return logits.float().view(len(tokens), len(texts), 2)

    def own_probabilities(self, tokens: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Probability that each image's own texts describe it, from the images' tokens (images, length, width)."""
        owner = torch.tensor([i for i, own in enumerate(texts) for _ in own], device=self.device)
        if not len(owner):
            return [[] for _ in texts]
        text = self.tokens_of([text for own in texts for text in own], self.model.first_token)
        projection = self.model.text_encoder.project(tokens).select(owner)
        logits = self.model.itm_head(self.model.text_encoder(*text, projection)[:, 0])
        found = iter(logits.float().softmax(dim=1)[:, 1].tolist())
        return [[next(found) for _ in own] for own in texts]

    def rank(self, image: torch.Tensor, captions: list[list[Row]]) -> list[list[Row]]:
        """Return the caption rows of images (images, 3, H, W) in the order of their "probability" of a match.

        The probability is added to the rows. Raises UserError for images of another size than this model takes.
        """
        if image.shape[-1] != self.image_size:
            raise UserError(
                f"the ranking model takes images of {self.image_size} pixels and the captioner of {image.shape[-1]}; "
                f"load it with image_size={image.shape[-1]}"
            )
        texts = [[row["caption"] for row in own] for own in captions]
        found = self.own_probabilities(self.model.visual_encoder(image), texts)
        for own, probabilities in zip(captions, found, strict=True):
            for row, probability in zip(own, probabilities, strict=True):
                row["probability"] = round(probability, 4)
            own.sort(key=lambda row: -row["probability"])
        return captions

    @torch.no_grad()
    def text_feat(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features (texts, embed_dim); raises UserError for no text, or an empty one."""
        text = self.tokens_of(self.checked_texts(texts), "cls")
        return unit_features(self.model.text_proj, self.model.text_encoder(*text)[:, 0])

    def image_feat(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit features (images, embed_dim) of images' tokens."""
        return unit_features(self.model.vision_proj, tokens[:, 0])
