"""Bootstrap web pairs: caption every image, and keep of web and synthetic texts those that match (section 3.3)."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bootstrap.shards import Row, Shards, Tally, fingerprint_of, merge, prepare, run_shards
from bootstrap.tars import Sample, Source, TarOutput, images_of, list_source, located, no_output, tar_source
from data.images import as_rgb
from data.pretrain import open_lists
from data.shards import expand, only_shards
from inference.predictor import Captioner, Matcher, load
from launch.config import CapFiltConfig
from launch.run import Run, launch
from models.architecture import settings_of
from report.page import write_report
from utils import UserError, is_main_process, on_main_process

EXAMPLES = (
    "python capfilt.py --set pairs=[web.json] --set image_root=images --set captioner=captioner.pth "
    "--set filter=retrieval.pth --output_dir output/capfilt",
    "python -m torch.distributed.run --nproc_per_node=8 capfilt.py --config configs/capfilt.yaml",
)
STAGES = ("caption", "filter", "both")
Judge = Callable[[Sequence[Sample], dict[str, Row]], list[Row]]  # samples, caption rows by name -> rows of texts
FREE = ("batch_size", "num_workers", "amp", "allow_pickle", "image_root", "stage")  # what a continued run may change


def make_captions(config: CapFiltConfig, model: Captioner, source: Source, seed: int) -> Callable[[int], list[Row]]:
    """Return the work of the captioning stage: a shard's images, each once, with their captions."""
    names = ("sample", "top_p", "num_beams", "num_captions", "max_length", "min_length", "repetition_penalty")
    settings = {name: config[name] for name in (*names, "batch_size", "num_workers")}

    def work(shard: int) -> list[Row]:
        rows = []
        for samples, errors in source(shard):
            images = [sample.image for sample in samples]
            found = model.captions(images, names=[sample.name for sample in samples], seed=seed, **settings)
            rows += [row if "error" in row else caption_row(row) for row in found]
            rows += errors
        return rows

    return work


def caption_row(row: Row) -> Row:
    """Return an image's distinct captions, likeliest first."""
    return {"image": row["image"], "captions": list(dict.fromkeys(found["caption"] for found in row["captions"]))}


def make_texts(
    source: Source, captions: Shards | None, judge: Judge, output: Callable[[int], Any]
) -> Callable[[int], list[Row]]:
    """Return the work of the filtering stage: every text of a shard, and whether it is kept."""

    def work(shard: int) -> list[Row]:
        written = {row["image"]: row for row in captions.rows(shard)} if captions else {}
        rows = []
        with output(shard) as write:
            for samples, errors in source(shard):
                found = judge(samples, written)
                write(samples, found)
                rows += located(found, samples) + errors
        return rows

    return work


def by_model(config: CapFiltConfig, model: Matcher) -> Judge:
    """Return a judge that keeps the texts a model finds to match, each with its probability."""

    def judge(samples: Sequence[Sample], written: dict[str, Row]) -> list[Row]:
        texts = {sample.name: texts_of(sample, written) for sample in samples}

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = model.model.visual_encoder(image)
            found = model.own_probabilities(tokens, [[text for _, text in texts[name]] for name in names])
            return [{"probabilities": row} for row in found]

        images = [sample.image for sample in samples]
        rows = []
        for row in model.rows(images, predict, config.batch_size, config.num_workers, list(texts)):
            if "error" in row:
                rows.append(row)
                continue
            for (source, text), probability in zip(texts[row["image"]], row["probabilities"], strict=True):
                kept = probability >= config.threshold
                rows.append(text_row(row["image"], text, source, kept, probability=round(probability, 4)))
        return rows

    return judge


def keep_all(samples: Sequence[Sample], written: dict[str, Row]) -> list[Row]:
    """Keep every text of the images that could be captioned: the judge of a run that only captions."""
    rows = []
    for sample in samples:
        if "error" in written.get(sample.name, {}):
            rows.append(written[sample.name])
        else:
            rows += [text_row(sample.name, text, source, True) for source, text in texts_of(sample, written)]
    return rows


def texts_of(sample: Sample, written: dict[str, Row]) -> list[tuple[str, str]]:
    """Return the (source, text) pairs of an image, its web texts first."""
    captions = written.get(sample.name, {}).get("captions", ())
    found = [("web", text) for text in sample.texts] + [("synthetic", text) for text in captions]
    return [(source, text) for source, text in found if text.strip()]


