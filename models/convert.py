"""Convert checkpoints: to and from Hugging Face transformers' BLIP, to half precision, to ONNX and torch.export."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import nn

from models.architecture import settings_of
from models.blip import blip_decoder, ids_and_mask
from models.blip_itm import blip_itm
from models.blip_vqa import blip_vqa
from models.huggingface import to_huggingface
from models.med import load_med_config
from models.pretrained import kind_of
from models.tokenizer import TokenBatch, init_tokenizer, tokenize
from models.vit import vit_sizes
from models.weights import read_source
from utils import UserError, user_message

EXAMPLES = """examples:
  python -m models.pretrained --to-hf model_base_vqa_capfilt_large.pth --output blip-vqa
  python -m models.pretrained --from-hf hf:Salesforce/blip-image-captioning-base --output captioner.safetensors
  python -m models.pretrained --to-half output/caption/checkpoint_best.pth --output captioner.safetensors
  python -m models.pretrained --to-onnx output/caption/checkpoint_best.pth --part image --output image_encoder.onnx
  python -m models.pretrained --to-export model_base_retrieval_coco.pth --part match --output match.pt2
"""
NOTES = """A VQA model that transformers loads reads questions that begin with [CLS], as its processor writes them;
BLIP was trained with [ENC]. Set it yourself:
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]").
transformers divides a caption's score by its generated length, the released code by its whole length: pass
length_penalty=0 to both for equal beam searches. Its matching model begins texts with [CLS], as ours does with
first_token="cls"."""
LEFT_OUT = ("_m.", "queue", "decoder.cls.predictions.decoder.")  # twins and queues start anew, the LM head is tied
KEPT = ("max_length", "min_length", "num_beams", "prompt")  # how captions are written, for whoever loads the file
TASK_OF = {"captioning": "caption", "VQA": "vqa", "retrieval": "match"}
FACTORIES: dict[str, Callable[..., nn.Module]] = {"caption": blip_decoder, "vqa": blip_vqa, "match": blip_itm}


def build(source: str, task: str = "", allow_pickle: bool = False) -> tuple[nn.Module, dict[str, Any], str]:
    """Build the model of a checkpoint, in eval mode; returns it, the settings it was built with, and its task.

    Raises:
        UserError: a checkpoint of several tasks, and none was given.
    """
    settings, _ = settings_of(source, allow_pickle)
    kind = kind_of(read_source(source, allow_pickle))
    task = task or TASK_OF.get(kind, "")
    if task not in FACTORIES:
        raise UserError(f"{source} is a {kind} checkpoint; say with --task which model to make: caption, vqa or match")
    arguments = {key: value for key, value in settings.items() if key != "embed_dim" or task == "match"}
    model = FACTORIES[task](pretrained=source, allow_pickle=allow_pickle, **arguments)
    return model.eval(), settings, task


# Hugging Face.


def to_hub(source: str, folder: Path, task: str = "", allow_pickle: bool = False) -> None:
    """Write a captioner, VQA model or matching model as transformers' `from_pretrained` reads it, processor included.

    Raises:
        UserError: transformers has no place for it (a VQA model whose two widths differ).
    """
    import transformers

    kinds = {
        "caption": transformers.BlipForConditionalGeneration,
        "vqa": transformers.BlipForQuestionAnswering,
        "match": transformers.BlipForImageTextRetrieval,
    }
    model, settings, task = build(source, task, allow_pickle)
    config = hub_config(settings, len(model.tokenizer))
    if task == "vqa" and config.text_config.hidden_size != config.vision_config.hidden_size:
        raise UserError(
            f"transformers' VQA model lets the answer read states {config.vision_config.hidden_size} wide and the "
            f"question's are {config.text_config.hidden_size}: it has no place for this model"
        )
    other = kinds[task](config)
    unexpected = other.load_state_dict(to_huggingface(model.state_dict()), strict=False).unexpected_keys
    assert not unexpected, unexpected  # every parameter of ours has a place there
    other.tie_weights()
    other.save_pretrained(folder)
    size = {"height": settings["image_size"], "width": settings["image_size"]}
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), model.tokenizer).save_pretrained(folder)
    write_vocabulary(model.tokenizer, folder)


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.txt without the two added tokens, for a vocabulary that is not BERT's."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[: tokenizer.bos_token_id]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")


def hub_config(settings: dict[str, Any], vocab_size: int) -> Any:
    """Return transformers' configuration of an architecture."""
    from transformers import BlipConfig

    med = load_med_config(settings["med_config"])
    vit, tokenizer = vit_sizes(settings["vit"]), init_tokenizer(med.vocab_file or None)
    text = dict(
        hidden_size=med.hidden_size, num_hidden_layers=med.num_hidden_layers, layer_norm_eps=med.layer_norm_eps,
        num_attention_heads=med.num_attention_heads, intermediate_size=med.intermediate_size, vocab_size=vocab_size,
        max_position_embeddings=med.max_position_embeddings, encoder_hidden_size=vit["embed_dim"], hidden_act="gelu",
        hidden_dropout_prob=med.hidden_dropout_prob, attention_probs_dropout_prob=med.attention_probs_dropout_prob,
        is_decoder=True, label_smoothing=0.1, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=vit["embed_dim"], intermediate_size=4 * vit["embed_dim"], num_hidden_layers=vit["depth"],
        num_attention_heads=vit["num_heads"], patch_size=vit["patch_size"], image_size=settings["image_size"],
        layer_norm_eps=1e-6, hidden_act="gelu",
    )  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=settings.get("embed_dim", 256))


