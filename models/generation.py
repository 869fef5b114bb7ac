"""Beam search, greedy search and sampling as in transformers 4.15, which made the released captions.

Later versions normalise a hypothesis by its generated length instead of its whole length (prompt included), which
changes captions. Minimum length and repetition penalty act on log-probabilities in beam search, and on logits in greedy
search and sampling.

The decoder runs on the device over a preallocated cache. Texts are lists on the host: each token costs one transfer
from the device, and prompts whose texts are finished leave the batch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from models.attention import Projection
from models.beams import Beams, Text
from models.med import TextDecoder
from utils import UserError, refuse_nan

SAMPLING_PENALTY = 1.1  # repetition penalty of the released nucleus sampling


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of decoding; lengths count the tokens of the whole text, including [DEC] and the prompt.

    The released code sampled from the 50 most probable tokens, the default of its transformers version.
    """

    max_length: int = 30
    min_length: int = 10
    num_beams: int = 3  # width of the search; 1 is greedy
    sample: bool = False  # nucleus sampling instead of search
    top_p: float = 0.9  # sampling keeps the most probable tokens up to this probability,
    top_k: int = 50  # of so many most probable ones; 0: of all
    repetition_penalty: float | None = None  # above 1 discourages earlier tokens; None: 1.1 in sampling, 1.0 in search
    length_penalty: float = 1.0  # a search compares texts by their log-probability over their length to this power
    temperature: float = 1.0  # divides the logits before sampling
    num_return: int = 1  # texts per prompt, best first; at most `num_beams` in a beam search
    banned: tuple[tuple[int, ...], ...] = ()  # sequences of token ids that no text continues with
    no_repeat_ngram_size: int = 0  # no text has so many tokens in a row twice, prompt included; 0 allows any

    @property
    def penalty(self) -> float:
        """The repetition penalty in use."""
        default = SAMPLING_PENALTY if self.sample else 1.0
        return default if self.repetition_penalty is None else self.repetition_penalty


class Generated(NamedTuple):
    """Generated texts; the `num_return` texts of a prompt are adjacent.

    Log-probabilities are the sums of the model's own, without constraints, of what follows the prompt, end token
    included.
    """

    ids: list[torch.Tensor]  # of each text, int64 (length,) on the CPU, with the prompt and without the end token
    log_probs: torch.Tensor  # float32 (texts,)


@torch.no_grad()
def generate(
    decoder: TextDecoder, projection: Projection, prompt: torch.Tensor, eos_token_id: int, config: GenerationConfig,
    uniforms: torch.Tensor | None = None,
) -> Generated:  # fmt: skip
    """Continue prompts.

    Args:
        decoder: in eval mode.
        projection: keys and values that it attends to; prompt row i belongs to source i // readers.
        prompt: int64 (rows, prompt length), without padding, [DEC] first.
        eos_token_id: [SEP].
        uniforms: random numbers for sampling, one for each text and position: float (rows * num_return, at least
            max_length) in [0, 1). None draws them from PyTorch's generator.

    Raises:
        UserError: more texts are asked for than the search keeps, the prompt fills max_length, or probabilities are not
            numbers.
    """
    if not config.sample and config.num_return > config.num_beams:
        raise UserError(
            f"{config.num_return} texts of a beam search of width {config.num_beams} were asked for; "
            "widen the search (num_beams), or sample"
        )
    if config.max_length <= prompt.shape[1]:
        raise UserError(
            f"max_length is {config.max_length} and the prompt alone has {prompt.shape[1]} tokens; raise max_length"
        )
    if prompt.device.type == "cpu":
        projection = projection.contiguous()
    if config.sample:
        projection = projection.read_by(projection.readers * config.num_return)
        prompt = prompt.repeat_interleave(config.num_return, dim=0)
        if uniforms is None:
            uniforms = torch.rand(len(prompt), config.max_length, device=prompt.device)
    stepper = Stepper(decoder, projection, eos_token_id, config)
    if config.sample or config.num_beams == 1:
        texts = extend_singly(stepper, prompt, uniforms if config.sample else None)
    else:
        texts = beam_search(stepper, prompt)
    log_probs = [text.log_prob for text in texts]
    refuse_nan(log_probs)
    return Generated([torch.tensor(text.tokens) for text in texts], torch.tensor(log_probs))


