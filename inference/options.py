"""Command line of predict.py: a command, its images and its options, in any order. Imports nothing slow."""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

EXAMPLES = {
    "caption": "python predict.py caption holiday/ --checkpoint model_base_caption_capfilt_large.pth",
    "vqa": "python predict.py vqa cat.jpg --question 'is it asleep?' --checkpoint model_base_vqa_capfilt_large.pth",
    "match": "python predict.py match cat.jpg --text 'a cat on a sofa' --checkpoint model_base_retrieval_coco.pth",
    "search": "python predict.py search holiday/ --text 'a sunset' --checkpoint model_base_retrieval_coco.pth "
    "--index holiday.safetensors",
    "features": "python predict.py features holiday/ --kind image --output features.safetensors "
    "--checkpoint model_base_retrieval_coco.pth",
}
PURPOSES = {
    "caption": "write captions",
    "vqa": "answer questions",
    "match": "score how well texts describe images",
    "search": "find images by text or by image, or texts by image",
    "features": "save features of images or texts, as .safetensors or .npy",
}
IMAGES = "images, folders of them, URLs, lists (.txt, .json, .jsonl), or - for a list on standard input"
KINDS = {  # kind of feature -> parts of a checkpoint that it needs
    "cls": ("visual_encoder",),
    "tokens": ("visual_encoder",),
    "image": ("visual_encoder", "vision_proj"),
    "text": ("text_encoder", "text_proj"),
    "multimodal": ("visual_encoder", "text_encoder"),
}
MODES = ("skip", "overwrite", "append")  # what to do with text files that exist
ROWS = ("caption", "vqa", "match")  # commands that write a row for each image as soon as it is known
RESUMED = (*ROWS, "features")
ENDINGS = {"features": "needed: ending in .safetensors or .npy", "caption": ".jsonl or .csv; default: printed"}


