"""The stages of CapFilt: captions for every image, and the texts that match it (section 3.3); first, hashes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bootstrap.duplicates import make_features, make_hashes, without
from bootstrap.shards import Row, Shards
from bootstrap.tars import Output, Sample, Source, list_source, tar_source, with_places
from inference import load
from inference.tasks import Captioner, Matcher

Judge = Callable[[Sequence[Sample], dict[str, Row]], list[Row]]  # samples, caption rows by name -> rows of texts
CAPTION_SETTINGS = (
    "sample", "top_p", "num_beams", "num_captions", "max_length", "min_length", "repetition_penalty", "batch_size",
    "num_workers",
)  # fmt: skip


def make_work(
    stage: str, config: Any, seed: int, device: str, shards: Shards, captions: Shards | None,
    duplicates: Shards | None, output: Output,
) -> Callable[[int], list[Row]]:  # fmt: skip
    """Load the model of a stage, "hashes", "captions" or "texts", and return its work: shard -> rows.

    Args:
        device: of the model.
        shards: the input.
        captions: finished, for the texts; None to judge web texts alone.
        duplicates: images to leave out.
        output: of the kept pairs.
    """
    source = tar_source(shards, config.shard_size) if shards.tars else list_source(shards, config.image_root)
    source = without(source, duplicates) if duplicates else source
    if stage == "hashes" and config.duplicate_cosine:
        return make_features(config, load("features", config.filter, device, config.amp, config.allow_pickle), source)
    if stage == "hashes":
        return make_hashes(config, source)
    if stage == "captions":
        captioner = load("caption", config.captioner, device, config.amp, config.allow_pickle)
        return make_captions(config, captioner, source, seed)
    judge = keep_all
    if config.stage != "caption":
        judge = by_model(config, load("match", config.filter, device, config.amp, config.allow_pickle))
    return make_texts(source, captions, judge, output)


def make_captions(config: Any, model: Captioner, source: Source, seed: int) -> Callable[[int], list[Row]]:
    """Return the work of the captioning stage: each image of a shard once, with its distinct captions, best first."""
    settings = {name: config[name] for name in CAPTION_SETTINGS}
    settings["num_captions"] = max(config.num_captions, config.best_of)

    def work(shard: int) -> list[Row]:
        """Return a row for each image of a shard."""
        rows = []
        for samples, errors in source(shard):
            images, names = [sample.image for sample in samples], [sample.name for sample in samples]
            for row in model.captions(images, names=names, seed=seed, **settings):
                if "error" not in row:
                    row["captions"] = list(dict.fromkeys(found["caption"] for found in row["captions"]))
                rows.append(row)
            rows += errors
        return rows

    return work


def make_texts(source: Source, captions: Shards | None, judge: Judge, output: Output) -> Callable[[int], list[Row]]:
    """Return the work of the filtering stage: every text of a shard, and whether it is kept."""

    def work(shard: int) -> list[Row]:
        """Return a row for each text of a shard, and write the kept pairs."""
        written = {row["image"]: row for row in captions.rows(shard)} if captions else {}
        rows = []
        with output(shard) as write:
            for samples, errors in source(shard):
                found = judge(samples, written)
                write(samples, found)
                rows += with_places(found, samples) + errors
        return rows

    return work


def by_model(config: Any, model: Matcher) -> Judge:
    """Return a judge that keeps the texts whose probability of a match reaches the threshold.

    Of `best_of` captions of an image it keeps at most the best `num_captions`.
    """

    def judge(samples: Sequence[Sample], written: dict[str, Row]) -> list[Row]:
        """Return a row for each text of the samples."""
        texts = {sample.name: _texts_of(sample, written) for sample in samples}

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            """Return the probabilities of each image's texts."""
            tokens = model.model.visual_encoder(image)
            found = model.own_probabilities(tokens, [[text for _, text in texts[name]] for name in names])
            return [{"probabilities": row} for row in found]

        images = [sample.image for sample in samples]
        rows = []
        for row in model.rows(images, predict, config.batch_size, config.num_workers, list(texts)):
            if "error" in row:
                rows.append(row)
                continue
            own = [*zip(texts[row["image"]], row["probabilities"], strict=True)]
            ranked = sorted((found for (source, _), found in own if source == "synthetic"), reverse=True)
            least = ranked[config.num_captions - 1] if len(ranked) > config.num_captions else 0.0
            for (source, text), probability in own:
                kept = probability >= max(config.threshold, least if source == "synthetic" else 0.0)
                rows.append(_text_row(row["image"], text, source, kept, probability=round(probability, 4)))
        return rows

    return judge


def keep_all(samples: Sequence[Sample], written: dict[str, Row]) -> list[Row]:
    """Keep every text of the images that could be captioned: the judge of a run without a filter."""
    rows = []
    for sample in samples:
        if "error" in written.get(sample.name, {}):
            rows.append(written[sample.name])
        else:
            rows += [_text_row(sample.name, text, source, True) for source, text in _texts_of(sample, written)]
    return rows


def _texts_of(sample: Sample, written: dict[str, Row]) -> list[tuple[str, str]]:
    """Return the (source, text) pairs of an image, its web texts first."""
    captions = written.get(sample.name, {}).get("captions", ())
    found = [("web", text) for text in sample.texts] + [("synthetic", text) for text in captions]
    return [(source, text) for source, text in found if text.strip()]


def _text_row(image: str, text: str, source: str, kept: bool, **more: Any) -> Row:
    return {"image": image, "caption": text, "source": source, **more, "kept": kept}