class Stepper:
    """Runs a decoder over texts, one call for each token."""

    def __init__(self, decoder: TextDecoder, projection: Projection, eos_token_id: int, config: GenerationConfig):
        self.decoder, self.projection = decoder, projection
        self.eos_token_id, self.config = eos_token_id, config
        self.device = projection.layers[0][0][0].device
        rows = len(projection.layers[0][0][0]) * projection.readers
        self.cache = decoder.create_cache(rows, config.max_length, self.device)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next token (rows, vocabulary), float32, after new tokens (rows, new)."""
        hidden = self.decoder.hidden_states(tokens, projection=self.projection, cache=self.cache)
        return self.decoder.logits(hidden[:, -1]).float()

    def send(self, values: list[Any]) -> torch.Tensor:
        """Move values from the host to the device without waiting for it."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def branch(self, num_beams: int) -> None:
        """Repeat every row `num_beams` times, after the shared prompt."""
        rows = torch.arange(self.cache.buffer.shape[2], device=self.device)
        self.cache.select(rows.repeat_interleave(num_beams))
        self.projection = self.projection.read_by(self.projection.readers * num_beams)

    def reorder(self, origins: list[int], start: int) -> None:
        """Continue row `origins[i]` in row i; only positions from `start` on differ."""
        moved = [row for row, origin in enumerate(origins) if origin != row]
        if moved:
            self.cache.copy_rows(self.send([origins[row] for row in moved]), self.send(moved), start)

    def keep(self, sources: list[int]) -> list[int]:
        """Drop all sources but these, and their rows; return the rows that remain."""
        readers = self.projection.readers
        rows = [source * readers + reader for source in sources for reader in range(readers)]
        self.cache.select(self.send(rows))
        self.projection = self.projection.select(self.send(sources))
        return rows

    def constrain(self, scores: torch.Tensor, texts: Sequence[Text]) -> torch.Tensor:
        """Apply the constraints of the settings to scores (rows, vocabulary), logits or log-probabilities."""
        penalty = self.config.penalty
        if penalty != 1.0:
            tokens = self.send([text.tokens for text in texts])
            seen = scores.gather(1, tokens)
            scores = scores.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))
        if len(texts[0].tokens) < self.config.min_length:
            scores = scores.clone()
            scores[:, self.eos_token_id] = -torch.inf
        if self.config.banned or self.config.no_repeat_ngram_size:
            blocked = [(row, token) for row, text in enumerate(texts) for token in self.blocked(text.tokens)]
            if blocked:
                rows, tokens = self.send(blocked).T
                scores = scores.index_put((rows, tokens), scores.new_full((), -torch.inf))
        return scores

    def blocked(self, tokens: list[int]) -> set[int]:
        """Return the next tokens that would complete a banned sequence or repeat an n-gram."""
        length, size = len(tokens), self.config.no_repeat_ngram_size
        found = {ids[-1] for ids in self.config.banned if tuple(tokens[length - len(ids) + 1 :]) == ids[:-1]}
        if size:
            begun = tokens[length - size + 1 :]
            found |= {tokens[i + size - 1] for i in range(length - size + 1) if tokens[i : i + size - 1] == begun}
        return found


def unfinished_sources(done: Sequence[bool], per_source: int) -> list[int]:
    """Return the sources with an unfinished text, where `per_source` texts belong to each."""
    groups = [done[start : start + per_source] for start in range(0, len(done), per_source)]
    return [source for source, group in enumerate(groups) if not all(group)]


# Greedy search and sampling.


def extend_singly(stepper: Stepper, prompt: torch.Tensor, uniforms: torch.Tensor | None) -> list[Text]:
    """Extend each text by its most probable token, or by a token drawn by `uniforms`, until all have ended."""
    config, tokens, length = stepper.config, prompt, prompt.shape[1]
    texts = [Text(row) for row in prompt.tolist()]
    ends: dict[int, int] = {}  # length of each finished text
    running = list(range(len(texts)))  # the text of each row
    while True:
        logits = stepper.logits(tokens)
        scores = stepper.constrain(logits, [texts[i] for i in running])
        token = scores.argmax(dim=1) if uniforms is None else draw(scores, uniforms[:, length], config)
        for i, (chosen, log_prob) in zip(running, read_choices(token, logits), strict=True):
            texts[i].tokens.append(int(chosen))
            if i not in ends:
                texts[i].log_prob += log_prob
                if chosen == stepper.eos_token_id:
                    ends[i] = length
        length += 1
        sources = unfinished_sources([i in ends for i in running], stepper.projection.readers)
        if length >= config.max_length or not sources:
            break
        if len(sources) * stepper.projection.readers < len(running):
            rows = stepper.keep(sources)
            running, index = [running[row] for row in rows], stepper.send(rows)
            token, uniforms = token[index], None if uniforms is None else uniforms[index]
        tokens = token[:, None]
    for i, text in enumerate(texts):
        del text.tokens[ends.get(i, length) :]
    return texts


