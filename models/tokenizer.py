"""WordPiece tokenizer with the two added tokens [DEC] and [ENC]; the only place that sets a text's first token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

from utils import UserError

MAX_POSITIONS = 512  # positions of BERT's embedding table
PROBE = "Äpfel, naïve don't [SEP] 中文 UPPER lower"  # its tokens tell tokenizers of one vocabulary apart
VOCAB_FILE = Path(__file__).resolve().parent.parent / "configs" / "bert-base-uncased-vocab.txt"


def init_tokenizer(vocab_file: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Build the WordPiece tokenizer with [DEC] (begins decoding) and [ENC] (begins multimodal encoding).

    Its `bos_token_id` is [DEC], the vocabulary's length, and `enc_token_id` [ENC], one more. `vocab_file` has one token
    per line, in BERT's format, or is a folder with transformers' tokenizer; the default is bert-base-uncased's.
    UserError if it is missing or lacks BERT's special tokens.
    """
    path = Path(vocab_file or VOCAB_FILE)
    tokenizer = _tokenizer_of_folder(path) if path.is_dir() else _bert_tokenizer(path)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    if not hasattr(tokenizer, "additional_special_tokens_ids"):  # transformers 5 has none; released scripts read it
        tokenizer.additional_special_tokens_ids = [tokenizer.enc_token_id]
    return tokenizer


def _tokenizer_of_folder(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"the tokenizer in {folder} cannot be read ({reason}); download it again") from None
    ids = tokenizer(PROBE).input_ids
    if (ids[0], ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise UserError(f"the tokenizer in {folder} puts no [CLS] before and [SEP] behind a text; expected BERT's")
    file = folder / "tokenizer.json"
    if file.is_file() and _splits(Tokenizer.from_file(str(file))) != _splits(tokenizer.backend_tokenizer):
        raise UserError(
            f"{file} splits texts otherwise than transformers' {type(tokenizer).__name__} of this folder; add a "
            "tokenizer_config.json that says do_lower_case and strip_accents as it does"
        )
    return tokenizer


def _splits(tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Return the tokens of PROBE, and it as the tokenizer normalises it."""
    normalizer = tokenizer.normalizer
    return tokenizer.encode(PROBE).tokens, normalizer.normalize_str(PROBE) if normalizer else PROBE


def _bert_tokenizer(vocab_file: Path) -> BertTokenizer:
    if not vocab_file.is_file():
        raise UserError(f"vocabulary file {vocab_file} does not exist; point vocab_file at one in BERT's format")
    try:
        tokens = vocab_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"vocabulary file {vocab_file} is not text in UTF-8; expected one token per line") from None
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(tokens)
    if missing:
        raise UserError(f"vocabulary file {vocab_file} lacks {', '.join(sorted(missing))}; add one token per line")
    # transformers 5 takes the vocabulary itself and misreads a file's path; transformers 4 takes the path.
    if int(transformers.__version__.split(".")[0]) < 5:
        return BertTokenizer(vocab_file=str(vocab_file))
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def equal_tokenizers(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return True if two tokenizers have one vocabulary and read case and accents alike."""
    return tokenizer.get_vocab() == other.get_vocab() and tokenizer.tokenize(PROBE) == other.tokenize(PROBE)


class TokenBatch(NamedTuple):
    """Token ids of several texts and their mask, both int64 (batch, length); unpacks into a text transformer's call."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the batch on `device`."""
        return TokenBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def with_first(self, token_id: int) -> "TokenBatch":
        """Return the batch with `token_id` at position 0 of each text."""
        input_ids = self.input_ids.clone()
        input_ids[:, 0] = token_id
        return TokenBatch(input_ids, self.attention_mask)

    def select(self, index: torch.Tensor) -> "TokenBatch":
        """Return the rows `index`, int64 (rows,)."""
        return TokenBatch(self.input_ids[index], self.attention_mask[index])

    def padded_to(self, length: int, pad_token_id: int) -> "TokenBatch":
        """Return the batch padded on the right to at least `length` positions."""
        extra = (0, max(length - self.input_ids.shape[1], 0))
        return TokenBatch(F.pad(self.input_ids, extra, value=pad_token_id), F.pad(self.attention_mask, extra))


def encodable(text: str) -> str:
    """Return a text with "?" for lone surrogates, which JSON may hold and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def tokenize(
    tokenizer: Any, texts: str | Sequence[str], first: str = "cls", max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> TokenBatch:  # fmt: skip
    """Tokenize one or several texts, padded to the longest: (batch, longest).

    Args:
        first: "cls" for ITC and text features; "enc" for ITM, VQA questions, NLVR2 and multimodal features; "dec" for
            decoding.
        max_length: longer texts are cut to this many tokens, [SEP] kept; None cuts at the end of the position table.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    texts = [encodable(text) for text in texts]
    longest = min(tokenizer.model_max_length, MAX_POSITIONS)
    encoded = tokenizer(
        texts, padding="longest", truncation=True, max_length=max_length or longest, return_tensors="pt"
    )
    batch = TokenBatch(encoded.input_ids, encoded.attention_mask)
    if first != "cls":
        batch = batch.with_first({"enc": tokenizer.enc_token_id, "dec": tokenizer.bos_token_id}[first])
    return batch.to(torch.device(device))


def decode(tokenizer: Any, ids: Sequence[torch.Tensor]) -> list[str]:
    """Return the texts of rows of token ids, without special tokens."""
    return [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True) for row in ids]
