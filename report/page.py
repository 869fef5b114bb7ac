"""The report of a run: one page that needs no other file, with its figures beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from data.images import ImageSource, as_rgb
from files import write_whole
from metrics.units import format_score, put_test_first
from report.figures import Scores, draw_curves, draw_histograms, draw_scores
from utils import UserError

MAX_SIDE = 480  # pixels of an embedded image's longer side
SMALL = 128  # images below this side are embedded without loss and shown with sharp pixels
TEMPLATES = Environment(  # every text is escaped
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)


def write_report(
    folder: str | Path,
    title: str,
    scores: dict[str, Any],
    log: Sequence[dict[str, Any]] = (),
    images: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
    curves: Sequence[str] = ("train_loss",),
    histograms: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write report.html, which needs no other file, and its figures where there is something to draw.

    Args:
        folder: gets report.html, scores.png, curve.png and histograms.png; made if absent.
        title: heading of the page.
        scores: metric -> value, or group (a domain, a split) -> {metric: value}.
        log: rows of the log: "epoch", "step" or both, losses, learning rates ("..._lr"), scores ("val_...").
        images: test examples. "image" or "images" (list): path, PIL image, or array (H, W, 3) or (3, H, W),
            uint8 or float in [0, 1]. "lines": list of (label, text, tone), the first shown largest; tone "",
            "good" or "bad". "tones": a tone for each image, shown as its frame.
        notes: sentences for the reader, such as which metric was left out and why.
        curves: losses to draw, each a name of the log or its beginning.
        histograms: name -> counts of probabilities in equal parts of 0 to 1.

    Returns:
        Path of report.html.

    Raises:
        UserError: an image cannot be read, or the folder cannot be written.
    """
    folder, cards, groups = Path(folder), [_card(entry) for entry in images], _to_groups(scores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; choose another folder") from None
    figures = {
        "scores": draw_scores(groups, folder / "scores.png"),
        "curve": draw_curves(log, curves, folder / "curve.png"),
        "histograms": draw_histograms(histograms or {}, folder / "histograms.png"),
    }
    page = TEMPLATES.get_template("page.html").render(
        title=title, scores=_scores_table(groups), notes=notes, log=_log_table(log), cards=cards,
        figures={name: _data_url((folder / f"{name}.png").read_bytes(), "png") for name in figures if figures[name]},
        broad=any(len(card["images"]) > 1 for card in cards),
    )  # fmt: skip
    with write_whole(folder / "report.html", "wb") as file:
        file.write(page.encode(errors="replace"))  # texts may hold lone surrogates
    return folder / "report.html"


def _to_groups(scores: dict[str, Any]) -> Scores:
    """Return flat or grouped scores as groups; single values among groups get a group without a name."""
    groups = {str(name): put_test_first(value) for name, value in scores.items() if isinstance(value, dict)}
    single = {name: value for name, value in scores.items() if not isinstance(value, dict)}
    return ({"": put_test_first(single)} if single else {}) | groups


def _scores_table(scores: Scores) -> dict[str, Any]:
    names = dict.fromkeys(name for group in scores.values() for name in group)
    rows = [[name, *(format_score(name, group.get(name, "")) for group in scores.values())] for name in names]
    return {"head": ["", *scores] if len(scores) > 1 or "" not in scores else [], "rows": rows}


def _log_table(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in log for name in row))
    names.sort(key=lambda name: {"epoch": 0, "step": 1}.get(name, 2))  # the others stay in their order
    return {"head": names, "rows": [[format_score(name, row.get(name, "")) for name in names] for row in log]}


def _card(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a test example: images side by side, and lines of texts below."""
    sources = entry.get("images") or [entry["image"]]
    tones = entry.get("tones") or [""] * len(sources)
    images = [_image(_thumbnail(source)) | {"tone": tone} for source, tone in zip(sources, tones, strict=True)]
    return {"images": images, "lines": entry.get("lines", ())}


def _thumbnail(source: ImageSource) -> Image.Image:
    image = as_rgb(source)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _image(image: Image.Image) -> dict[str, Any]:
    small = max(image.size) < SMALL
    kind, buffer = "png" if small else "jpeg", io.BytesIO()
    image.save(buffer, kind, quality=85)
    return {"small": small, "url": _data_url(buffer.getvalue(), kind)}


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
