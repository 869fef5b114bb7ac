"""The commands of predict.py: from parsed options to written rows."""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

from inference import load
from inference.explain import explain_rows
from inference.feature_files import FeatureFile
from inference.inputs import find_images, read_prompts, read_texts
from inference.options import ROWS
from inference.predictor import Predictor, Row
from inference.results import Rows, begin, digest_of, refuse_existing, report, write_results
from inference.search import Index, find_images_by_image, find_images_by_text, find_texts_by_image
from inference.sidecars import Sidecars
from inference.tasks import CAPTION_DEFAULTS
from models.generation import GenerationConfig
from utils import UserError, user_message

DECODING = {"num_captions", "seed"} | {field.name for field in fields(GenerationConfig)}


def run(args: argparse.Namespace) -> int:
    """Run a parsed command line; returns the exit code."""
    try:
        if args.command != "features":
            refuse_existing(args.output, getattr(args, "resume", False), args.overwrite)
            if args.output.endswith(".csv") and args.command != "caption":
                raise UserError(f"--output is {args.output}; only captions are written as .csv, choose .jsonl")
        args.prompts = read_prompts(args.images) if args.command == "caption" else {}
        args.images = find_images(args.images, args.recursive) if args.images else []
        COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        resumable = args.command in ROWS and args.output and not args.output.endswith(".csv")
        kept = f"; finished rows are in {args.output}, go on with --resume" if resumable else ""
        kept = "; finished rows are kept, go on with --resume" if args.command == "features" else kept
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 2


def load_model(args: argparse.Namespace, task: str, checkpoint: str = "", **settings: Any) -> Any:
    """Load a checkpoint with the options of a command line."""
    settings = {name: getattr(args, name) for name in ("image_size", "vit", "med_config")} | settings
    with redirect_stdout(sys.stderr):  # standard output is for results
        return load(task, checkpoint or args.checkpoint, args.device, args.amp, args.allow_pickle, **settings)


def caption(args: argparse.Namespace) -> None:
    """Write captions."""
    model = load_model(args, "caption", prompt=args.prompt)
    settings = {name: value for name, value in vars(args).items() if name in DECODING} | {"banned": args.ban}
    settings |= {name: model.setting(name, getattr(args, name)) for name in CAPTION_DEFAULTS}
    record, ranker = settings | {"prompt": model.model.prompt}, None
    if args.rank_by:
        ranker = load_model(args, "match", args.rank_by, image_size=model.image_size, vit=None, med_config=None)
        record |= {"rank_by": ranker.fingerprint()}
    if args.prompts:
        record |= {"prompts": digest_of([f"{image} {text}" for image, text in args.prompts.items()])}
    affixes = args.prefix, args.suffix, bool(ranker), model.model.prompt, args.keep_prompt
    sidecars = Sidecars(args.sidecar_ending, args.sidecar_mode, *affixes)
    if args.sidecar:
        args.images = sidecars.left(args.images)

    def predict(images: list[Path | str]) -> Iterator[Row]:
        rows = model.captions(images, **settings, rank_by=ranker, prompts=args.prompts, **reading(args))
        return sidecars.write(rows) if args.sidecar else rows

    write_rows(args, model, predict, record, sidecars.texts)


def vqa(args: argparse.Namespace) -> None:
    """Answer questions."""
    model = load_model(args, "vqa")
    answers = read_texts(Path(args.answers), "answer") if args.answers else []
    record = {"question": args.question, "answers": digest_of(answers), "k_test": args.k_test}
    settings = reading(args) | {"answers": answers, "k_test": args.k_test}
    write_rows(args, model, lambda images: model.answers(images, args.question, **settings), record)


def match(args: argparse.Namespace) -> None:
    """Match images and texts."""
    model = load_model(args, "match", first_token=args.first_token)
    record = {"text": args.text, "first_token": model.model.first_token}
    write_rows(args, model, lambda images: model.matches(images, args.text, **reading(args)), record)