def parse(description: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; options may stand before, between and after the command and the images."""
    words = list(argv)
    command = next((word for word in words if word in PURPOSES), None)
    if command is None:
        overview = argparse.ArgumentParser(
            description=description,
            epilog="commands, each with its own --help:\n"
            + "".join(f"  {name:10}{purpose}\n" for name, purpose in PURPOSES.items())
            + "\nexamples:\n" + "".join(f"  {line}\n" for line in EXAMPLES.values()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        overview.add_argument("command", choices=PURPOSES, metavar="|".join(PURPOSES))
        overview.parse_known_args(words[:1])
        raise AssertionError("a command was found after all")
    words.remove(command)
    args = _parser(command).parse_intermixed_args(words)
    args.command = command
    return args


def _parser(command: str) -> argparse.ArgumentParser:
    purpose = PURPOSES[command]
    parser = argparse.ArgumentParser(
        f"predict.py {command}", description=purpose.capitalize() + ".", epilog=f"example:\n  {EXAMPLES[command]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    ADD_OWN[command](parser)
    if command in ("match", "search"):
        add("--first_token", choices=("enc", "cls"), help="cls as the released demo (default: enc)")
    add("images", nargs="*" if command in ("search", "features") else "+", help=IMAGES)
    add("--no_recursive", dest="recursive", action="store_false", help="do not search the subfolders of a folder")
    add("--checkpoint", required=True, help="weights: a path, a URL, or hf:owner/name")
    add("--output", default="", help=f"file of the results ({ENDINGS.get(command, 'default: printed')})")
    add("--overwrite", action="store_true", help="replace an --output that exists")
    if command in RESUMED:
        add("--resume", action="store_true", help="leave out images that --output already has")
        add("--retry_failed", action="store_true", help="with --resume: try failed images again")
    if command in ROWS:
        add("--explain", default="", metavar="FOLDER", help="write maps of what the model looks at")
        add("--method", choices=("gradcam", "attention"), default="gradcam", help="kind of map")
        add("--layer", type=whole(0), help="layer the maps come from, 0 first (default: 2/3 up)")
    add("--batch_size", type=whole(1), default=16, help="images at once; halved where they do not fit (default: 16)")
    add("--num_workers", type=whole(0), default=0, help="processes that read images (default: 0)")
    add("--device", default="", help="cuda, xpu, mps or cpu (default: cuda where there is one)")
    add("--amp", choices=("", "bf16", "fp16", "auto"), default="", help="mixed precision")
    add("--image_size", type=whole(1), help="side of the model's input (default: the checkpoint's)")
    add("--vit", help="tiny, small, base or large (default: the checkpoint's)")
    add("--med_config", help="JSON file of the text transformer (default: the checkpoint's)")
    add("--allow_pickle", action="store_true", help="accept a checkpoint that may run code")
    return parser


def _add_caption(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--num_captions", type=whole(1), default=1, help="captions of each image (default: 1)")
    add("--rank_by", default="", help="checkpoint of a matching model that orders the captions, the best first")
    add("--sample", action="store_true", help="nucleus sampling instead of beam search")
    add("--num_beams", type=whole(1), help="width of the search; 1 is greedy (default: 3)")
    add("--max_length", type=whole(1), help="longest caption in tokens, with the prompt (default: 20)")
    add("--min_length", type=whole(1), help="shortest caption in tokens, with the prompt (default: 5)")
    add("--top_p", type=number(0, 1), default=0.9, help="share of probability sampled from (default: 0.9)")
    add("--top_k", type=whole(0), default=50, help="likeliest tokens sampled from, 0 for all (default: 50)")
    add("--temperature", type=number(0), default=1.0, help="of sampling; above 1 for rarer words (default: 1)")
    add("--repetition_penalty", type=number(0), help="above 1 avoids words said (default: 1, in sampling 1.1)")
    add("--length_penalty", type=number(-math.inf), default=1.0, help="above 1 for longer captions (default: 1)")
    add("--no_repeat_ngram_size", type=whole(0), default=0, help="no N tokens in a row occur twice (default: 0, off)")
    add("--ban", action="append", default=[], help="word or phrase that no caption has; may be given many times")
    add("--prompt", help="beginning that captions continue (default: 'a picture of ')")
    add("--seed", type=int, default=42, help="of sampling (default: 42)")
    add("--sidecar", action="store_true", help="write captions into a text file beside each image")
    add("--sidecar_ending", default=".txt", help="ending of the text files (default: .txt)")
    add("--sidecar_mode", choices=MODES, default="skip", help="what to do with text files that exist (default: skip)")
    add("--prefix", default="", help="put before each caption in text files and .csv")
    add("--suffix", default="", help="put after each caption in text files and .csv")
    add("--keep_prompt", action="store_true", help="keep the prompt in text files and .csv (default: cut)")


def _add_vqa(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--question", action="append", required=True, help="may be given many times")
    add("--answers", default="", help="file of answers to choose among, .txt or .json; else written freely")
    add("--k_test", type=whole(1), default=128, help="answers that are scored whole (default: 128)")


def _add_match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", action="append", required=True, help="may be given many times")


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", action="append", default=[], help="find images by this; may be given many times")
    add("--like", action="append", default=[], metavar="IMAGE", help="find images like this; may be given many times")
    add("--texts", default="", help="file of texts, .txt or .json: find the best for each image")
    add("--exact", action="store_true", help="compare with every image, also in an index of more than 100,000")
    add("--index", default="", help="file of the images' features, kept for the next search")
    add("--k_test", type=whole(1), default=16, help="candidates that matching re-ranks (default: 16)")
    add("--top", type=whole(1), default=5, help="results of each query (default: 5)")


def _add_features(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kind", choices=KINDS, default="cls", help="[CLS] token or all tokens of images; unit-length contrastive "
        "feature of images or of texts; or [ENC] token of texts and images together (default: cls)")  # fmt: skip
    add("--text", action="append", default=[], help="text of --kind text or multimodal; may be given many times")
    add("--texts", default="", help="file of such texts, .txt or .json")


ADD_OWN: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "caption": _add_caption, "vqa": _add_vqa, "match": _add_match, "search": _add_search, "features": _add_features,
}  # fmt: skip


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least `least`."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least {least}")

    return read


def number(above: float, most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers above `above` and of at most `most`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if math.isfinite(float(text)) and above < float(text) <= most:
                return float(text)
        bounds = "" if above == -math.inf else f" above {above:g}"
        bounds += "" if most == math.inf else f", at most {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number{bounds}")

    return read
