"""The report of a run: one page that needs no other file, with its figures beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from data.images import ImageSource, as_rgb
from files import write_whole
from metrics.units import format_score, put_test_first
from report.figures import Scores, draw_curves, draw_histograms, draw_scores
from utils import UserError

TONES = ("", "good", "bad")
MAX_SIDE = 480  # pixels of an embedded image's longer side
SMALL = 128  # images below this side are embedded without loss and shown with sharp pixels
STYLE = Path(__file__).parent / "page.css"


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
    folder = Path(folder)
    cards = _cards_section(images)
    groups = _to_groups(scores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; choose another folder") from None
    figures = {
        "scores.png": draw_scores(groups, folder / "scores.png"),
        "curve.png": draw_curves(log, curves, folder / "curve.png"),
        "histograms.png": draw_histograms(histograms or {}, folder / "histograms.png"),
    }
    embedded = {name: _data_url((folder / name).read_bytes(), "png") for name, drawn in figures.items() if drawn}
    sections = [
        _scores_section(groups, embedded.get("scores.png")),
        _section("Notes", f"<ul>{''.join(f'<li>{escape(str(note))}</li>' for note in notes)}</ul>") if notes else "",
        _training_section(log, embedded.get("curve.png")),
        _histograms_section(embedded.get("histograms.png")),
        cards,
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )
    with write_whole(folder / "report.html", "wb") as file:
        file.write(page.encode(errors="replace"))  # texts may hold lone surrogates
    return folder / "report.html"


def _to_groups(scores: dict[str, Any]) -> Scores:
    """Return flat or grouped scores as groups; single values among groups get a group without a name."""
    groups = {str(name): put_test_first(value) for name, value in scores.items() if isinstance(value, dict)}
    single = {name: value for name, value in scores.items() if not isinstance(value, dict)}
    return ({"": put_test_first(single)} if single else {}) | groups


# The sections. Every text passes through escape.


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>\n"


def _scores_section(scores: Scores, figure: str | None) -> str:
    if not scores:
        return ""
    names = list(dict.fromkeys(name for group in scores.values() for name in group))
    rows = [[name, *(format_score(name, group.get(name, "")) for group in scores.values())] for name in names]
    head = ["", *scores] if len(scores) > 1 or "" not in scores else []
    image = f'<img src="{figure}" alt="Scores as bars">' if figure else ""
    return _section("Scores", f'<div class="side">{_table(head, rows)}{image}</div>')


def _training_section(log: Sequence[dict[str, Any]], figure: str | None) -> str:
    if not log:
        return ""
    names = list(dict.fromkeys(name for row in log for name in row))
    names.sort(key=lambda name: {"epoch": 0, "step": 1}.get(name, 2))  # the others stay in their order
    table = _table(names, [[format_score(name, row.get(name, "")) for name in names] for row in log])
    image = f'<img class="wide" src="{figure}" alt="Training curves">' if figure else ""
    return _section("Training", f"{image}<details><summary>All {len(log)} rows of the log</summary>{table}</details>")


def _histograms_section(figure: str | None) -> str:
    image = f'<img class="wide" src="{figure}" alt="Histograms of probabilities">'
    return _section("Matching probabilities", image) if figure else ""


def _cards_section(entries: Sequence[dict[str, Any]]) -> str:
    if not entries:
        return ""
    broad = " broad" if any(len(entry.get("images", ())) > 1 for entry in entries) else ""
    return _section("Test images", f'<div class="cards{broad}">{"".join(map(_card, entries))}</div>')


def _card(entry: dict[str, Any]) -> str:
    """Return a test example: images side by side, and lines of texts below."""
    sources = entry.get("images") or [entry["image"]]
    tones = entry.get("tones") or [""] * len(sources)
    images = "".join(_image(_thumbnail(source), tone) for source, tone in zip(sources, tones, strict=True))
    lines = "".join(
        f'<p class="{tone if tone in TONES else ""}">{f"<small>{escape(str(label))}</small>" if label else ""}'
        f"<b>{escape(str(text))}</b></p>"
        for label, text, tone in entry.get("lines", ())
    )
    return f'<div class="card"><div class="images">{images}</div>{lines}</div>'


def _thumbnail(source: ImageSource) -> Image.Image:
    image = as_rgb(source)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _image(image: Image.Image, tone: str) -> str:
    small = max(image.size) < SMALL
    kind, buffer = "png" if small else "jpeg", io.BytesIO()
    image.save(buffer, kind, quality=85)
    classes = f"{'small' if small else ''} {tone}"
    return f'<img class="{classes}" alt="" src="{_data_url(buffer.getvalue(), kind)}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
