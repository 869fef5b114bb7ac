"""Read the architecture of a model from its checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.huggingface import from_huggingface
from models.vit import VARIANTS
from models.weights import resolve, torch_load
from utils import UserError

Shapes = dict[str, tuple[int, ...]]
HEAD_WIDTH = 64  # in every released model
BASE_TEXT = (768, 12, 3072)  # width, layers and feed-forward width of configs/med_config.json
BASE_VOCABULARY = (30522, 30524)  # bert-base-uncased's, without and with [DEC] and [ENC]


def settings_of(source: str, allow_pickle: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that build the model of a checkpoint, and the configuration saved with it.

    Sizes come from the shapes of the weights. The number of heads and the vocabulary come from the saved
    configuration; without one, heads have width 64, as in every released model.

    Args:
        source: a path, a URL or `hf:owner/name`.
        allow_pickle: accept a file that may run code when it is read.

    Returns:
        "vit", "image_size", "med_config", and "embed_dim" if there are contrastive projections; and the
        configuration, {} if none was saved.

    Raises:
        UserError: the file is missing, holds no BLIP weights, or has an unknown vocabulary.
    """
    shapes: Shapes = {}
    config: dict[str, Any] = {}
    for path in resolve(source):
        found, settings = read_shapes(path, allow_pickle)
        shapes |= found
        config |= settings
    shapes = from_huggingface(shapes)
    if "visual_encoder.pos_embed" not in shapes:
        raise UserError(f"{source} holds no BLIP model (no visual_encoder.pos_embed); give another checkpoint")
    try:
        return _settings(shapes, config, source), config
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source} holds no complete BLIP model ({reason}); give another checkpoint") from None


def _settings(shapes: Shapes, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    settings = {"vit": vit_of(shapes, config), "image_size": image_size_of(shapes)}
    settings["med_config"] = med_config_of(shapes, config, source)
    if "vision_proj.weight" in shapes:
        settings["embed_dim"] = shapes["vision_proj.weight"][0]
    return settings


def read_shapes(path: Path, allow_pickle: bool = False) -> tuple[Shapes, dict[str, Any]]:
    """Return the shapes of the weights in a file, and the configuration in it or in config.json beside it."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = torch_load(path, allow_pickle)
    content = content if isinstance(content, Mapping) else {}
    config = content.get("config")
    if isinstance(config, Mapping) and isinstance(config.get("model"), Mapping):  # LAVIS nests settings by topic
        config = {**config, **config["model"]}
    state = content.get("model", content.get("state_dict", content))
    state = state if isinstance(state, Mapping) else {}
    shapes = {str(key): tuple(value.shape) for key, value in state.items() if torch.is_tensor(value)}
    return shapes, dict(config) if isinstance(config, Mapping) else {}


def _read_safetensors(path: Path) -> tuple[Shapes, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    beside = path.with_name("config.json")
    try:
        if "config" in metadata:
            return shapes, dict(json.loads(metadata["config"]))
        return shapes, _from_hub(json.loads(beside.read_text()), path.parent) if beside.is_file() else {}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the configuration of {path} cannot be read ({error}); download it again") from None


def _from_hub(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Translate those parts of transformers' configuration that weights do not show."""
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    heads = text.get("num_attention_heads")
    if (text.get("hidden_size", 768), heads) == (768, 8):
        heads = 12  # Differs from the Hub: its configurations say 8, and the weights were trained with 12
    settings: dict[str, Any] = {}
    if "num_attention_heads" in vision:
        settings["vit"] = {"num_heads": vision["num_attention_heads"]}
    if heads:
        settings["med_config"] = {"num_attention_heads": heads}
    if text.get("vocab_size", 30524) not in BASE_VOCABULARY and (folder / "vocab.txt").is_file():
        settings.setdefault("med_config", {})["vocab_file"] = str((folder / "vocab.txt").resolve())
    return settings


def vit_of(shapes: Shapes, config: Mapping[str, Any]) -> str | dict[str, int]:
    """Return the name of the image encoder, or its sizes if it has no name."""
    width = shapes["visual_encoder.pos_embed"][-1]
    saved = config.get("vit")
    sizes = {
        "embed_dim": width,
        "depth": count_blocks(shapes, "visual_encoder.blocks."),
        "num_heads": saved["num_heads"] if isinstance(saved, Mapping) else max(width // HEAD_WIDTH, 1),
        "patch_size": shapes["visual_encoder.patch_embed.proj.weight"][-1],
    }
    return next((name for name, variant in VARIANTS.items() if variant == sizes), sizes)


def image_size_of(shapes: Shapes) -> int:
    """Return the image side in pixels that the position embeddings fit."""
    grid = round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5)
    return grid * shapes["visual_encoder.patch_embed.proj.weight"][-1]


def med_config_of(shapes: Shapes, config: Mapping[str, Any], source: str) -> str | dict[str, Any]:
    """Return the configuration of the text transformer: the saved one, or sizes from shapes."""
    saved = config.get("med_config")
    if isinstance(saved, str) and saved:
        return saved
    prefix = "text_encoder." if any(key.startswith("text_encoder.") for key in shapes) else "text_decoder.bert."
    if f"{prefix}embeddings.word_embeddings.weight" not in shapes:
        raise UserError(f"{source} holds no text transformer; give another checkpoint")
    vocabulary, width = shapes[f"{prefix}embeddings.word_embeddings.weight"]
    layers = count_blocks(shapes, f"{prefix}encoder.layer.")
    inner = shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0]
    saved = dict(saved or {})
    if vocabulary not in BASE_VOCABULARY and "vocab_file" not in saved:
        raise UserError(
            f"{source} has a vocabulary of {vocabulary} entries and no vocabulary file; give med_config, "
            "a JSON file with vocab_file"
        )
    if (width, layers, inner) == BASE_TEXT and not saved:
        return ""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    positions = shapes[f"{prefix}embeddings.position_embeddings.weight"][0]
    return {"num_attention_heads": max(width // HEAD_WIDTH, 1), "max_position_embeddings": positions} | saved | sizes


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """Count the numbered blocks under a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})
