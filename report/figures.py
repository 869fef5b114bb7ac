"""Figures of a report: scores as bars, training as curves, probabilities as histograms."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files import write_whole
from metrics.units import format_score, to_printed

if TYPE_CHECKING:  # importing matplotlib takes a second, so the functions that draw import it
    from matplotlib.axes import Axes

Scores = dict[str, dict[str, Any]]  # group (a domain, a split; "" for a single group) -> metric -> value
Points = Sequence[tuple[float, float]]
INK, FAINT = "#22272e", "#d0d7de"
COLORS = ("#2463a6", "#d9722b", "#2f8f6b", "#8b5fb0", "#b5446e", "#7a6a2f", "#3a9ab8", "#6b7280")


def is_number(value: Any) -> bool:
    """Return True if a value can be drawn."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def scale_of(name: str) -> str:
    """Return the scale of a score: "%", "CIDEr" (0 to 1000), or "" for one without bars, such as a median rank."""
    if name.endswith("_mdR"):
        return ""
    return "CIDEr" if name.endswith("CIDEr") else "%"


# Scores.


def draw_scores(scores: Scores, path: Path) -> bool:
    """Draw a bar for every score that is a float, one panel for each scale; returns True if there was one.

    If some names end in "(%)", only those are drawn, since the unit of the others is unknown.
    """
    marked = any(name.endswith("(%)") for values in scores.values() for name in values)
    panels: dict[str, Scores] = {}
    for group, values in scores.items():
        for name, value in values.items():
            is_score = is_number(value) and not isinstance(value, int)
            if is_score and scale_of(name) and (name.endswith("(%)") or not marked):
                panels.setdefault(scale_of(name), {}).setdefault(group, {})[name] = value
    if not panels:
        return False
    num_bars = [len({name for values in panel.values() for name in values}) for panel in panels.values()]
    with _axes(7.2, [0.5 + n * 0.42 * (0.6 + 0.4 * len(scores)) for n in num_bars], path, "x") as all_axes:
        for axes, panel in zip(all_axes, panels.values(), strict=True):
            _draw_bars(axes, panel)
        if len(scores) > 1:
            all_axes[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return True


def _draw_bars(axes: "Axes", scores: Scores) -> None:
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    thick = 0.8 / len(scores)
    for k, (group, values) in enumerate(scores.items()):
        places = [names.index(name) + (k - (len(scores) - 1) / 2) * thick for name in values]
        lengths = [to_printed(name, value) for name, value in values.items()]
        bars = axes.barh(places, lengths, thick * 0.9, color=COLORS[k % len(COLORS)], label=group)
        axes.bar_label(bars, [format_score(*item) for item in values.items()], padding=4, fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.14)


def draw_means(values: dict[str, dict[str, Sequence[float]]], path: Path) -> None:
    """Draw a panel for each score: a bar for the mean of each variant, and a point for each run's value."""
    with _axes(8.4, [1.75] * len(values), path, "x") as all_axes:
        for axes, (score, variants) in zip(all_axes, values.items(), strict=True):
            for k, runs in enumerate(variants.values()):
                axes.barh(k, np.mean(runs), 0.7, color=COLORS[k % len(COLORS)], alpha=0.55)
                axes.plot(runs, [k] * len(runs), "o", color=INK, markersize=3.5)
            axes.set_yticks(range(len(variants)), variants)
            axes.invert_yaxis()
            axes.set_title(score, loc="left", fontsize=10, fontweight="bold", color=INK)


def draw_histograms(histograms: Mapping[str, Sequence[int]], path: Path) -> bool:
    """Draw counts of probabilities as a line of steps for each name; returns True if there was a count."""
    shown = {name: counts for name, counts in histograms.items() if sum(counts)}
    if not shown:
        return False
    with _axes(7.2, [2.8], path, "y") as (axes,):
        for color, (name, counts) in zip(COLORS, shown.items()):
            edges = np.linspace(0, 1, len(counts) + 1)
            axes.stairs(np.asarray(counts) / sum(counts), edges, color=color, lw=2, label=f"{name} ({sum(counts)})")
        axes.set_xlabel("probability of a match")
        axes.set_ylabel("share")
        axes.legend(frameon=False)
    return True


# Curves.


def draw_curves(log: Sequence[dict[str, Any]], prefixes: Sequence[str], path: Path) -> bool:
    """Draw losses, learning rates and validation scores, a panel for each scale; returns True if there was a curve.

    Rows of the log have "epoch" or "step" or both, and numbers; losses are the names that begin with one of `prefixes`.
    """
    names = list(dict.fromkeys(name for row in log for name in row))
    scores = [name for name in names if name.startswith("val_") and "loss" not in name]
    panels = {
        "loss": [name for name in names if name.startswith(tuple(prefixes))],
        "learning rate": [name for name in names if name == "lr" or name.endswith("_lr")],
        "validation": [name for name in scores if scale_of(name) == "%"],
        "validation, CIDEr": [name for name in scores if scale_of(name) == "CIDEr"],
    }
    unit, places = _places(log)
    lines: dict[str, dict[str, Points]] = {}
    for title, members in panels.items():
        for name in members:
            points = _line(log, places, name)
            if len(points) > 1:  # one point is no curve: the table of the log has it
                lines.setdefault(title, {})[name] = points
    if lines:
        draw_lines(lines, dict.fromkeys(lines, unit), path, from_zero=False)
    return bool(lines)


def draw_lines(
    panels: Mapping[str, Mapping[str, Points]], units: Mapping[str, str], path: Path, from_zero: bool = True
) -> None:
    """Draw a panel for each title: its lines, by name, of points (x, y), over an axis labelled by its unit."""
    with _axes(8.4, [2.5] * len(panels), path, "y") as all_axes:
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            for k, (name, points) in enumerate(lines.items()):
                marker = {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
                dash = "-" if k < len(COLORS) else "--"
                axes.plot(*zip(*points), dash, lw=1.6, color=COLORS[k % len(COLORS)], label=name, **marker)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.03), labelspacing=0.25)
            axes.set_xlabel(units[title], color=INK)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if from_zero:
                axes.set_xlim(left=0)
                axes.set_ylim(bottom=0)


