"""Caption, question, match, search and encode your own images with any BLIP checkpoint."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save as to_bytes

from bootstrap.shards import fingerprint_of
from inference import load
from inference.explain import explain_rows
from inference.inputs import find_images, read_texts
from inference.search import Index, find_images_by_text, find_texts_by_image
from utils import ProgressLine, UserError, user_message

EXAMPLES = {
    "caption": "python predict.py caption holiday/ --checkpoint model_base_caption_capfilt_large.pth",
    "vqa": "python predict.py vqa cat.jpg --question 'is it asleep?' --checkpoint model_base_vqa_capfilt_large.pth",
    "match": "python predict.py match cat.jpg --text 'a cat on a sofa' --checkpoint model_base_retrieval_coco.pth",
    "search": "python predict.py search holiday/ --text 'a sunset' --checkpoint model_base_retrieval_coco.pth "
    "--index holiday.safetensors",
    "features": "python predict.py features holiday/ --output features.safetensors --checkpoint model_base.pth",
}
IMAGES = "images, folders of them, or lists (.txt, .json, .jsonl)"
ROWS = ("caption", "vqa", "match")  # a row an image, as soon as it is known
ENDS = {"features": "needed: ending in .safetensors or .npy"}
Row = dict[str, Any]


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    main = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="caption|vqa|match|search|features")
    caption = _command(commands, "caption", "write captions")
    caption.add_argument("--num_captions", type=at_least(1), default=1, help="captions of each image (default: 1)")
    caption.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    caption.add_argument("--num_beams", type=at_least(1), help="width of the search; 1 is greedy (default: 3)")
    caption.add_argument(
        "--max_length", type=at_least(1), help="longest caption in tokens, prompt included (default: 20)"
    )
    caption.add_argument(
        "--min_length", type=at_least(1), help="shortest caption in tokens, prompt included (default: 5)"
    )
    caption.add_argument("--top_p", type=float, default=0.9, help="share of probability sampled from (default: 0.9)")
    caption.add_argument("--repetition_penalty", type=float, help="above 1 avoids words said (1, sampling 1.1)")
    caption.add_argument(
        "--prompt", help="what captions continue, without being part of the output (default: 'a picture of ')"
    )
    caption.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")
    vqa = _command(commands, "vqa", "answer questions")
    vqa.add_argument("--question", action="append", required=True, help="may be given many times")
    vqa.add_argument(
        "--answers", default="", help="file of answers to choose among, .txt or .json; else written freely"
    )
    vqa.add_argument("--k_test", type=at_least(1), default=128, help="answers that are scored whole (default: 128)")
    match = _command(commands, "match", "tell how well texts describe images")
    match.add_argument("--text", action="append", required=True, help="may be given many times")
    search = _command(commands, "search", "find images by text, or texts by image", optional=True)
    search.add_argument("--text", action="append", default=[], help="find images by this; may be given many times")
    search.add_argument("--texts", default="", help="file of texts, .txt or .json: find the best for each image")
    search.add_argument("--index", default="", help="file of the images' features, kept for the next search")
    search.add_argument(
        "--k_test", type=at_least(1), default=16, help="candidates that matching re-ranks (default: 16)"
    )
    search.add_argument("--top", type=at_least(1), default=5, help="results of each query (default: 5)")
    for command in (match, search):
        command.add_argument("--first_token", choices=("enc", "cls"), help="cls as the released demo (default: enc)")
    features = _command(commands, "features", "save features of images, as .safetensors or .npy")
    features.add_argument("--kind", choices=("cls", "tokens"), default="cls", help="[CLS] token or all (default: cls)")
    for command in (caption, vqa, match):
        command.add_argument("--explain", default="", metavar="FOLDER", help="write maps of what the model looks at")
        command.add_argument("--method", choices=("gradcam", "attention"), default="gradcam", help="kind of map")
        command.add_argument("--layer", type=at_least(0), help="layer the maps come from, 0 first (default: 2/3 up)")
    return main


def _command(commands: Any, name: str, text: str, optional: bool = False) -> argparse.ArgumentParser:
    """Add a command with the options that all have."""
    command = commands.add_parser(
        name, help=text, description=text.capitalize() + ".", epilog=f"example:\n  {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("images", nargs="*" if optional else "+", help=IMAGES)
    command.add_argument("--checkpoint", required=True, help="weights: a path, a URL, or hf:owner/name")
    command.add_argument("--output", default="", help=f"file of the results ({ENDS.get(name, 'default: printed')})")
    if name in ROWS:
        command.add_argument("--resume", action="store_true", help="leave out images that --output already has")
    command.add_argument("--overwrite", action="store_true", help="replace an --output that is there")
    command.add_argument("--batch_size", type=at_least(1), default=16, help="images at once (default: 16)")
    command.add_argument("--num_workers", type=at_least(0), default=0, help="processes that read images (default: 0)")
    command.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    command.add_argument("--amp", choices=("", "bf16"), default="", help="bf16 for mixed precision")
    command.add_argument("--image_size", type=at_least(1), help="side of the model's input (default: the checkpoint's)")
    command.add_argument("--vit", help="tiny, small, base or large (default: the checkpoint's)")
    command.add_argument("--med_config", help="JSON file of the text transformer (default: the checkpoint's)")
    command.add_argument("--allow_pickle", action="store_true", help="accept a checkpoint that may run code")
    return command


def main() -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args()
    try:
        refuse_output(args)
        args.images = find_images(args.images) if args.images else []
        COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        kept = (
            f"; finished rows are in {args.output}, go on with --resume" if args.command in ROWS and args.output else ""
        )
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 2


def load_model(args: argparse.Namespace, task: str, *settings: str) -> Any:
    """Load the checkpoint of a command line."""
    names = ("image_size", "vit", "med_config", *settings)
    settings = {name: getattr(args, name) for name in names}
    with redirect_stdout(sys.stderr):  # results have standard output to themselves
        return load(task, args.checkpoint, args.device, args.amp, args.allow_pickle, **settings)


def caption(args: argparse.Namespace) -> None:
    """Write captions."""
    model = load_model(args, "caption", "prompt")
    names = ("num_captions", "sample", "num_beams", "max_length", "min_length", "top_p", "repetition_penalty", "seed")
    settings = {name: getattr(args, name) for name in names}
    run(args, model, lambda images: model.captions(images, **settings, **reading(args)))


def vqa(args: argparse.Namespace) -> None:
    """Answer questions."""
    model = load_model(args, "vqa")
    answers = read_texts(Path(args.answers), "answer") if args.answers else ()
    run(args, model, lambda images: model.answers(images, args.question, answers, args.k_test, **reading(args)))


def match(args: argparse.Namespace) -> None:
    """Match images and texts."""
    model = load_model(args, "match", "first_token")
    run(args, model, lambda images: model.matches(images, args.text, **reading(args)))


def search(args: argparse.Namespace) -> None:
    """Find images by text, or texts by image."""
    if bool(args.text) == bool(args.texts):
        raise UserError("give either --text, to find images, or --texts with a file, to find texts for images")
    if args.texts and not args.images:
        raise UserError("give the images that texts are to be found for")
    model = load_model(args, "match", "first_token")
    if args.texts:
        texts = read_texts(Path(args.texts), "caption")
        rows = find_texts_by_image(model, args.images, texts, args.k_test, args.top, **reading(args))
        tell_errors(write(args, progress(rows, len(args.images), "search")), len(args.images))
        return
    mark = [fingerprint_of(args.checkpoint), model.image_size, args.vit, args.med_config]
    index = Index(Path(args.index) if args.index else None, json.dumps(mark))
    tell_errors(index.add(model, args.images, **reading(args)), len(args.images))
    collection = index.part(args.images)
    if not collection[0]:
        raise UserError("there is nothing to search; give images, or an --index that has some")
    tell_errors(
        write(args, find_images_by_text(model, collection, args.text, args.k_test, args.top, args.batch_size)),
        len(collection[0]) + 1,
    )


def features(args: argparse.Namespace) -> None:
    """Save features, with the images' names."""
    output = Path(args.output)
    if output.suffix not in (".safetensors", ".npy"):
        raise UserError(f"--output is {args.output!r}; expected a file ending in .safetensors or .npy")
    model = load_model(args, "features")
    rows = list(
        progress(model.each_features(args.images, args.kind, **reading(args)), len(args.images), "features")
    )
    good = [row for row in rows if "error" not in row]
    tell_errors([row for row in rows if "error" in row], len(rows))
    save_features(output, [row["image"] for row in good], np.stack([row["features"] for row in good]))
    print(f"wrote {len(good)} rows to {output}", file=sys.stderr)


