"""Bootstrap web pairs: caption every image, and keep of web and synthetic texts those that match (section 3.3)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bootstrap.duplicates import write_duplicates
from bootstrap.merging import Tally, cards, merge_shards
from bootstrap.parquet import ParquetOutput
from bootstrap.shards import Shards, fingerprint_of, open_folder, run_shards
from bootstrap.stages import make_work
from bootstrap.tars import Output, TarOutput, no_output, read_images, read_objects
from data.images import as_rgb
from data.parquet import PARQUET
from data.pretrain import open_lists
from data.tars import expand, only_shards
from files import is_address
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
FREE = (
    "batch_size", "num_workers", "amp", "allow_pickle", "image_root", "stage", "engine", "ray_address", "workers",
    "cpus_per_worker", "gpus_per_worker", "duplicate_cosine",
)  # may change when a run continues  # fmt: skip
OF_OUTPUT = ("output", "parquet")
TITLES = {"hashes": "hashing", "captions": "captioning", "texts": "filtering"}


def main(config: CapFiltConfig, run: Run) -> None:
    """Caption, filter, merge and report."""
    check(config)
    if config.stage == "dedup":
        deduplicate(config, run)
        return
    captions, texts, duplicates = make_shards(config, run)
    output, folder = no_output, config.output or run.output_dir / "bootstrapped"
    if texts.tars or config.parquet:
        output = ParquetOutput(folder) if config.parquet else TarOutput(folder)
        on_main_process(lambda: output.delete_unfinished(texts))
    if config.stage != "filter":
        run_stage("captions", captions, config, run, duplicates=duplicates)
    run_stage("texts", texts, config, run, captions, duplicates, output)
    if is_main_process():  # the others end here: merging may take longer than a collective waits
        page = report(config, run, texts, merge_shards(texts, run.output_dir))
        made = run.output_dir / "bootstrapped.jsonl" if output is no_output else f"{folder}/*{output.ending}"
        run.print(f"bootstrapped set: {made}\nreport: {page}")


def deduplicate(config: CapFiltConfig, run: Run) -> None:
    """Find near-duplicate images, which later stages in this folder leave out."""
    make, files = open_pairs(config, run)
    hashes, duplicates = make("hashes"), make("duplicates")
    for shards in (hashes, duplicates):
        on_main_process(lambda folder=shards.folder: open_folder(folder, of_pairs(config, files), run.overwrite))
    run_stage("hashes", hashes, config, run)
    if is_main_process():  # the others end here, as above
        images, left_out = write_duplicates(hashes, duplicates, run.output_dir, config.duplicate_cosine)
        run.print(f"{left_out} of {images} images are near-duplicates: {run.output_dir / 'duplicates.jsonl'}")


def run_stage(
    stage: str, shards: Shards, config: CapFiltConfig, run: Run, captions: Shards | None = None,
    duplicates: Shards | None = None, output: Output = no_output,
) -> None:  # fmt: skip
    """Do the shards of a stage by the processes of torchrun, or by Ray's workers."""
    settings = dict(stage=stage, config=config, seed=run.seed, shards=shards, captions=captions)
    settings |= dict(duplicates=duplicates, output=output)
    title = f"{TITLES[stage]}, {'shards' if shards.tars else 'pairs'}"
    if config.engine == "ray":
        from bootstrap.ray_engine import ray_results

        run_shards(shards, None, title, ray_results(**settings))
    else:
        run_shards(shards, make_work(device=str(run.device), **settings), title)


def open_pairs(config: CapFiltConfig, run: Run) -> tuple[Callable[[str], Shards], list[str]]:
    """Return a function that makes the shards of a stage, in its folder; and the lists or shards of the input."""
    tars = only_shards(config.pairs, "pairs")
    several = tars or all(str(name).endswith(PARQUET) for name in config.pairs)
    files = on_main_process(lambda: expand(config.pairs, "pairs")) if several else config.pairs
    lists, size = ([files], 1) if tars else (open_lists(files), config.shard_size)
    return lambda name: Shards(lists, size, run.output_dir / "shards" / name, tars), files


