"""Results of `demo.bootstrap`: tables in Markdown and JSON, and a plot."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from demo.exact import exact_shares
from files import read_json, read_rows, write_json
from miniature.text import caption_is_exact
from report.figures import draw_means

Values = dict[str, dict[str, list[float]]]  # set -> column -> one value a seed
Scenes = dict[str, dict]  # image -> its scene


@dataclass(frozen=True)
class Pairs:
    """The texts of a set of pairs beside the human ones: web, synthetic; all of them, or those that CapFilt kept."""

    title: str
    synthetic: bool
    filtered: bool
    decoding: str = "nucleus"

    def takes(self, source: str, kept: bool) -> bool:
        """Return True if a text belongs to the set."""
        return (source == "web" or self.synthetic) and (kept or not self.filtered)


SETS = {
    "none": Pairs("none", synthetic=False, filtered=False),
    "filter": Pairs("filter", synthetic=False, filtered=True),
    "captioner": Pairs("captioner", synthetic=True, filtered=False),
    "both": Pairs("captioner and filter", synthetic=True, filtered=True),
    "beam": Pairs("captioner (beam) and filter", synthetic=True, filtered=True, decoding="beam"),
    "best": Pairs("captioner (best of 4) and filter", synthetic=True, filtered=True, decoding="best"),
}
PAPERS_ORDER = ("none", "filter", "captioner", "both")
COLUMNS = ("right pairs (%)", "CIDEr", "exact captions (%)", "text R@1", "image R@1")


def write_tables(root: Path, seeds: int) -> str:
    """Write bootstrap.md, bootstrap.json and bootstrap.png; returns the Markdown."""
    scenes = read_json(root / "world" / "scenes.json")
    folders = [root / f"seed{seed}" for seed in range(seeds)]
    values = {name: columns_of([model_scores(folder / name, scenes) for folder in folders]) for name in SETS}
    tools = {
        name: columns_of([tool_scores(folder / f"capfilt_{name}", scenes, root / "world") for folder in folders])
        for name in ("nucleus", "beam", "best")
    }
    text = "\n\n".join(
        (
            f"Pretrained on each set of pairs, not fine-tuned; mean and standard deviation of {seeds} seeds, "
            "CIDEr times 100:",
            table({SETS[name].title: columns for name, columns in values.items()}, "CapFilt"),
            "\n".join(order_lines(values)),
            "The bootstrapped texts by decoding, and the filter's precision and recall on web texts that do not match:",
            table(tools, "captions by"),
        )
    )
    (root / "bootstrap.md").write_text(text + "\n")
    write_json(root / "bootstrap.json", {"models": values, "tools": tools})
    drawn = {column: {SETS[name].title: values[name][column] for name in SETS} for column in COLUMNS}
    draw_means(drawn, root / "bootstrap.png")
    return text


def columns_of(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Turn a list of rows into lists by column."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def model_scores(folder: Path, scenes: Scenes) -> dict[str, float]:
    """Return the scores of the model pretrained on one set, and the share of the set's texts that are right."""
    captions = read_json(folder / "caption" / "result" / "test.json")
    exact, total = exact_shares(captions, scenes)["all test images"]
    retrieval = read_rows(folder / "retrieval" / "evaluate.txt")[-1]
    found = (
        share_right(read_rows(folder / "pairs.jsonl"), scenes),
        100 * read_rows(folder / "caption" / "evaluate.txt")[-1]["test_CIDEr"],
        100 * exact / total,
        retrieval["test_txt_r1"],
        retrieval["test_img_r1"],
    )
    return dict(zip(COLUMNS, found, strict=True))


def tool_scores(folder: Path, scenes: Scenes, world: Path) -> dict[str, float]:
    """Return the quality of captioner and filter, known because the scenes of the world are known."""
    kept, dropped = (read_rows(folder / f"{name}.jsonl") for name in ("bootstrapped", "dropped"))
    truth = read_json(world / "annotations" / "pretrain_web_truth.json")
    passed, failed = ([row for row in rows if row["source"] == "synthetic"] for rows in (kept, dropped))
    written = passed + failed
    return {
        "right captions (%)": share_right(written, scenes),
        "kept (%)": 100 * len(passed) / max(len(written), 1),
        "right of those kept (%)": share_right(passed, scenes),
        "distinct captions": float(len({row["caption"] for row in written})),
        **filter_quality(kept, dropped, {row["image"]: row["matches"] for row in truth}),
    }


def filter_quality(kept: Sequence[dict], dropped: Sequence[dict], truth: dict[str, bool]) -> dict[str, float]:
    """Return precision, recall and F1 of dropping the web texts that do not match their images."""
    wrong_kept, wrong_dropped = (
        [not truth[row["image"]] for row in rows if row["source"] == "web"] for rows in (kept, dropped)
    )
    caught = sum(wrong_dropped)
    precision, recall = caught / max(len(wrong_dropped), 1), caught / max(caught + sum(wrong_kept), 1)
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / max(precision + recall, 1e-12)}


def share_right(pairs: Sequence[dict], scenes: Scenes) -> float:
    """Return the percentage of texts that name exactly the shapes and colours of their images."""
    items = [scenes[pair["image"]]["items"] for pair in pairs]
    shown = [[(item["color"], item["shape"]) for item in listed] for listed in items]
    right = sum(caption_is_exact(pair["caption"], named) for pair, named in zip(pairs, shown, strict=True))
    return 100 * right / max(len(pairs), 1)


def table(rows: dict[str, dict[str, list[float]]], corner: str) -> str:
    """Return a Markdown table of means and standard deviations."""
    names = list(next(iter(rows.values())))
    lines = [f"| {corner} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(spread(columns[name]) for name in names)} |" for title, columns in rows.items()]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation", or the value alone if there is only one."""
    digits = 3 if max(map(abs, values)) <= 1 else 1
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def order_lines(values: Values) -> list[str]:
    """Return for each score the order of the sets, and the number of seeds in which each step of the paper's holds."""
    lines = []
    for column in COLUMNS[1:]:
        means = {name: mean(values[name][column]) for name in PAPERS_ORDER}
        order = sorted(PAPERS_ORDER, key=means.__getitem__)
        in_order = all(means[low] < means[high] for low, high in itertools.pairwise(PAPERS_ORDER))
        steps = [
            f"{low} < {high} in {sum(map(float.__lt__, values[low][column], values[high][column]))}"
            for low, high in itertools.pairwise(PAPERS_ORDER)
        ]
        seeds = len(values["none"][column])
        same = "the paper's order" if in_order else " <= ".join(order)
        lines.append(f"- {column}: {same}; of {seeds} seeds {', '.join(steps)}")
    return lines
