"""The sizes of a model from its checkpoint."""

from collections.abc import Mapping
from typing import Any

from models.med_config import BASE_VOCABULARY
from models.vit import VARIANTS
from models.weights import State, read_checkpoint
from utils import UserError

HEAD_WIDTH = 64  # in every released model
BASE_TEXT = (768, 12, 3072)  # width, layers and feed-forward width of configs/med_config.json


def settings_of(source: str, allow_pickle: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that build the model of a checkpoint, and the configuration saved with it, {} if none was.

    The arguments are "vit", "image_size", "med_config", and "embed_dim" if there are contrastive projections. Sizes
    come from the shapes of the weights. What these do not show, such as the number of heads and the vocabulary, comes
    from the saved configuration; without one, heads have width 64, as in every released model.

    `source` and `allow_pickle` are as for `models.pretrained.load_pretrained`. UserError if the file is missing, holds
    no BLIP weights, or has an unknown vocabulary.
    """
    state, config = read_checkpoint(source, allow_pickle)
    if "visual_encoder.pos_embed" not in state:
        raise UserError(f"{source} holds no BLIP model (no visual_encoder.pos_embed); give another checkpoint")
    try:
        patch_size = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
        grid = round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        image_size = int(config.get("processor_size", grid * patch_size))
        settings = {"vit": vit_of(state, config, patch_size), "image_size": image_size}
        settings["med_config"] = med_config_of(state, config, source)
        if "vision_proj.weight" in state:
            settings["embed_dim"] = len(state["vision_proj.weight"])
        return settings, config
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source} holds no complete BLIP model ({reason}); give another checkpoint") from None


def vit_of(state: State, config: Mapping[str, Any], patch_size: int) -> str | dict[str, int]:
    """Return the name of the image encoder, or its sizes if it has no name."""
    width = state["visual_encoder.pos_embed"].shape[-1]
    saved = config.get("vit")
    sizes = {
        "embed_dim": width,
        "depth": count_blocks(state, "visual_encoder.blocks."),
        "num_heads": max(width // HEAD_WIDTH, 1),
        "patch_size": patch_size,
    }
    usual = {"mlp_width": 4 * width, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    found = {"mlp_width": len(state["visual_encoder.blocks.0.mlp.fc1.weight"])}
    if isinstance(saved, Mapping):
        found |= {key: saved[key] for key in ("num_heads", *usual) if key in saved and key != "mlp_width"}
    sizes |= {key: value for key, value in found.items() if value != usual.get(key)}
    return next((name for name, variant in VARIANTS.items() if variant == sizes), sizes)


def med_config_of(state: State, config: Mapping[str, Any], source: str) -> str | dict[str, Any]:
    """Return the configuration of the text transformer: the saved one, or sizes from shapes."""
    saved = config.get("med_config")
    if isinstance(saved, str) and saved:
        return saved
    prefix = "text_encoder." if any(key.startswith("text_encoder.") for key in state) else "text_decoder.bert."
    if f"{prefix}embeddings.word_embeddings.weight" not in state:
        raise UserError(f"{source} holds no text transformer; give another checkpoint")
    vocabulary, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    layers = count_blocks(state, f"{prefix}encoder.layer.")
    inner = len(state[f"{prefix}encoder.layer.0.intermediate.dense.weight"])
    saved = dict(saved or {})
    if vocabulary not in BASE_VOCABULARY and "vocab_file" not in saved:
        raise UserError(
            f"{source} has a vocabulary of {vocabulary} entries and no vocabulary file; give med_config, "
            "a JSON file with vocab_file"
        )
    if (width, layers, inner) == BASE_TEXT and not saved:
        return ""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    positions = len(state[f"{prefix}embeddings.position_embeddings.weight"])
    return {"num_attention_heads": max(width // HEAD_WIDTH, 1), "max_position_embeddings": positions} | saved | sizes


def count_blocks(state: State, prefix: str) -> int:
    """Count the numbered blocks under a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
