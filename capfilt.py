"""Bootstrap web pairs: caption every image, and keep of web and synthetic texts those that match (section 3.3)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bootstrap.merging import Tally, cards, merge_shards
from bootstrap.shards import Shards, fingerprint_of, open_folder, run_shards
from bootstrap.stages import by_model, keep_all, make_captions, make_texts
from bootstrap.tars import TarOutput, list_source, no_output, read_images, tar_source
from data.images import as_rgb
from data.pretrain import open_lists
from data.tars import expand, only_shards
from inference import load
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
FREE = ("batch_size", "num_workers", "amp", "allow_pickle", "image_root", "stage")  # may change when a run continues


def main(config: CapFiltConfig, run: Run) -> None:
    """Caption, filter, merge and report."""
    check(config)
    captions, texts = make_shards(config, run)
    source = tar_source(texts, config.shard_size) if texts.tars else list_source(texts, config.image_root)
    output = TarOutput(run.output_dir / "bootstrapped") if texts.tars else no_output
    if texts.tars:
        on_main_process(lambda: output.delete_unfinished(texts))
    unit = "tar files" if texts.tars else "pairs"
    if config.stage != "filter":
        model = load("caption", config.captioner, str(run.device), config.amp, config.allow_pickle)
        run_shards(captions, make_captions(config, model, source, run.seed), f"captioning, {unit}")
    judge = keep_all
    if config.stage != "caption":
        judge = by_model(config, load("match", config.filter, str(run.device), config.amp, config.allow_pickle))
    run_shards(texts, make_texts(source, captions, judge, output), f"filtering, {unit}")
    if is_main_process():  # the others end here: merging may take longer than a collective waits
        page = report(config, run, texts, merge_shards(texts, run.output_dir))
        made = f"{output.folder}/*.tar" if texts.tars else run.output_dir / "bootstrapped.jsonl"
        run.print(f"bootstrapped set: {made}\nreport: {page}")


def make_shards(config: CapFiltConfig, run: Run) -> tuple[Shards | None, Shards]:
    """Return the shards of captions, None in a run without captions, and the shards of texts.

    Raises:
        UserError: the folder holds shards of other settings, or captions that are not finished.
    """
    tars, folder = only_shards(config.pairs, "pairs"), run.output_dir / "shards"
    files = on_main_process(lambda: expand(config.pairs, "pairs")) if tars else config.pairs
    lists, size = ([files], 1) if tars else (open_lists(files), config.shard_size)
    captions: Shards | None = Shards(lists, size, folder / "captions", tars)
    if config.stage == "filter" and not any(captions.folder.glob("*.jsonl")):
        captions = None
    of_captions, of_texts = settings_of_shards(config, run, files, tars, captions is not None)
    if captions:
        on_main_process(lambda: open_folder(captions.folder, of_captions, run.overwrite))
        if config.stage == "filter" and (missing := captions.count_missing()):
            raise UserError(
                f"{missing} of {len(captions)} shards have no captions yet; finish them with stage=caption first"
            )
    texts = Shards(lists, size, folder / "texts", tars)
    on_main_process(lambda: open_folder(texts.folder, of_captions | of_texts, run.overwrite))
    return captions, texts


def settings_of_shards(
    config: CapFiltConfig, run: Run, files: list[str], tars: bool, captioned: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that captions depend on, and those that only the texts depend on."""
    of_texts = {
        "filter": fingerprint_of(config.filter),
        "threshold": config.threshold,
        "captions": captioned,
        "judged": config.stage != "caption",
    }
    free = (*FREE, *of_texts, "shard_size") if tars else (*FREE, *of_texts)
    of_captions = {key: value for key, value in asdict(config).items() if key not in free} | {"seed": run.seed}
    of_captions |= {"pairs": [fingerprint_of(path) for path in files], "captioner": fingerprint_of(config.captioner)}
    return of_captions, of_texts


def check(config: CapFiltConfig) -> None:
    """Check the settings before any work.

    Raises:
        UserError: one of them cannot work.
    """
    if not config.pairs:
        raise UserError("pairs names no list; give at least one, for instance --set pairs=[web.json]")
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
        images = {name: as_rgb(data) for name, data in read_images(shards.lists[0], names).items()}
    else:
        images = {name: Path(config.image_root) / name for name in names}
    page = write_report(
        run.output_dir, "CapFilt", scores, (), cards(tally, images), run.notes, histograms=tally.histograms
    )
    return str(page)


if __name__ == "__main__":
    sys.exit(launch(main, CapFiltConfig, "configs/capfilt.yaml", "output/capfilt", __doc__, EXAMPLES))
