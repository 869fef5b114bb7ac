"""Bootstrap web pairs: caption every picture, and keep of web and synthetic texts those that match (section 3.3)."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.pretrain import MAX_WORDS, open_lists
from data.text import pre_caption
from engine.bootstrap import Row, Shards, Tally, fingerprint_of, merge, prepare, run_shards
from engine.config import CapFiltConfig
from engine.predictor import Captioner, Matcher, load
from engine.report import write_report
from engine.run import Run, launch
from models.architecture import settings_of
from utils import UserError, is_main_process, on_main_process

EXAMPLES = (
    "python capfilt.py --set pairs=[web.json] --set image_root=pictures --set captioner=captioner.pth "
    "--set filter=retrieval.pth --output_dir output/capfilt",
    "python -m torch.distributed.run --nproc_per_node=8 capfilt.py --config configs/capfilt.yaml",
)
STAGES = ("caption", "filter", "both")
FREE = ("batch_size", "num_workers", "amp", "allow_pickle", "image_root", "stage")  # what a continued run may change


def make_captions(config: CapFiltConfig, model: Captioner, shards: Shards, seed: int) -> Callable[[int], list[Row]]:
    """Return the work of the captioning stage: a shard's pictures, each once, with their captions."""
    names = ("sample", "top_p", "num_beams", "num_captions", "max_length", "min_length", "repetition_penalty")
    settings = {name: config[name] for name in (*names, "batch_size", "num_workers")}

    def work(shard: int) -> list[Row]:
        images = list(dict.fromkeys(image for image, _ in shards.pairs(shard)))
        paths = [Path(config.image_root) / image for image in images]
        rows = model.captions(paths, names=images, seed=seed, **settings)
        return [row if "error" in row else caption_row(row) for row in rows]

    return work


def caption_row(row: Row) -> Row:
    """Return an image's distinct captions, likeliest first."""
    return {"image": row["image"], "captions": list(dict.fromkeys(found["caption"] for found in row["captions"]))}


def judge_texts(
    config: CapFiltConfig, model: Matcher, shards: Shards, captions: Shards | None
) -> Callable[[int], list[Row]]:
    """Return the work of the filtering stage: every text of a shard with its probability, and whether it is kept."""

    def work(shard: int) -> list[Row]:
        texts = texts_of(shards, captions, shard)
        images = list(texts)

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = model.model.visual_encoder(image)
            found = model.own_probabilities(tokens, [[text for _, text in texts[name]] for name in names])
            return [{"probabilities": row} for row in found]

        paths = [Path(config.image_root) / image for image in images]
        rows = []
        for row in model.rows(paths, predict, config.batch_size, config.num_workers, images):
            if "error" in row:
                rows.append(row)
                continue
            for (source, text), probability in zip(texts[row["image"]], row["probabilities"], strict=True):
                kept = probability >= config.threshold
                rows.append(text_row(row["image"], text, source, kept, probability=round(probability, 4)))
        return rows

    return work


def join_texts(shards: Shards, captions: Shards) -> Callable[[int], list[Row]]:
    """Return the work of a run that only captions: all texts of a shard, all kept."""

    def work(shard: int) -> list[Row]:
        errors = [row for row in captions.rows(shard) if "error" in row]
        bad = {row["image"] for row in errors}
        texts = texts_of(shards, captions, shard)
        return errors + [
            text_row(image, text, source, True) for image in texts if image not in bad for source, text in texts[image]
        ]

    return work


