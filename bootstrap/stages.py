"""The two stages of CapFilt: captions for every image, and the texts that match it (section 3.3)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bootstrap.shards import Row, Shards
from bootstrap.tars import Output, Sample, Source, with_places
from inference.tasks import Captioner, Matcher

Judge = Callable[[Sequence[Sample], dict[str, Row]], list[Row]]  # samples, caption rows by name -> rows of texts
CAPTION_SETTINGS = (
    "sample", "top_p", "num_beams", "num_captions", "max_length", "min_length", "repetition_penalty", "batch_size",
    "num_workers",
)  # fmt: skip


def make_captions(config: Any, model: Captioner, source: Source, seed: int) -> Callable[[int], list[Row]]:
    """Return the work of the captioning stage: each image of a shard once, with its distinct captions, best first."""
    settings = {name: config[name] for name in CAPTION_SETTINGS}

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
    """Return a judge that keeps the texts whose probability of a match reaches the threshold."""

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
            for (source, text), probability in zip(texts[row["image"]], row["probabilities"], strict=True):
                kept = probability >= config.threshold
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