def text_row(image: str, text: str, source: str, kept: bool, **more: Any) -> Row:
    """Return a text as the bootstrapped set writes it, and whether it is kept."""
    return {"image": image, "caption": text, "source": source, **more, "kept": kept}


def main(config: CapFiltConfig, run: Run) -> None:
    """Caption, filter, merge and report."""
    check(config)
    captions, texts = make_shards(config, run)
    source = tar_source(texts, config.shard_size) if texts.tars else list_source(texts, config.image_root)
    output = TarOutput(run.output_dir / "bootstrapped") if texts.tars else no_output
    if texts.tars:
        on_main_process(lambda: output.tidy(texts))
    unit = "tar files" if texts.tars else "pairs"
    if config.stage != "filter":
        model = load("caption", config.captioner, str(run.device), config.amp, config.allow_pickle)
        run_shards(captions, make_captions(config, model, source, run.seed), f"captioning, {unit}")
    judge = keep_all
    if config.stage != "caption":
        judge = by_model(config, load("match", config.filter, str(run.device), config.amp, config.allow_pickle))
    run_shards(texts, make_texts(source, captions, judge, output), f"filtering, {unit}")
    if is_main_process():  # the others are done: merging may take longer than they would wait
        page = report(config, run, texts, merge(texts, run.output_dir))
        made = f"{output.folder}/*.tar" if texts.tars else run.output_dir / "bootstrapped.jsonl"
        run.print(f"bootstrapped set: {made}\nreport: {page}")


def make_shards(config: CapFiltConfig, run: Run) -> tuple[Shards | None, Shards]:
    """Return the shards of captions, None if this run has none, and those of texts.

    Raises:
        UserError: the folder holds shards of other settings, or captions that are not finished.
    """
    tars, folder = only_shards(config.pairs, "pairs"), run.output_dir / "shards"
    files = on_main_process(lambda: expand(config.pairs, "pairs")) if tars else config.pairs
    lists, size = ([files], 1) if tars else (open_lists(files), config.shard_size)
    captions = Shards(lists, size, folder / "captions", tars)
    if config.stage == "filter" and not any(captions.folder.glob("*.jsonl")):
        captions = None
    free = (*FREE, "shard_size") if tars else FREE
    mark = {key: value for key, value in asdict(config).items() if key not in free} | {"seed": run.seed}
    mark |= {"pairs": [fingerprint_of(path) for path in files], "captioner": fingerprint_of(config.captioner)}
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
    texts = Shards(lists, size, folder / "texts", tars)
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


def report(config: CapFiltConfig, run: Run, shards: Shards, tally: Tally) -> str:
    """Print what was kept and write the report page."""
    scores = tally.scores()
    for source, row in scores.items():
        run.print(f"  {source}: {row['kept']} of {row['texts']} texts kept ({row['kept (%)']:.1f}%)")
    if tally.unreadable:
        run.note(f"{tally.unreadable} images could not be read; they are listed in unreadable.jsonl")
    how = f"nucleus sampling, top_p {config.top_p}" if config.sample else f"beam search of width {config.num_beams}"
    if config.stage != "filter":
        run.note(f"synthetic captions by {how}")
    names = [rows[0]["image"] for rows in tally.shown]
    if shards.tars:
        images = {name: as_rgb(data) for name, data in images_of(shards.lists[0], names).items()}
    else:
        images = {name: Path(config.image_root) / name for name in names}
    cards = [card(images[name], rows) for name, rows in zip(names, tally.shown, strict=True) if name in images]
    page = write_report(run.output_dir, "CapFilt", scores, (), cards, run.notes, histograms=tally.histograms)
    return str(page)


def card(image: Any, rows: list[Row]) -> dict[str, Any]:
    """Show an image with its texts, kept ones green, dropped ones red."""
    lines = [
        (f"{row['source']} {row.get('probability', '')}", row["caption"], "good" if row["kept"] else "bad")
        for row in rows
    ]
    return {"image": image, "lines": lines}


if __name__ == "__main__":
    sys.exit(launch(main, CapFiltConfig, "configs/capfilt.yaml", "output/capfilt", __doc__ or "", EXAMPLES))
