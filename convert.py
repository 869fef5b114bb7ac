"""Convert checkpoints: to and from Hugging Face transformers' BLIP, to half precision, to ONNX and torch.export."""

import argparse
import sys
from pathlib import Path

from inference.onnx_export import WHOLE, export_whole
from models.export import export, write_checkpoint, write_huggingface
from models.weights import HUB, RELEASED_HUB
from utils import UserError, run_command

EXAMPLES = """examples:
  python convert.py --to-hf model_base_vqa_capfilt_large.pth --output blip-vqa
  python convert.py --from-hf hf:Salesforce/blip-image-captioning-base --output captioner.safetensors
  python convert.py --to-half output/caption/checkpoint_best.pth --output captioner.safetensors
  python convert.py --to-onnx output/caption/checkpoint_best.pth --part image --output image_encoder.onnx
  python convert.py --to-onnx output/caption/checkpoint_best.pth --part caption --output captioner/
  python convert.py --to-export model_base_retrieval_coco.pth --part match --output match.pt2
"""
WEIGHTS = (".safetensors", ".pth")
ENDINGS = {"to_hf": (), "from_hf": WEIGHTS, "to_half": WEIGHTS, "to_onnx": (".onnx",), "to_export": (".pt2",)}
NOTES = """The processor of transformers' VQA model starts questions with [CLS]; BLIP was trained with [ENC]. Set it
yourself: inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]").
transformers divides the score of a caption by its generated length, the released code by its whole length: pass
length_penalty=0 to both for equal beam searches. Its matching model starts texts with [CLS], as this project's does
with first_token="cls"."""


def main() -> None:
    """Convert as the command line says."""
    args = _parser().parse_args()
    try:
        convert(args)
    except OSError as error:
        reason = f"{args.output} could not be written ({error.strerror}); free space, or choose --output"
        raise UserError(reason) from None
    print(f"wrote {args.output}")


def convert(args: argparse.Namespace) -> None:
    """Convert one checkpoint."""
    output, allow_pickle = Path(args.output), args.allow_pickle
    conversion = next(name for name in ENDINGS if getattr(args, name))
    endings = () if conversion == "to_onnx" and args.part in WHOLE else ENDINGS[conversion]
    refuse_output(output, conversion, endings, args.overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.to_hf:
        write_huggingface(args.to_hf, output, args.task, allow_pickle)
        print(NOTES)
    elif args.from_hf:
        source = args.from_hf if args.from_hf.startswith((HUB, RELEASED_HUB)) else HUB + args.from_hf
        write_checkpoint(source, output, allow_pickle)
    elif args.to_half:
        write_checkpoint(args.to_half, output, allow_pickle, half=True)
    elif args.to_onnx and args.part in WHOLE:
        export_whole(args.to_onnx, args.part, output, allow_pickle, args.int8)
    else:
        export(args.to_onnx or args.to_export, args.part, output, bool(args.to_onnx), allow_pickle)


def refuse_output(output: Path, conversion: str, endings: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output that exists, or has not the ending of its format; a folder has none."""
    if output.suffix not in endings and (endings or output.suffix in (*WEIGHTS, ".bin", ".onnx", ".pt2")):
        expected = " or ".join(endings) or "a folder"
        raise UserError(f"--output is {output}; --{conversion.replace('_', '-')} writes {expected}, choose such a name")
    used = any(output.iterdir()) if output.is_dir() else output.exists()
    if used and not overwrite:
        raise UserError(f"{output} exists; give another --output, or --overwrite")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"{EXAMPLES}\n{NOTES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to-hf", metavar="CHECKPOINT", help="write a folder for transformers' from_pretrained")
    what.add_argument("--from-hf", metavar="FOLDER", help="read such a folder, hf:owner/name or hf-released:owner/name")
    what.add_argument("--to-half", metavar="CHECKPOINT", help="write half precision, no momentum encoders")
    what.add_argument("--to-onnx", metavar="CHECKPOINT", help="write ONNX")
    what.add_argument("--to-export", metavar="CHECKPOINT", help="write a .pt2 file for torch.export.load")
    parser.add_argument("--output", required=True, help="folder for --to-hf; file ending in .safetensors, .pth, ...")
    parser.add_argument(
        "--task", choices=("caption", "vqa", "match"), default="", help="model of --to-hf, if several fit"
    )
    parser.add_argument(
        "--part", choices=("image", "match", *WHOLE), default="image",
        help="image encoder or matching model; or, with --to-onnx, the whole captioner or VQA model: a folder",
    )  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="8-bit weights of a whole model: a third of the size")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    parser.add_argument("--allow_pickle", action="store_true", help="accept a checkpoint that may run code")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