def save_features(output: Path, names: list[str], rows: np.ndarray) -> None:
    """Write features and names: in one .safetensors ("names" of its metadata), or .npy and .names.json beside it."""
    temporary = output.with_name(f"{output.stem}.part{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".npy":
            np.save(temporary, rows)
            output.with_suffix(".names.json").write_text(json.dumps(names))
        else:
            temporary.write_bytes(to_bytes({"features": rows}, {"names": json.dumps(names)}))
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{output} could not be written ({error}); free space or choose --output") from None


COMMANDS = {"caption": caption, "vqa": vqa, "match": match, "search": search, "features": features}


def reading(args: argparse.Namespace) -> dict[str, int]:
    """Return how images are read."""
    return {"batch_size": args.batch_size, "num_workers": args.num_workers}


def run(args: argparse.Namespace, model: Any, predict: Callable[[list[Path]], Iterator[Row]]) -> None:
    """Predict the images of a command line and write rows as they come."""
    done = finished(Path(args.output)) if args.resume and args.output else set()
    left = [path for path in args.images if str(path) not in done]
    rows = predict(left) if left else iter(())
    if args.explain:
        rows = explain_rows(model, rows, Path(args.explain), args.method, args.layer)
    start = time.monotonic()
    failed = write(args, progress(rows, len(left), args.command), append=args.resume)
    seconds = time.monotonic() - start
    print(f"{len(left)} images in {seconds:.1f} s, {len(left) / max(seconds, 1e-9):.2f} images/s", file=sys.stderr)
    tell_errors(failed, len(left))


def progress(rows: Iterable[Row], total: int, title: str) -> Iterator[Row]:
    """Pass rows on, with a progress line."""
    line = ProgressLine(total, title)
    start = time.monotonic()
    for done, row in enumerate(rows, 1):
        yield row
        line.update(done, f"{done / (time.monotonic() - start):.2f} images/s")
    line.close()


def refuse_output(args: argparse.Namespace) -> None:
    """Refuse to write over an earlier result.

    Raises:
        UserError: --output is there, and neither --resume nor --overwrite was given.
    """
    there = args.output and Path(args.output).is_file() and Path(args.output).stat().st_size
    if there and not args.overwrite and not getattr(args, "resume", False):
        more = "continue it with --resume, " if args.command in ROWS else ""
        raise UserError(
            f"{args.output} is there already; {more}replace it with --overwrite, or choose another --output"
        )


def write(args: argparse.Namespace, rows: Iterable[Row], append: bool = False) -> list[Row]:
    """Write rows as JSON lines, each as it comes; returns those with an error."""
    if not args.output:
        return write_lines(sys.stdout, rows)
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a" if append else "w", encoding="utf-8") as file:
            return write_lines(file, rows)
    except OSError as error:
        raise UserError(
            f"{args.output} could not be written ({error.strerror}); free space or choose --output"
        ) from None


def write_lines(file: TextIO, rows: Iterable[Row]) -> list[Row]:
    """Write rows to an open file."""
    failed = []
    for row in rows:
        print(json.dumps(row), file=file, flush=True)
        if "error" in row:
            failed.append(row)
    return failed


def finished(output: Path) -> set[str]:
    """Return the images that an output file already has, and cut off a last line broken by a kill."""
    if not output.is_file():
        return set()
    whole = output.read_bytes()
    end = whole.rfind(b"\n") + 1
    try:
        found = {json.loads(line)["image"] for line in whole[:end].split(b"\n") if line}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output} holds no results of this command; choose another --output") from None
    if end < len(whole):
        os.truncate(output, end)
    return found


def tell_errors(failed: list[Row], total: int) -> None:
    """Tell which images failed; all of them is an error."""
    for row in failed[:5]:
        print(row["error"], file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {total} images could not be used", file=sys.stderr)
    if failed and len(failed) >= total:
        raise UserError("no image could be used; see above")


if __name__ == "__main__":
    sys.exit(main())
