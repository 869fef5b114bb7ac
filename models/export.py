"""Write checkpoints in other formats: Hugging Face transformers, half precision, ONNX and torch.export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from files import write_whole
from models.architecture import settings_of
from models.base import ImageTextModel
from models.blip import blip_decoder
from models.blip_itm import blip_itm
from models.blip_vqa import blip_vqa
from models.hub import FOLLOWED, GENERATION, PIXELS, RESAMPLE
from models.huggingface import to_huggingface
from models.pretrained import checkpoint_kind
from models.tokenizer import tokenize
from models.weights import Config, read_source
from utils import UserError

LEFT_OUT = ("_m.", "queue", "decoder.cls.predictions.decoder.")  # they start fresh, or are tied
KEPT = (*GENERATION, "prompt", *PIXELS, "processor_size")  # settings that stay with a checkpoint
TASK_OF = {"captioning": "caption", "VQA": "vqa", "retrieval": "match"}
FACTORIES: dict[str, Callable[..., nn.Module]] = {"caption": blip_decoder, "vqa": blip_vqa, "match": blip_itm}


def build(
    source: str, task: str = "", allow_pickle: bool = False, otherwise: str = ""
) -> tuple[nn.Module, Config, str]:
    """Build a checkpoint's model in eval mode; return it, its settings and KEPT, and its task.

    Without `task` the checkpoint decides, and `otherwise` where it fits several tasks, or it is a UserError.
    """
    settings, config = settings_of(source, allow_pickle)
    kind = checkpoint_kind(read_source(source, allow_pickle))
    task = task or TASK_OF.get(kind, otherwise)
    if task not in FACTORIES:
        raise UserError(f"{source} is of kind {kind}; choose the model with --task: caption, vqa or match")
    arguments = {key: value for key, value in settings.items() if key != "embed_dim" or task == "match"}
    kept = {key: config[key] for key in KEPT if key in config}
    if task == "caption" and (kind == "pretraining" or "prompt" in kept):
        arguments["prompt"] = "" if kind == "pretraining" else kept["prompt"]
    model = FACTORIES[task](pretrained=source, allow_pickle=allow_pickle, **arguments)
    return model.eval(), settings | kept, task


# Hugging Face.


def write_huggingface(source: str, folder: Path, task: str = "", allow_pickle: bool = False) -> None:
    """Write a captioner, VQA model or matching model, with its processor, for transformers' `from_pretrained`."""
    import transformers

    kinds = {
        "caption": transformers.BlipForConditionalGeneration,
        "vqa": transformers.BlipForQuestionAnswering,
        "match": transformers.BlipForImageTextRetrieval,
    }
    model, settings, task = build(source, task, allow_pickle)
    config = hub_config(model, settings)
    if task == "vqa" and config.text_config.hidden_size != config.vision_config.hidden_size:
        raise UserError(
            f"transformers' VQA model expects question states of width {config.vision_config.hidden_size} and this "
            f"model's have width {config.text_config.hidden_size}; it cannot be converted"
        )
    other = kinds[task](config)
    unexpected = other.load_state_dict(to_huggingface(model.state_dict()), strict=False).unexpected_keys
    assert not unexpected, unexpected
    other.tie_weights()
    if task == "caption":
        other.config.prompt = model.prompt
        other.generation_config.update(**{key: settings[key] for key in GENERATION if key in settings})
    other.save_pretrained(folder)
    pixels: dict[str, Any] = {"size": dict.fromkeys(("height", "width"), settings["image_size"])}
    pixels |= {key: settings[key] for key in PIXELS if key in settings}
    if "resample" in pixels:
        pixels["resample"] = RESAMPLE.index(pixels["resample"])
    transformers.BlipProcessor(transformers.BlipImageProcessor(**pixels), model.tokenizer).save_pretrained(folder)


def hub_config(model: ImageTextModel, settings: Config) -> Any:
    """Return transformers' configuration of a model built with `settings`."""
    from transformers import BlipConfig

    med, vit, tokenizer = model.text_config, model.vit_sizes, model.tokenizer
    same = (*FOLLOWED, "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    text = {name: getattr(med, name) for name in same} | dict(
        encoder_hidden_size=vit["embed_dim"], is_decoder=True, label_smoothing=0.1,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=vit["embed_dim"], intermediate_size=vit.get("mlp_width", 4 * vit["embed_dim"]),
        num_hidden_layers=vit["depth"], num_attention_heads=vit["num_heads"], patch_size=vit["patch_size"],
        image_size=settings["image_size"], layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        hidden_act=vit.get("hidden_act", "gelu"),
    )  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=settings.get("embed_dim", 256))


def write_checkpoint(source: str, output: Path, allow_pickle: bool = False, half: bool = False) -> None:
    """Write a checkpoint and the settings that build its model; `half` in half precision, without momentum."""
    settings, config = settings_of(source, allow_pickle)
    settings |= {key: config[key] for key in KEPT if key in config}
    if checkpoint_kind(state := read_source(source, allow_pickle)) == "pretraining":
        settings["prompt"] = ""  # pretraining has no prompt
    if half:
        state = {key: value.half() for key, value in state.items() if not any(part in key for part in LEFT_OUT)}
    with write_whole(output, "wb") as file:
        if output.suffix == ".pth":
            torch.save({"model": state, "config": settings}, file)
        else:
            whole = {key: value.contiguous().clone() for key, value in state.items()}
            file.write(to_bytes(whole, {"config": json.dumps(settings)}))


# ONNX and torch.export.


class MatchPart(nn.Module):
    """Images (batch, 3, H, W) and texts (batch, length), first token set, to matching logits (batch, 2)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Match."""
        text = self.model.text_encoder
        projection = text.project(self.model.visual_encoder(image))
        return self.model.itm_head(text(input_ids, attention_mask, projection)[:, 0])


def select_part(source: str, part: str, allow_pickle: bool = False) -> tuple[nn.Module, tuple, dict[str, dict]]:
    """Return the part of a model to export, example inputs, and their dynamic dimensions."""
    model, settings, _ = build(source, "match" if part == "match" else "", allow_pickle, otherwise="caption")
    side, batch = settings["image_size"], torch.export.Dim("batch", min=1, max=1024)
    image, shapes = torch.zeros(2, 3, side, side), {"image": {0: batch}}
    if part == "image":
        return model.visual_encoder, (image,), shapes
    text = tokenize(model.tokenizer, ["a cat", "a cat on a sofa"], "enc")
    shapes |= dict.fromkeys(("input_ids", "attention_mask"), {0: batch, 1: torch.export.Dim("length", min=2, max=64)})
    return MatchPart(model).eval(), (image, *text), shapes


def export(source: str, part: str, output: Path, onnx: bool, allow_pickle: bool = False) -> None:
    """Export the image encoder ("image") or the matching model ("match") of a checkpoint.

    With `onnx` as ONNX, which needs the packages onnx and onnxscript, otherwise for `torch.export.load`.
    """
    module, inputs, shapes = select_part(source, part, allow_pickle)
    if not onnx:
        torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), output)
        return
    try:
        torch.onnx.export(
            module, inputs, output, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are not installed ({error}); pip install onnx onnxscript") from None