def save(source: str, output: Path, allow_pickle: bool = False, half: bool = False) -> None:
    """Write a checkpoint's weights under our names, with the settings that build its model: .safetensors or .pth.

    Args:
        source: a path, a URL or `hf:owner/name`.
        output: the file.
        allow_pickle: accept a file that may run code when it is read.
        half: in half precision, without momentum copies and queues.
    """
    settings, config = settings_of(source, allow_pickle)
    settings |= {key: config[key] for key in KEPT if key in config}
    if kind_of(state := read_source(source, allow_pickle)) == "pretraining":
        settings["prompt"] = ""  # no prompt in pretraining
    if half:
        state = {key: value.half() for key, value in state.items() if not any(part in key for part in LEFT_OUT)}
    temporary = output.with_name(output.name + ".part")
    try:
        if output.suffix == ".pth":
            torch.save({"model": state, "config": settings}, temporary)
        else:
            whole = {key: value.contiguous().clone() for key, value in state.items()}
            temporary.write_bytes(to_bytes(whole, {"config": json.dumps(settings)}))
        temporary.replace(output)
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{output} could not be written ({error}); free space, or choose --output") from None


# ONNX and torch.export.


class ImagePart(nn.Module):
    """Images (batch, 3, H, W) to tokens (batch, 1 + patches, width)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual_encoder = model.visual_encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Encode."""
        return self.visual_encoder(image)


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


def exported(source: str, part: str, allow_pickle: bool = False) -> tuple[nn.Module, tuple, dict[str, dict]]:
    """Return the part of a checkpoint's model to export, example inputs, and which of their sides may vary.

    Raises:
        UserError: the checkpoint has no such part, or there is none of that name.
    """
    task = {"image": "", "match": "match"}[part]
    model, settings, task = build(source, task or _any_task(source, allow_pickle), allow_pickle)
    side, batch = settings["image_size"], torch.export.Dim("batch", min=1, max=1024)
    image = torch.zeros(2, 3, side, side)
    if part == "image":
        return ImagePart(model).eval(), (image,), {"image": {0: batch}}
    text: TokenBatch = tokenize(model.tokenizer, ["a picture", "a picture of it"], "enc")
    shape = {0: batch, 1: torch.export.Dim("length", min=2, max=64)}
    return (
        MatchPart(model).eval(),
        (image, *ids_and_mask(text)),
        {"image": {0: batch}, "input_ids": shape, "attention_mask": shape},
    )


def _any_task(source: str, allow_pickle: bool) -> str:
    return TASK_OF.get(kind_of(read_source(source, allow_pickle)), "caption")


def export(source: str, part: str, output: Path, onnx: bool, allow_pickle: bool = False) -> None:
    """Export the image encoder or the matching model.

    Args:
        source: a checkpoint.
        part: "image" or "match".
        output: the file.
        onnx: write ONNX (needs the packages onnx and onnxscript), otherwise what `torch.export.load` reads.
        allow_pickle: accept a checkpoint that may run code when it is read.

    Raises:
        UserError: a package is missing.
    """
    module, inputs, shapes = exported(source, part, allow_pickle)
    if not onnx:
        torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), output)
        return
    try:
        torch.onnx.export(
            module, inputs, output, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are not here ({error}); pip install onnx onnxscript") from None


# Command line.


def main() -> int:
    """Convert as the command line says; returns the exit code."""
    args = _parser().parse_args()
    try:
        convert(args)
        print(f"wrote {args.output}")
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {args.output} could not be written ({error.strerror}); free space, or choose --output",
            file=sys.stderr,
        )
        return 2


def convert(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    output, allow_pickle = Path(args.output), args.allow_pickle
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.to_hf:
        to_hub(args.to_hf, output, args.task, allow_pickle)
        print(NOTES)
    elif args.from_hf:
        save(args.from_hf if args.from_hf.startswith("hf:") else f"hf:{args.from_hf}", output, allow_pickle)
    elif args.to_half:
        save(args.to_half, output, allow_pickle, half=True)
    else:
        export(args.to_onnx or args.to_export, args.part, output, bool(args.to_onnx), allow_pickle)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.pretrained", description=__doc__, epilog=f"{EXAMPLES}\n{NOTES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to-hf", metavar="CHECKPOINT", help="write a folder for transformers' from_pretrained")
    what.add_argument("--from-hf", metavar="FOLDER", help="read such a folder, or hf:owner/name")
    what.add_argument("--to-half", metavar="CHECKPOINT", help="half precision, without momentum copies and queues")
    what.add_argument("--to-onnx", metavar="CHECKPOINT", help="write ONNX")
    what.add_argument("--to-export", metavar="CHECKPOINT", help="write what torch.export.load reads (.pt2)")
    parser.add_argument("--output", required=True, help="file, or folder for --to-hf")
    parser.add_argument(
        "--task", choices=("caption", "vqa", "match"), default="", help="model of --to-hf, if not clear"
    )
    parser.add_argument("--part", choices=("image", "match"), default="image", help="image encoder or matching model")
    parser.add_argument("--allow_pickle", action="store_true", help="accept a checkpoint that may run code")
    return parser