def texts_of(shards: Shards, captions: Shards | None, shard: int) -> dict[str, list[tuple[str, str]]]:
    """Return the (source, text) pairs of each picture of a shard, its web texts first."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for image, text in shards.pairs(shard):
        texts.setdefault(image, []).append(("web", pre_caption(text, MAX_WORDS)))
    for row in captions.rows(shard) if captions else ():
        texts[row["image"]] += [("synthetic", text) for text in row.get("captions", ())]
    return {image: [(source, text) for source, text in found if text.strip()] for image, found in texts.items()}


def text_row(image: str, text: str, source: str, kept: bool, **more: Any) -> Row:
    """Return a text as the bootstrapped set writes it, and whether it is kept."""
    return {"image": image, "caption": text, "source": source, **more, "kept": kept}


def main(config: CapFiltConfig, run: Run) -> None:
    """Caption, filter, merge and report."""
    check(config)
    captions, texts = make_shards(config, run)
    if config.stage != "filter":
        model = load("caption", config.captioner, str(run.device), config.amp, config.allow_pickle)
        run_shards(captions, make_captions(config, model, captions, run.seed), "captioning, pairs")
    if config.stage == "caption":
        work = join_texts(texts, captions)
    else:
        model = load("match", config.filter, str(run.device), config.amp, config.allow_pickle)
        work = judge_texts(config, model, texts, captions)
    run_shards(texts, work, "filtering, pairs")
    if is_main_process():  # the others are done: merging may take longer than they would wait
        page = report(config, run, merge(texts, run.output_dir))
        run.print(f"bootstrapped set: {run.output_dir / 'bootstrapped.jsonl'}\nreport: {page}")


def make_shards(config: CapFiltConfig, run: Run) -> tuple[Shards | None, Shards]:
    """Return the shards of captions, None if this run has none, and those of texts.

    Raises:
        UserError: the folder holds shards of other settings, or captions that are not finished.
    """
    lists, folder = open_lists(config.pairs), run.output_dir / "shards"
    captions = Shards(lists, config.shard_size, folder / "captions")
    if config.stage == "filter" and not any(captions.folder.glob("*.jsonl")):
        captions = None
    mark = {key: value for key, value in asdict(config).items() if key not in FREE} | {"seed": run.seed}
    mark |= {"pairs": [fingerprint_of(path) for path in config.pairs], "captioner": fingerprint_of(config.captioner)}
    of_texts = {
        "filter": fingerprint_of(config.filter),
        "threshold": config.threshold,
        "captions": captions is not None,
    }
    of_captions = {key: value for key, value in mark.items() if key not in of_texts}
    if captions:
        on_main_process(lambda: prepare(captions.folder, of_captions, run.overwrite))
    if (
        captions
        and config.stage == "filter"
        and (missing := sum(not captions.path(i).is_file() for i in range(len(captions))))
    ):
        raise UserError(
            f"{missing} of {len(captions)} shards have no captions yet; finish them with stage=caption first"
        )
    of_texts["judged"] = config.stage != "caption"
    texts = Shards(lists, config.shard_size, folder / "texts")
    on_main_process(lambda: prepare(texts.folder, of_captions | of_texts, run.overwrite))
    return captions, texts


def check(config: CapFiltConfig) -> None:
    """Refuse settings that cannot work, before anything is done.

    Raises:
        UserError: one of them.
    """
    if config.stage not in STAGES:
        raise UserError(f"stage is {config.stage!r}; expected one of {', '.join(STAGES)}")
    if not config.pairs:
        raise UserError("pairs names no list; give at least one, for instance --set pairs=[web.json]")
    if config.shard_size < 1:
        raise UserError(f"shard_size is {config.shard_size}; expected at least 1")
    for name, stages in (("captioner", ("caption", "both")), ("filter", ("filter", "both"))):
        if config.stage in stages and not config[name]:
            raise UserError(f"{name} names no checkpoint; give one, for instance --set {name}=model.pth")
        if config.stage in stages:
            settings_of(config[name], config.allow_pickle)


def report(config: CapFiltConfig, run: Run, tally: Tally) -> str:
    """Print what was kept and write the report page."""
    scores = tally.scores()
    for source, row in scores.items():
        run.print(f"  {source}: {row['kept']} of {row['texts']} texts kept ({row['kept (%)']:.1f}%)")
    if tally.unreadable:
        run.note(f"{tally.unreadable} pictures could not be read; they are listed in unreadable.jsonl")
    how = f"nucleus sampling, top_p {config.top_p}" if config.sample else f"beam search of width {config.num_beams}"
    if config.stage != "filter":
        run.note(f"synthetic captions by {how}")
    cards = [card(config, rows) for rows in tally.shown]
    page = write_report(run.output_dir, "CapFilt", scores, (), cards, run.notes, histograms=tally.histograms)
    return str(page)


def card(config: CapFiltConfig, rows: list[Row]) -> dict[str, Any]:
    """Show a picture with its texts, kept ones green, dropped ones red."""
    lines = [
        (f"{row['source']} {row.get('probability', '')}", row["caption"], "good" if row["kept"] else "bad")
        for row in rows
    ]
    return {"image": Path(config.image_root) / rows[0]["image"], "lines": lines}


if __name__ == "__main__":
    sys.exit(launch(main, CapFiltConfig, "configs/capfilt.yaml", "output/capfilt", __doc__ or "", EXAMPLES))
