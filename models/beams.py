"""Beam search on the host: running and finished texts of a prompt, as in transformers 4.15."""

from dataclasses import dataclass, field


@dataclass
class Text:
    """A text: its tokens, prompt included, and the sums of constrained and own log-probabilities of what follows it."""

    tokens: list[int]
    score: float = 0.0
    log_prob: float = 0.0


@dataclass
class Beams:
    """The search for one prompt."""

    texts: list[Text]  # running, best first
    length_penalty: float  # as `GenerationConfig`
    finished: list[tuple[float, Text]] = field(default_factory=list)  # the best, with scores, at most one a beam
    done: bool = False

    def advance(self, candidates: list[list[float]], vocab_size: int, eos_token_id: int) -> list[int]:
        """Extend the beams by one token; return the beam that each new one continues.

        `candidates` are the 2 * beams best continuations, best first: sum of constrained log-probabilities, index among
        beams * vocabulary, and log-probability of the token.
        """
        beams, texts, origins = len(self.texts), [], []
        for rank, (score, index, log_prob) in enumerate(candidates):
            beam, token = divmod(int(index), vocab_size)
            text = self.texts[beam]
            if token == eos_token_id and rank < beams:
                self.finish(Text(text.tokens, score, text.log_prob + log_prob))
            elif token != eos_token_id and len(texts) < beams:
                texts.append(Text([*text.tokens, token], score, text.log_prob + log_prob))
                origins.append(beam)
        bound = candidates[0][0] / len(self.texts[0].tokens) ** self.length_penalty
        self.done = self.done or (len(self.finished) == beams and min(s for s, _ in self.finished) >= bound)
        self.texts = texts
        return origins

    def finish(self, text: Text) -> None:
        """Keep a finished text, without its end token, if it is among the best and the search is not over."""
        score = text.score / len(text.tokens) ** self.length_penalty
        if len(self.finished) == len(self.texts):
            worst = min(range(len(self.finished)), key=lambda i: self.finished[i][0])
            if self.done or score <= self.finished[worst][0]:
                return
            del self.finished[worst]
        self.finished.append((score, text))

    def best(self, number: int) -> list[Text]:
        """Return the best finished texts, best first, the latest first among equals; running ones compete too."""
        for text in self.texts:
            self.finish(text)
        return [text for _, text in sorted(self.finished, key=lambda found: found[0])[: -number - 1 : -1]]
