"""Beam search and sampling over a key/value cache, as in transformers 4.15, which made the released captions.

Later versions of transformers normalise a hypothesis by its generated length instead of its whole length
(prompt included), which changes captions. Minimum length and repetition penalty act on log-probabilities in
beam search, and on logits in greedy search and sampling.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from models.attention import Projection, TextCache
from models.med import TextDecoder
from utils import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode.

    Attributes:
        max_length, min_length: tokens of the whole text, prompt and [DEC] included.
        num_beams: width of the search; 1 is greedy.
        sample: nucleus sampling instead of search.
        top_p, top_k: sampling keeps the likeliest tokens up to this probability, among the k likeliest
            (0: all). The released code sampled among 50, the default of its transformers version.
        repetition_penalty: above 1 makes tokens already in the text, prompt included, less likely.
        length_penalty: a hypothesis scores its log-probability over its length to this power.
        temperature: divides the logits before sampling.
        num_return: texts per prompt, best first; a beam search gives at most `num_beams`.
    """

    max_length: int = 30
    min_length: int = 10
    num_beams: int = 3
    sample: bool = False
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0
    num_return: int = 1


@dataclass
class Stepper:
    """Runs a decoder over growing texts: feeds it only what is new, and remembers the rest."""

    decoder: TextDecoder
    projection: Projection
    eos_token_id: int
    config: GenerationConfig
    cache: TextCache = field(default_factory=TextCache)
    uniforms: torch.Tensor | None = None

    def logits(self, texts: torch.Tensor) -> torch.Tensor:
        """Return the next token's logits (rows, vocabulary) for whole texts (rows, length)."""
        new = texts[:, self.cache.length :]
        hidden = self.decoder.hidden_states(new, projection=self.projection, cache=self.cache)
        return self.decoder.logits(hidden[:, -1]).float()

    def branch(self, num_beams: int) -> None:
        """Repeat every row `num_beams` times, after the shared prompt."""
        rows = torch.arange(self.cache.shape[0], device=self.projection.layers[0][0][0].device)
        self.cache.select(rows.repeat_interleave(num_beams))
        self.projection = self.projection.read_by(self.projection.readers * num_beams)

    def constrain(self, texts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply repetition penalty and minimum length to scores (rows, vocabulary); logits or log-probabilities."""
        if self.config.repetition_penalty != 1.0:
            seen = scores.gather(1, texts)
            penalty = self.config.repetition_penalty
            scores = scores.scatter(1, texts, torch.where(seen < 0, seen * penalty, seen / penalty))
        if texts.shape[1] < self.config.min_length:
            scores = scores.index_fill(1, torch.tensor([self.eos_token_id], device=scores.device), -torch.inf)
        return scores


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    projection: Projection,
    prompt: torch.Tensor,
    eos_token_id: int,
    config: GenerationConfig,
    uniforms: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Continue prompts.

    Args:
        decoder: the text decoder, in eval mode.
        projection: what it reads, projected once; prompt row i reads source i // readers.
        prompt: int64 (rows, prompt length), without padding, [DEC] first.
        eos_token_id: [SEP].
        config: how.
        uniforms: random numbers that sampling draws its tokens by, one for each text and position: float
            (rows * num_return, at least max_length) in [0, 1). None takes them from PyTorch's.

    Returns:
        Token ids of each text, prompt included and end token not, and each text's score, float32: the sum of the
        log-probabilities of what follows the prompt, end token included, over length ** length_penalty. Of
        `num_return` texts a prompt, those of one prompt stand together.

    Raises:
        UserError: more texts are asked for than the search keeps, or no room is left after the prompt.
    """
    if config.num_return > 1 and not config.sample and config.num_return > config.num_beams:
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
    stepper = Stepper(decoder, projection, eos_token_id, config)
    if config.sample:
        stepper.projection = projection.read_by(projection.readers * config.num_return)
        prompt = prompt.repeat_interleave(config.num_return, dim=0)
        shape = (len(prompt), config.max_length)
        stepper.uniforms = torch.rand(shape, device=prompt.device) if uniforms is None else uniforms
    if config.sample or config.num_beams == 1:
        return continue_singly(stepper, prompt)
    return beam_search(stepper, prompt)


def continue_singly(stepper: Stepper, texts: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Greedy search or sampling: one continuation a row."""
    prompt_length, log_probs = texts.shape[1], 0.0
    finished = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
    while texts.shape[1] < stepper.config.max_length and not finished.all():
        logits = stepper.constrain(texts, stepper.logits(texts))
        token = logits.argmax(dim=1)
        if stepper.config.sample:
            token = draw(logits, stepper.uniforms[:, texts.shape[1]], stepper.config)
        chosen = logits.log_softmax(dim=1).gather(1, token[:, None]).squeeze(1)
        log_probs = log_probs + chosen.masked_fill(finished, 0.0)
        texts = torch.cat((texts, token.masked_fill(finished, stepper.eos_token_id)[:, None]), dim=1)
        finished = finished | (token == stepper.eos_token_id)
    ended = texts[:, prompt_length:] == stepper.eos_token_id
    lengths = prompt_length + torch.where(ended.any(1), ended.int().argmax(1), ended.shape[1])
    scores = log_probs / lengths**stepper.config.length_penalty
    return [text[:length] for text, length in zip(texts, lengths, strict=True)], scores


def log_probs(ids: Sequence[torch.Tensor], scores: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Turn scores of generated texts (texts,) into log-probabilities: undo the division by length."""
    lengths = torch.tensor([len(row) for row in ids], device=scores.device)
    return scores * lengths**config.length_penalty


def seeded_uniforms(seed: int, names: Sequence[str], texts: int, length: int, device: torch.device) -> torch.Tensor:
    """Return random numbers for sampling, (names * texts, length); a name's depend on it and the seed only."""
    rows = []
    for name in names:
        digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()  # ASCII, whatever the name holds
        rows.append(np.random.default_rng(np.frombuffer(digest, np.uint32)).random((texts, length)))
    return torch.from_numpy(np.concatenate(rows)).to(device)


def draw(logits: torch.Tensor, uniform: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Draw a token a row (rows,) from the nucleus of logits (rows, vocabulary), by a number in [0, 1) a row."""
    kept, order = (logits / config.temperature).sort(dim=1, descending=True)
    if config.top_k:
        kept, order = kept[:, : config.top_k], order[:, : config.top_k]
    probs = kept.softmax(dim=1)
    outside = probs.cumsum(dim=1) - probs > config.top_p  # the token that crosses the bound still counts
    bounds = probs.masked_fill(outside, 0.0).double().cumsum(dim=1)
    choice = (bounds <= uniform[:, None] * bounds[:, -1:]).sum(dim=1, keepdim=True)
    return order.gather(1, choice.clamp_max((~outside).sum(dim=1, keepdim=True) - 1)).squeeze(1)


@dataclass
class Hypotheses:
    """The best finished texts of one row, and whether the search for it is over."""

    num_kept: int
    length_penalty: float
    kept: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    done: bool = False

    def add(self, log_prob: float, text: torch.Tensor) -> None:
        """Take a finished text (its end token not in it) if it is among the best."""
        score = log_prob / len(text) ** self.length_penalty
        if len(self.kept) == self.num_kept:
            worst = min(range(self.num_kept), key=lambda i: self.kept[i][0])
            if score <= self.kept[worst][0]:
                return
            del self.kept[worst]
        self.kept.append((score, text))

    def close(self, best_log_prob: float, length: int) -> None:
        """End the search when enough are kept and no running text can be better than the worst of them."""
        full = len(self.kept) == self.num_kept
        bound = best_log_prob / length**self.length_penalty
        self.done = self.done or (full and min(score for score, _ in self.kept) >= bound)

    def best(self, number: int) -> list[tuple[float, torch.Tensor]]:
        """Return score and text of the best ones, best first, the latest first among equals."""
        return sorted(self.kept, key=lambda hypothesis: hypothesis[0])[: -number - 1 : -1]


def beam_search(stepper: Stepper, prompt: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Beam search over `num_beams` texts a row."""
    config, num_rows, device = stepper.config, len(prompt), prompt.device
    num_beams = config.num_beams
    hypotheses = [Hypotheses(num_beams, config.length_penalty) for _ in range(num_rows)]
    logits = stepper.logits(prompt).repeat_interleave(num_beams, dim=0)
    stepper.branch(num_beams)
    texts = prompt.repeat_interleave(num_beams, dim=0)
    beam_scores = torch.full((num_rows, num_beams), -1e9, device=device)
    beam_scores[:, 0] = 0.0  # the beams of a row start equal: only the first may be continued
    while True:
        scores = stepper.constrain(texts, logits.log_softmax(dim=1)) + beam_scores.view(-1, 1)
        beam_scores, token, origin = advance(scores.view(num_rows, -1), texts, hypotheses, stepper)
        texts = torch.cat((texts[origin], token[:, None]), dim=1)
        if texts.shape[1] >= config.max_length or all(row.done for row in hypotheses):
            break
        stepper.cache.select(origin)
        logits = stepper.logits(texts)
    return finish(texts, beam_scores, hypotheses, config.num_return)


def advance(
    scores: torch.Tensor, texts: torch.Tensor, hypotheses: list[Hypotheses], stepper: Stepper
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the next beams among scores (rows, beams * vocabulary), and file what has ended.

    Returns:
        The beams' sums of log-probabilities (rows, beams), their new tokens and the beams they continue,
        both (rows * beams,).
    """
    num_rows, num_beams = len(scores), stepper.config.num_beams
    vocab_size = scores.shape[1] // num_beams
    top, index = scores.topk(2 * num_beams, dim=1)
    token, beam = index % vocab_size, index // vocab_size
    beam = beam + torch.arange(num_rows, device=scores.device)[:, None] * num_beams
    ended = token == stepper.eos_token_id
    file_ended(top, beam, ended, texts, hypotheses)
    # The first `num_beams` continuations that did not end, in order: a stable sort puts them first.
    running = ended.int().sort(dim=1, stable=True).indices[:, :num_beams]
    return top.gather(1, running), token.gather(1, running).flatten(), beam.gather(1, running).flatten()


def file_ended(
    top: torch.Tensor, beam: torch.Tensor, ended: torch.Tensor, texts: torch.Tensor, hypotheses: list[Hypotheses]
) -> None:
    """File texts that ended among the best `num_beams` continuations; one transfer from the device a step."""
    scores, beams, ends = top.tolist(), beam.tolist(), ended.tolist()
    for row, hypothesis in enumerate(hypotheses):
        if hypothesis.done:
            continue
        for rank in range(hypothesis.num_kept):
            if ends[row][rank]:
                hypothesis.add(scores[row][rank], texts[beams[row][rank]])
        hypothesis.close(max(scores[row]), texts.shape[1])


def finish(
    texts: torch.Tensor, beam_scores: torch.Tensor, hypotheses: list[Hypotheses], num_return: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Let the running texts of unfinished rows compete, and return each row's best ones."""
    num_beams = beam_scores.shape[1]
    for row, hypothesis in enumerate(hypotheses):
        for beam in range(0 if hypothesis.done else num_beams):
            hypothesis.add(beam_scores[row, beam].item(), texts[row * num_beams + beam])
    best = [found for hypothesis in hypotheses for found in hypothesis.best(num_return)]
    return [text for _, text in best], torch.tensor([score for score, _ in best])