def search(args: argparse.Namespace) -> None:
    """Find images by text or by image, or texts by image."""
    if bool(args.text) + bool(args.texts) + bool(args.like) != 1:
        raise UserError("give either --text or --like, to find images, or --texts with a file, to find texts")
    if args.texts and not args.images:
        raise UserError("give the images that texts are to be found for")
    model = load_model(args, "match", first_token=args.first_token)
    if args.texts:
        texts = read_texts(Path(args.texts), "caption")
        found = find_texts_by_image(model, args.images, texts, args.k_test, args.top, **reading(args))
        rows = Rows(found, len(args.images), "search")
    else:
        index = Index(Path(args.index) if args.index else None, model.fingerprint())
        report(index.add(model, args.images, **reading(args)), len(args.images))
        collection = index.part(args.images, args.exact)
        if not collection.names:
            raise UserError("there is nothing to search; give images, or an --index that has some")
        if args.like:
            images = find_images(args.like)
            rows = Rows(find_images_by_image(model, collection, images, args.top, **reading(args)), len(images))
        else:
            found = find_images_by_text(model, collection, args.text, args.k_test, args.top, args.batch_size)
            rows = Rows(found, len(found))
    write_results(rows, args.output)
    report(rows.failed, rows.total)


def features(args: argparse.Namespace) -> None:
    """Save features of images or texts, with their names."""
    texts = [*args.text, *(read_texts(Path(args.texts), "caption") if args.texts else ())]
    of_texts = args.kind == "text"
    if bool(texts) != (args.kind in ("text", "multimodal")) or bool(args.images) == of_texts:
        raise UserError("--kind text needs texts alone (--text, --texts), multimodal images and texts, others images")
    model = load_model(args, "features")
    items = list(dict.fromkeys(texts)) if of_texts else [str(image) for image in args.images]
    record = {"command": "features", "weights": model.fingerprint(), "amp": args.amp, "kind": args.kind}
    record |= {"texts": "" if of_texts else digest_of(texts)}
    file = FeatureFile(Path(args.output), record, items, args.resume, args.retry_failed, args.overwrite)
    left = [item for item in items if item not in file.done]
    if of_texts:
        rows = model.each_text(left, args.batch_size) if left else iter(())
    else:
        rows = model.each_features(left, args.kind, texts, **reading(args))
    rows = Rows(rows, len(left), "features")
    file.write(rows)
    report(rows.failed, rows.total)
    file.finish()
    print(f"wrote {len(file.names)} rows to {file.output}", file=sys.stderr)


COMMANDS = {"caption": caption, "vqa": vqa, "match": match, "search": search, "features": features}


def reading(args: argparse.Namespace) -> dict[str, int]:
    """Return the options of reading images."""
    return {"batch_size": args.batch_size, "num_workers": args.num_workers}


def write_rows(
    args: argparse.Namespace, model: Predictor, predict: Callable[[list[Path | str]], Iterator[Row]], settings: Row,
    texts_of: Callable[[Row], list[str]] | None = None,
) -> None:  # fmt: skip
    """Predict the images of a command line and write a row for each as soon as it is known.

    The rows depend on the model and `settings`; `texts_of` gives a row's captions for a .csv file.
    """
    as_lines, done = bool(args.output) and not args.output.endswith(".csv"), set()
    if args.resume and not as_lines or args.retry_failed and not args.resume:
        raise UserError("--resume needs an --output of JSON lines, and --retry_failed needs --resume")
    if as_lines:
        record = {"command": args.command, "weights": model.fingerprint(), "amp": args.amp, **settings}
        done = begin(Path(args.output), record, args.resume, args.retry_failed)
    left = [image for image in args.images if str(image) not in done]
    rows = predict(left) if left else iter(())
    if args.explain:
        rows = explain_rows(model, rows, Path(args.explain), args.method, args.layer)
    start, rows = time.monotonic(), Rows(rows, len(left), args.command)
    if args.output or not getattr(args, "sidecar", False):
        write_results(rows, args.output, as_lines, texts_of)
    else:
        deque(rows, maxlen=0)  # the text files are the output
    seconds = time.monotonic() - start
    print(f"{len(left)} images in {seconds:.1f} s, {len(left) / max(seconds, 1e-9):.2f} images/s", file=sys.stderr)
    report(rows.failed, rows.total)