def _places(log: Sequence[dict[str, Any]]) -> tuple[str, list[float | None]]:
    """Return the rows' places on one axis: steps if any row has one (an epoch's row at its last step), else epochs."""
    last: dict[Any, float] = {}
    for row in log:
        if is_number(row.get("step")):
            last[row.get("epoch")] = max(row["step"], last.get(row.get("epoch"), row["step"]))
    if not last:
        return "epoch", [row["epoch"] if is_number(row.get("epoch")) else None for row in log]
    return "step", [row["step"] if is_number(row.get("step")) else last.get(row.get("epoch")) for row in log]


def _line(log: Sequence[dict[str, Any]], places: Sequence[float | None], name: str) -> list[tuple[float, float]]:
    rows = [(x, row) for x, row in zip(places, log, strict=True) if x is not None and is_number(row.get(name))]
    # where a loss is known step by step, its means over epochs are not put on the same line
    rows = [(x, row) for x, row in rows if "step" in row] or rows
    return sorted((x, to_printed(name, float(row[name]))) for x, row in rows)


# Common.


@contextmanager
def _axes(width: float, heights: Sequence[float], path: Path, grid: str) -> Iterator[Sequence["Axes"]]:
    """Yield axes below each other to draw on, sizes in inches at 110 dots each, and write the figure as PNG."""
    from matplotlib.figure import Figure

    # A Figure of its own and not pyplot: no global state, no window, Agg in any case.
    figure = Figure(figsize=(width, sum(heights) + 0.4), dpi=110, layout="constrained", facecolor="white")
    all_axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    yield all_axes
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=9, length=0)
        axes.grid(axis=grid, color=FAINT, lw=0.6)
        axes.set_axisbelow(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # scripts that the figure's font lacks show as boxes
        with write_whole(path, "wb") as file:
            figure.savefig(file, format="png")