def read_choices(token: torch.Tensor, logits: torch.Tensor) -> list[list[float]]:
    """Return tokens (rows,) with their log-probability, in one transfer to the host."""
    token = token[:, None]
    return torch.cat((token.double(), logits.log_softmax(dim=1).gather(1, token).double()), dim=1).tolist()


def seeded_uniforms(seed: int, names: Sequence[str], texts: int, length: int, device: torch.device) -> torch.Tensor:
    """Return random numbers for sampling (names * texts, length), which depend on seed and name only."""
    rows = []
    for name in names:
        digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()  # ASCII for every name
        rows.append(np.random.default_rng(np.frombuffer(digest, np.uint32)).random((texts, length)))
    return torch.from_numpy(np.concatenate(rows)).to(device, non_blocking=True)


def draw(logits: torch.Tensor, uniform: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Draw a token (rows,) from the nucleus of logits (rows, vocabulary), by a number in [0, 1) for each row."""
    kept, order = (logits / config.temperature).sort(dim=1, descending=True)
    if config.top_k:
        kept, order = kept[:, : config.top_k], order[:, : config.top_k]
    probs = kept.softmax(dim=1)
    outside = probs.cumsum(dim=1) - probs > config.top_p  # the token that crosses the bound is inside
    bounds = probs.masked_fill(outside, 0.0).double().cumsum(dim=1)
    choice = (bounds <= uniform[:, None] * bounds[:, -1:]).sum(dim=1, keepdim=True)
    return order.gather(1, choice.clamp_max((~outside).sum(dim=1, keepdim=True) - 1)).squeeze(1)


# Beam search.


def beam_search(stepper: Stepper, prompt: torch.Tensor) -> list[Text]:
    """Beam search over `num_beams` texts of each prompt."""
    config, prompt_length = stepper.config, prompt.shape[1]
    num_beams, prompts_per_source = config.num_beams, stepper.projection.readers
    start = [0.0] + [-1e9] * (num_beams - 1)  # the beams of a prompt start equal: only the first may be continued
    searches = [Beams([Text(row, score) for score in start], config.length_penalty) for row in prompt.tolist()]
    running = searches
    logits = stepper.logits(prompt).repeat_interleave(num_beams, dim=0)
    stepper.branch(num_beams)
    for length in range(prompt_length + 1, config.max_length + 1):
        texts = [text for search in running for text in search.texts]
        origins = []
        for row, (search, candidates) in enumerate(zip(running, find_candidates(stepper, logits, texts), strict=True)):
            beams = search.advance(candidates, logits.shape[1], stepper.eos_token_id)
            origins += [row * num_beams + beam for beam in beams]
        sources = unfinished_sources([search.done for search in running], prompts_per_source)
        if length == config.max_length or not sources:
            break
        stepper.reorder(origins, prompt_length)
        if len(sources) * prompts_per_source < len(running):
            rows = stepper.keep(sources)
            running = [running[row // num_beams] for row in rows[::num_beams]]
        logits = stepper.logits(stepper.send([[text.tokens[-1]] for search in running for text in search.texts]))
    return [text for search in searches for text in search.best(config.num_return)]


def find_candidates(stepper: Stepper, logits: torch.Tensor, texts: Sequence[Text]) -> list[list[list[float]]]:
    """Return the 2 * beams best continuations of each prompt, as `Beams.advance` takes them, in one transfer."""
    num_beams = stepper.config.num_beams
    log_probs = logits.log_softmax(dim=1)
    scores = stepper.constrain(log_probs, texts) + stepper.send([[text.score] for text in texts])
    scores, log_probs = (x.reshape(len(texts) // num_beams, -1) for x in (scores, log_probs))
    top, index = scores.topk(2 * num_beams, dim=1)
    return torch.stack((top.double(), index.double(), log_probs.gather(1, index).double()), dim=-1).tolist()
