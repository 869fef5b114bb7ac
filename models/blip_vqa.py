"""Visual question answering: the question attends to the image, the answer to the question (section 4.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from models.base import ImageTextModel
from models.generation import GenerationConfig, generate
from models.losses import IGNORED, lm_sequence_losses, lm_token_losses
from models.med import TextDecoder, TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.prefix_tree import PrefixTree, Trie
from models.pretrained import load_pretrained
from models.tokenizer import TokenBatch, decode, tokenize
from released import door
from utils import DIVERGED, UserError

MAX_QUESTION_TOKENS = 35
ANSWERS = GenerationConfig(max_length=10, min_length=1, num_beams=3)


class BLIP_VQA(ImageTextModel):
    """Question encoder over image tokens, answer decoder over question states; more arguments as the base's.

    Args:
        smooth_padding: label smoothing includes padding, as in the released training and ranking.
        mask_padding: generated answers do not attend to padding of the question, so that they do not depend on the
            other questions of a batch; the released code attends to it.
    """

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 480, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, smooth_padding: bool = True,
        drop_path_rate: float = 0.1, mask_padding: bool = False,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        config = self.text_config
        self.text_encoder = TextTransformer(config)
        self.text_decoder = TextDecoder(replace(config, encoder_width=config.hidden_size))
        self.smooth_padding, self.mask_padding = smooth_padding, mask_padding
        self.trie: tuple[torch.Tensor, Trie] | None = None  # of the candidates ranked last

    def forward(
        self, image: torch.Tensor, question: Sequence[str], answer: Any = None, n: Sequence[int] | None = None,
        weights: torch.Tensor | None = None, train: bool = True, inference: str = "rank", k_test: int = 128,
    ) -> torch.Tensor | list[str]:  # fmt: skip
        """Return the loss of answers, a scalar, candidates' indices for "rank", int64 (batch,), or "generate"d answers.

        Args:
            image: float (batch, 3, H, W), with a question each.
            answer: in training, the answers of all questions in one list; for ranking, the tokenized candidates
                (`input_ids` and `attention_mask`, first token [DEC]).
            n: number of answers of each question.
            weights: float (answers,), the weight of each answer.
            k_test: number of candidates, chosen by their first token, that are scored in full.
        """
        text = tokenize(self.tokenizer, question, "enc", MAX_QUESTION_TOKENS, image.device)
        states = self.question_states(image, text)
        if train:
            return self.answer_loss(states, text.attention_mask, answer, n, weights)
        if inference == "generate":
            return self.generate_answers(states, text.attention_mask)[0]
        if inference == "rank":
            return self.rank_answer(states, text.attention_mask, answer.input_ids, answer.attention_mask, k_test)
        raise UserError(f"inference is {inference!r}; expected 'rank' or 'generate'")

    def question_states(self, image: torch.Tensor, text: TokenBatch) -> torch.Tensor:
        """Encode questions with their images; returns (batch, length, text width)."""
        return self.text_encoder(*text, self.text_encoder.project(self.visual_encoder(image)))

    def answer_loss(
        self, question_states: torch.Tensor, question_atts: torch.Tensor, answer: Sequence[str], n: Sequence[int],
        weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Sum of the weighted losses of the answers, divided by the number of questions."""
        device = question_states.device
        text = tokenize(self.tokenizer, answer, "dec", device=device)
        owner = torch.repeat_interleave(torch.as_tensor(n), output_size=len(answer)).to(device, non_blocking=True)
        projection = self.text_decoder.bert.project(question_states, mask=question_atts).select(owner)
        hidden = self.text_decoder.hidden_states(*text, projection=projection)
        labels = text.input_ids.masked_fill(text.attention_mask == 0, IGNORED)[:, 1:]
        losses = lm_sequence_losses(self.text_decoder.logits(hidden[:, :-1]), labels, self.smooth_padding)
        return (weights.to(device, non_blocking=True) * losses).sum() / len(question_states)

    @torch.no_grad()
    def generate_answers(
        self, question_states: torch.Tensor, question_atts: torch.Tensor | None = None,
        config: GenerationConfig = ANSWERS,
    ) -> tuple[list[str], torch.Tensor]:  # fmt: skip
        """Decode answers, by default of 1 to 10 tokens by beam search; also return their log-probabilities (batch,).

        Padding of the question (`question_atts` 0) is masked with `mask_padding` only, unlike in the released code.
        """
        start = question_states.new_full((len(question_states), 1), self.tokenizer.bos_token_id, dtype=torch.long)
        mask = question_atts if self.mask_padding else None
        projection = self.text_decoder.bert.project(question_states, mask=mask)
        found = generate(self.text_decoder, projection, start, self.tokenizer.sep_token_id, config)
        return decode(self.tokenizer, found.ids), found.log_probs

    @torch.no_grad()
    def rank_answer(
        self, question_states: torch.Tensor, question_atts: torch.Tensor, answer_ids: torch.Tensor,
        answer_atts: torch.Tensor, k: int,
    ) -> torch.Tensor:  # fmt: skip
        """Return the best candidate of each question, int64 (batch,)."""
        losses, candidates = self.rank_losses(question_states, question_atts, answer_ids, k)
        return candidates.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1)

    @torch.no_grad()
    def rank_losses(
        self, question_states: torch.Tensor, question_atts: torch.Tensor, answer_ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the `k` candidates with the most probable first tokens; UserError if the probabilities are not numbers.

        Args:
            question_states: (batch, length, text width).
            question_atts: (batch, length), 0 at padding.
            answer_ids: int64 (candidates, answer length), first token [DEC].
            k: lowered to the number of candidates.

        Returns:
            Token-summed losses (batch, k) and their candidates, int64 (batch, k).
        """
        decoder = self.text_decoder
        projection = decoder.bert.project(question_states, mask=question_atts)
        start = answer_ids[:1, :1].expand(len(question_states), 1)
        logits = decoder.logits(decoder.hidden_states(start, projection=projection)[:, 0])
        first_probs = logits.float().softmax(dim=1).index_select(1, answer_ids[:, 1])
        candidates = first_probs.topk(min(k, len(answer_ids)), dim=1).indices
        candidates = candidates.masked_fill(first_probs.isnan().any(dim=1, keepdim=True), -1)
        tree = self.select_trees(answer_ids, candidates)  # equal prefixes of candidates are computed once
        hidden = decoder.hidden_states(
            tree.input_ids, attention_mask=tree.attends, positions=tree.positions, projection=projection
        )
        labels = answer_ids[candidates][:, :, 1:]
        labels = labels.masked_fill(labels == self.tokenizer.pad_token_id, IGNORED)
        rows = zip(hidden, tree.node, labels, strict=True)
        return torch.stack([self.tree_losses(*row) for row in rows]), candidates

    def select_trees(self, answer_ids: torch.Tensor, candidates: torch.Tensor) -> PrefixTree:
        """Return the prefix trees of candidates (batch, k), -1 where probabilities are NaN; waits for the device."""
        if self.trie is None or self.trie[0] is not answer_ids:
            texts, pad = answer_ids[:, :-1].cpu().numpy(), self.tokenizer.pad_token_id
            self.trie = answer_ids, Trie(texts, pad, keep_padding=self.smooth_padding)
        chosen = candidates.cpu().numpy()
        if chosen.min() < 0:
            raise UserError(DIVERGED)
        return self.trie[1].select(chosen).to(answer_ids.device)

    def tree_losses(self, hidden: torch.Tensor, node: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One question's losses (k,): states (nodes, width), nodes and labels (k, length - 1)."""
        logits = self.text_decoder.logits(hidden).float()
        log_z, mean = logits.logsumexp(dim=-1), logits.mean(dim=-1)
        chosen = logits[node, labels.clamp_min(0)]
        likelihood, smooth = lm_token_losses(log_z[node], mean[node], chosen, labels, self.smooth_padding)
        return (likelihood + smooth).sum(dim=1)


def blip_vqa(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_VQA:
    """Build a VQA model, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_VQA(**kwargs), pretrained, "vqa", allow_pickle)


__getattr__ = door(__name__)
