"""Sizes and vocabulary of a text transformer, from a JSON file or a mapping."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from models.tokenizer import init_tokenizer
from utils import UserError, short_repr

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
MED_CONFIG = CONFIG_FOLDER / "med_config.json"
BERT_CONFIG = CONFIG_FOLDER / "bert_config.json"
BASE_VOCABULARY = (30522, 30524)  # bert-base-uncased's, without and with [DEC] and [ENC]
MOST = 1_000_000  # of any size
MedSource = str | Path | Mapping | None  # a JSON file or a mapping; '' and None for configs/med_config.json


@dataclass(frozen=True)
class MedConfig:
    """Sizes of a text transformer; the defaults are those of bert-base-uncased.

    `vocab_file` is the path of the vocabulary or of a folder with transformers' tokenizer, '' for bert-base-uncased's.
    `num_embeddings` is the number of word embeddings, if they are more than tokens. Other keys of transformers' BERT
    configuration are accepted and ignored.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    encoder_width: int = 768
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    vocab_file: str = ""
    num_embeddings: int = 0
    hidden_act: str = "gelu"


def activation(name: str) -> nn.Module:
    """Return an activation by its name in transformers' configurations."""
    if not isinstance(name, str) or name not in ACT2FN:
        raise UserError(f"hidden_act is {name!r}; expected one of {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


def create_tokenizer(config: MedConfig) -> Any:
    """Return the tokenizer of a configuration, which cuts texts at the end of the position table."""
    tokenizer = init_tokenizer(config.vocab_file or None)
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def create_text_config(med_config: MedSource, encoder_width: int) -> tuple[Any, MedConfig]:
    """Return the tokenizer and the configuration of a text transformer whose vocabulary includes [DEC] and [ENC].

    `encoder_width` is the width of the states that cross-attention reads; `med_config` and errors as `load_med_config`.
    """
    config = load_med_config(med_config)
    tokenizer = create_tokenizer(config)
    vocab_size = max(0 if config.vocab_file else config.vocab_size, config.num_embeddings, len(tokenizer))
    return tokenizer, replace(config, encoder_width=encoder_width, vocab_size=vocab_size)


def load_med_config(med_config: MedSource) -> MedConfig:
    """Read a configuration from a JSON file or a mapping; '' and None select configs/med_config.json.

    A relative path such as 'configs/med_config.json' that does not exist in the working directory is looked up beside
    the code. UserError if the file is missing or not JSON, a value is wrong, or num_attention_heads does not divide
    hidden_size.
    """
    folder = CONFIG_FOLDER
    if isinstance(med_config, Mapping):
        values = dict(med_config)
    else:
        path = _find_config(Path(med_config or MED_CONFIG))
        folder, values = path.parent, read_json(path)
    config = MedConfig(**{key: value for key, value in values.items() if hasattr(MedConfig, key)})
    _check_values(config)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"med_config: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}; change one of them"
        )
    if config.vocab_file and not Path(config.vocab_file).is_absolute():
        config = replace(config, vocab_file=str(folder / config.vocab_file))
    return config


def _check_values(config: MedConfig) -> None:
    """Raise UserError for a value of another type than the default's, or out of its range."""
    for key, value in vars(config).items():
        usual = getattr(MedConfig, key)
        right, expected = isinstance(value, str | Path), "a text"
        if not isinstance(usual, str):
            # a vocab_size of 0 is that of the tokenizer
            least = int(isinstance(usual, int) and usual > 0 and key != "vocab_size")
            most = 1 if key.endswith("_prob") else MOST
            right = type(value) in (int, type(usual)) and least <= value <= most
            expected = f"{'a whole' if isinstance(usual, int) else 'a'} number from {least} to {most}"
        if not right:
            raise UserError(f"med_config: {key} is {short_repr(value)}; expected {expected}")


def _find_config(path: Path) -> Path:
    beside_code = CONFIG_FOLDER.parent / path
    for candidate in (path, beside_code):
        if candidate.is_file():
            return candidate
    raise UserError(f"med_config {path} exists neither in the working directory nor as {beside_code}; correct the path")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); correct it, or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected an object")
    return content
