"""Figures of a report: scores as bars, training as curves, test images with their texts."""

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from files import write_whole
from utils import UserError

if TYPE_CHECKING:  # matplotlib takes a second to import, so only drawing imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scores = dict[str, dict[str, Any]]  # group (a domain, a split; "" when there is only one) -> metric -> value
INK, FAINT = "#22272e", "#d0d7de"
TONES = {"": INK, "good": "#1a7f37", "bad": "#b3261e"}
MARKS = {"": "", "good": "\u2713 ", "bad": "\u2717 "}  # so that nothing is told by colour alone
COLOURS = ("#2463a6", "#d9722b", "#2f8f6b", "#8b5fb0", "#b5446e", "#7a6a2f", "#3a9ab8", "#6b7280")
MAX_SIDE = 480  # pixels of an embedded image's longer side
MAX_DRAWN = 24  # cards in pictures.png; the page shows all


@dataclass
class Card:
    """One test example: images side by side, each with a tone, and lines of (label, text, tone) below."""

    images: list[Image.Image]
    lines: list[tuple[str, str, str]]
    tones: list[str] = field(default_factory=list)

    def framed(self) -> list[Image.Image]:
        """Return the images at one height, framed in the colours of their tones."""
        height = max(image.height for image in self.images)
        same = [image.resize((max(1, image.width * height // image.height), height)) for image in self.images]
        edge = max(2, height // 40)
        return [ImageOps.expand(i, edge, TONES[t]) if t else i for i, t in zip(same, self.tones, strict=True)]


def open_image(source: Any) -> Image.Image:
    """Return a image in RGB, at most 480 pixels on a side.

    Args:
        source: a path, a PIL image, or an array or tensor (H, W, 3) or (3, H, W), uint8 or float in [0, 1].

    Raises:
        UserError: the file cannot be read, or the array has another shape.
    """
    if isinstance(source, (str, Path)):
        try:
            source = Image.open(source)
            source.load()
        except OSError as error:
            raise UserError(f"cannot read the image {source} for the report: {error}") from error
    image = (source if isinstance(source, Image.Image) else _from_array(source)).convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _from_array(source: Any) -> Image.Image:
    array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"a picture of the report has shape {array.shape}; expected (H, W, 3) or (3, H, W)")
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _is_rank(name: str) -> bool:
    """Tell whether a score is a median rank, whose scale would leave no room for the others."""
    return name.endswith("_mdR")


def is_number(value: Any) -> bool:
    """Tell whether a value can be drawn."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: Any) -> str:
    """Return a value as tables show it: numbers below 10 with four decimals, others with two."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


# Scores


def draw_scores(scores: Scores, path: Path) -> bool:
    """Draw a bar for every fraction or percentage (float) and tell whether there was one."""
    shown = {
        group: {
            name: v
            for name, v in values.items()
            if is_number(v) and not isinstance(v, int) and not _is_rank(name)
        }
        for group, values in scores.items()
    }
    shown = {group: values for group, values in shown.items() if values}
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    if not names:
        return False
    thick = 0.8 / len(shown)
    with _figure(7.2, 0.9 + 0.42 * len(names) * (0.6 + 0.4 * len(shown)), path) as figure:
        axes = figure.add_subplot()
        for k, (group, values) in enumerate(shown.items()):
            drawn = [(n, values[name]) for n, name in enumerate(names) if name in values]
            places = [n + (k - (len(shown) - 1) / 2) * thick for n, _ in drawn]
            bars = axes.barh(
                places, [v for _, v in drawn], thick * 0.9, color=COLOURS[k % len(COLOURS)], label=group
            )
            axes.bar_label(bars, [format_value(v) for _, v in drawn], padding=4, fontsize=9, color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        _clean(axes, grid="x")
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return True


# Curves


def draw_curves(log: Sequence[dict[str, Any]], prefixes: Sequence[str], path: Path) -> bool:
    """Draw losses, learning rate and validation scores, one panel each, and tell whether there was any.

    Args:
        log: rows with "epoch" or "step" or both, and numbers.
        prefixes: names of losses begin with one of them.
        path: where the PNG goes.
    """
    names = list(dict.fromkeys(name for row in log for name in row))
    panels = {
        "loss": [name for name in names if name.startswith(tuple(prefixes))],
        "learning rate": [name for name in names if name == "lr" or name.endswith("_lr")],
        "validation": [
            name for name in names if name.startswith("val_") and "loss" not in name and not _is_rank(name)
        ],
    }
    unit, places = _places(log)
    lines = {
        panel: {n: line for n in members if (line := _line(log, places, n))}
        for panel, members in panels.items()
    }
    lines = {panel: members for panel, members in lines.items() if members}
    if not lines:
        return False
    with _figure(8.4, 0.5 + 2.4 * len(lines), path) as figure:
        for axes, (panel, members) in zip(
            figure.subplots(len(lines), squeeze=False, sharex=True)[:, 0], lines.items(), strict=True
        ):
            _panel(axes, panel, members)
        axes.set_xlabel(unit, color=INK)
    return True


def draw_lines(panels: dict[str, dict[str, Sequence[tuple[float, float]]]], units: dict[str, str], path: Path) -> None:
    """Draw a panel for each entry: lines of (x, y) by name, both from 0.

    Args:
        panels: title -> name of a line -> its points.
        units: title -> what x counts.
        path: where the PNG goes.
    """
    with _figure(8.4, 0.4 + 2.6 * len(panels), path) as figure:
        for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
            _panel(axes, title, {name: list(points) for name, points in lines.items()})
            axes.set_xlabel(units[title], color=INK)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)


def _places(log: Sequence[dict[str, Any]]) -> tuple[str, list[float | None]]:
    """Put rows on one axis: steps if any row has one (an epoch's row at its last step), else epochs."""
    last: dict[Any, float] = {}
    for row in log:
        if is_number(row.get("step")):
            last[row.get("epoch")] = max(row["step"], last.get(row.get("epoch"), row["step"]))
    if not last:
        return "epoch", [row["epoch"] if is_number(row.get("epoch")) else None for row in log]
    return "step", [row["step"] if is_number(row.get("step")) else last.get(row.get("epoch")) for row in log]


def _line(log: Sequence[dict], places: Sequence[float | None], name: str) -> list[tuple[float, float]]:
    rows = [
        (x, row) for x, row in zip(places, log, strict=True) if x is not None and is_number(row.get(name))
    ]
    # Where a loss is known step by step, its means over epochs are not put on the same line.
    rows = [(x, row) for x, row in rows if "step" in row] or rows
    return sorted((x, float(row[name])) for x, row in rows)


def _panel(axes: "Axes", title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    for k, (name, points) in enumerate(lines.items()):
        style = {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
        dash = "-" if k < len(COLOURS) else "--"
        axes.plot(
            *zip(*points, strict=True), dash, lw=1.6, color=COLOURS[k % len(COLOURS)], label=name, **style
        )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.03), labelspacing=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _clean(axes, grid="y")


# Images


def draw_histograms(histograms: dict[str, Sequence[int]], path: Path) -> bool:
    """Draw counts of probabilities, each name a line of steps; tells whether there was something to draw."""
    shown = {name: counts for name, counts in histograms.items() if sum(counts)}
    if not shown:
        return False
    with _figure(7.2, 3.2, path) as figure:
        axes = figure.add_subplot()
        for colour, (name, counts) in zip(COLOURS, shown.items()):
            edges = np.linspace(0, 1, len(counts) + 1)
            axes.stairs(np.asarray(counts) / sum(counts), edges, color=colour, lw=2, label=f"{name} ({sum(counts)})")
        axes.set_xlabel("probability of a match")
        axes.set_ylabel("share")
        axes.legend(frameon=False)
        _clean(axes, "y")
    return True


def draw_means(values: dict[str, dict[str, Sequence[float]]], path: Path) -> None:
    """Draw a panel for each score: a bar for the mean of each variant, and a point for each run.

    Args:
        values: score -> variant -> one value a run.
        path: where the PNG goes.
    """
    with _figure(8.4, 0.4 + 1.75 * len(values), path) as figure:
        for axes, (score, variants) in zip(figure.subplots(len(values), squeeze=False)[:, 0], values.items()):
            for k, runs in enumerate(variants.values()):
                axes.barh(k, np.mean(runs), 0.7, color=COLOURS[k % len(COLOURS)], alpha=0.55)
                axes.plot(runs, [k] * len(runs), "o", color=INK, markersize=3.5)
            axes.set_yticks(range(len(variants)), variants)
            axes.invert_yaxis()
            axes.set_title(score, loc="left", fontsize=10, fontweight="bold", color=INK)
            _clean(axes, grid="x")


def draw_cards(cards: Sequence[Card], path: Path) -> bool:
    """Draw the first 24 test examples as a grid, their lines below, and tell whether there was one."""
    cards = cards[:MAX_DRAWN]
    if not cards:
        return False
    columns = min(len(cards), max(1, 4 // max(len(card.images) for card in cards)))
    width = 12.0 / columns if columns > 1 else 9.0
    width = min(width, 4.0 * max(len(card.images) for card in cards))
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(_card_height(card, width) for card in row) for row in rows]
    with _figure(width * columns, sum(heights), path, layout=None) as figure:
        top = sum(heights)
        for row, height in zip(rows, heights, strict=True):
            for k, card in enumerate(row):
                _draw_card(figure, card, k * width, top, width)
            top -= height
    return True


PAD, LINE = 0.15, 0.17  # inches around a card and of a line of text
IMAGE_HEIGHT = 2.6  # inches at most


def _wrapped(card: Card, width: float) -> list[tuple[str, str, str]]:
    """Break a card's lines to its width; the first line is bold."""
    rows = []
    for n, (label, text, tone) in enumerate(card.lines):
        full = MARKS[tone] + (f"{label}: {text}" if label else text)
        weight = "normal" if n else "bold"
        letters = int((width - 2 * PAD) / (0.072 if n else 0.082))
        rows += [(part, TONES[tone], weight) for part in textwrap.wrap(full, letters) or [""]]
    return rows


def _image_size(card: Card, width: float) -> tuple[float, float]:
    """Return the width and height, in inches, of all the card's images together."""
    ratio = sum(image.width / image.height for image in card.images)
    gaps = 0.06 * (len(card.images) - 1)
    height = min((width - 2 * PAD - gaps) / ratio, IMAGE_HEIGHT)
    return height * ratio + gaps, height


def _card_height(card: Card, width: float) -> float:
    return _image_size(card, width)[1] + LINE * len(_wrapped(card, width)) + 3 * PAD


def _draw_card(figure: "Figure", card: Card, left: float, top: float, width: float) -> None:
    """Draw one card; places are inches from the lower left of the figure."""
    wide, high = figure.get_size_inches()
    height = _image_size(card, width)[1]
    x = left + PAD
    for image in card.framed():
        across = height * image.width / image.height
        axes = figure.add_axes((x / wide, (top - PAD - height) / high, across / wide, height / high))
        axes.imshow(image, aspect="auto", interpolation="nearest" if image.height < 128 else "antialiased")
        axes.set_axis_off()
        x += across + 0.06
    y = top - PAD - height - 0.08
    for text, colour, weight in _wrapped(card, width):
        place = ((left + PAD) / wide, y / high)
        figure.text(*place, text, color=colour, fontsize=9, fontweight=weight, va="top", parse_math=False)
        y -= LINE


# Common


@contextmanager
def _figure(
    width: float, height: float, path: Path, layout: str | None = "constrained"
) -> Iterator["Figure"]:
    """Give a figure to draw on and write it as PNG; inches, 110 dots each."""
    from matplotlib.figure import Figure

    # A Figure of its own and not pyplot: no global state, no window, Agg in any case.
    figure = Figure(figsize=(width, height), dpi=110, layout=layout, facecolor="white")
    yield figure
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # scripts that the figure's font lacks show as boxes
        with write_whole(path, "wb") as file:
            figure.savefig(file, format="png")


def _clean(axes: "Axes", grid: str) -> None:
    """Leave of the frame only what is needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis=grid, color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