def make_shards(config: CapFiltConfig, run: Run) -> tuple[Shards | None, Shards, Shards | None]:
    """Return the shards of captions, None in a run without; of texts; of duplicates, if found. All must be finished."""
    make, files = open_pairs(config, run)
    captions, texts, duplicates = make("captions"), make("texts"), make("duplicates")
    captioned = config.stage != "filter" or any(captions.folder.glob("*.jsonl"))
    of_captions, of_texts = settings_of_shards(config, run, files, texts.tars, captioned)
    if deduplicated := any(duplicates.folder.glob("*.jsonl")):
        on_main_process(lambda: open_folder(duplicates.folder, of_pairs(config, files)))
        of_captions |= {"deduplicated": config.duplicate_cosine or "hash"}
        if missing := duplicates.count_missing():
            raise UserError(f"duplicates of {missing} of {len(texts)} shards are not written; repeat stage=dedup first")
    if captioned:
        on_main_process(lambda: open_folder(captions.folder, of_captions, run.overwrite))
        if config.stage == "filter" and (missing := captions.count_missing()):
            raise UserError(
                f"{missing} of {len(captions)} shards have no captions yet; finish them with stage=caption first"
            )
    on_main_process(lambda: open_folder(texts.folder, of_captions | of_texts, run.overwrite))
    return captions if captioned else None, texts, duplicates if deduplicated else None


def of_pairs(config: CapFiltConfig, files: list[str]) -> dict[str, Any]:
    """Return the settings that hashes and duplicates depend on."""
    size: dict[str, Any] = {} if only_shards(files, "pairs") else {"shard_size": config.shard_size}
    if cosine := config.duplicate_cosine:
        size |= {"duplicate_cosine": cosine, "features of": fingerprint_of(config.filter)}
    return {"pairs": [fingerprint_of(path) for path in files]} | size


def settings_of_shards(
    config: CapFiltConfig, run: Run, files: list[str], tars: bool, captioned: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that captions depend on, and those that only the texts depend on."""
    of_texts = {
        "filter": fingerprint_of(config.filter),
        "threshold": config.threshold,
        "captions": captioned,
        "judged": config.stage != "caption",
    } | {key: config[key] for key in OF_OUTPUT if config[key]}  # folders made before these settings stay as they are
    unused = (("best_of", config.best_of <= config.num_captions), ("shard_size", tars))
    free = (*FREE, *OF_OUTPUT, *of_texts, *(name for name, is_unused in unused if is_unused))
    of_captions = {key: value for key, value in asdict(config).items() if key not in free} | {"seed": run.seed}
    of_captions |= {"pairs": [fingerprint_of(path) for path in files], "captioner": fingerprint_of(config.captioner)}
    return of_captions, of_texts


def check(config: CapFiltConfig) -> None:
    """Check the settings before any work; UserError if one of them cannot work."""
    if not config.pairs:
        raise UserError("pairs names no list; give at least one, for instance --set pairs=[web.json]")
    also = ("dedup",) if config.duplicate_cosine else ()
    for name, stages in (("captioner", ("caption", "both")), ("filter", ("filter", "both", *also))):
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
    elif is_address(config.image_root):
        found = read_objects(config.image_root, names)
        images = {name: as_rgb(data) for name, data in found.items() if isinstance(data, bytes)}
    else:
        images = {name: Path(config.image_root) / name for name in names}
    page = write_report(
        run.output_dir, "CapFilt", scores, (), cards(tally, images), run.notes, histograms=tally.histograms
    )
    return str(page)


if __name__ == "__main__":
    sys.exit(launch(main, CapFiltConfig, "configs/capfilt.yaml", "output/capfilt", __doc__, EXAMPLES))
