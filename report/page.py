"""The report of a run: one page that needs no other file, with its figures beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #22272e; font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 10px; padding: 1.1rem 1.2rem;
  margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.side img { flex: 1 1 320px; min-width: 0; max-width: 640px; width: 100%; }
.wide { display: block; width: 100%; max-width: 860px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e8ebef; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: #57606a; font-weight: 600; }
tbody th { font-weight: 500; }
details { margin-top: .8rem; }
details table { font-size: .82rem; }
summary { cursor: pointer; color: #2463a6; }
ul { margin: 0; padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
.cards { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); }
.cards.broad { grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); }
.card { border: 1px solid #e3e7ec; border-radius: 8px; overflow: hidden; background: #fff; }
.images { display: flex; gap: 4px; background: #eef0f3; }
.images img { flex: 1 1 0; min-width: 0; width: 100%; height: 190px; object-fit: contain; }
.images img.small { image-rendering: pixelated; }
.images img.good { outline: 4px solid #1a7f37; outline-offset: -4px; }
.images img.bad { outline: 4px solid #b3261e; outline-offset: -4px; }
.card p { margin: 0; padding: .1rem .8rem; font-size: .9rem; overflow-wrap: anywhere; }
.card p:first-of-type { padding-top: .55rem; font-weight: 600; font-size: .98rem; }
.card p:last-child { padding-bottom: .65rem; }
.card small { color: #57606a; font-weight: 400; font-size: .8rem; margin-right: .35rem; }
.good b { color: #1a7f37; } .bad b { color: #b3261e; }
.card b { font-weight: inherit; }
.good b::before { content: "\\2713\\00a0"; } .bad b::before { content: "\\2717\\00a0"; }
@media (max-width: 600px) { section { padding: .9rem .8rem; } h1 { font-size: 1.3rem; } }
"""


@dataclass
class Card:
    """A test example: images side by side, a tone for the frame of each, and lines of (label, text, tone) below."""

    images: list[Image.Image]
    tones: list[str]
    lines: list[tuple[str, str, str]]


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
    """Write report.html, which needs no other file, and its figures: scores.png, curve.png and histograms.png.

    A figure is written where there is something to draw.

    Args:
        folder: made if absent.
        title: heading of the page.
        scores: metric -> value, or group (a domain, a split) -> {metric: value}.
        log: rows of the log: "epoch", "step" or both, losses, learning rates ("..._lr"), scores ("val_...").
        images: test examples. "image" or "images" (list): path, PIL image, or array (H, W, 3) or (3, H, W),
            uint8 or float in [0, 1]. "lines": list of (label, text, tone), the first shown largest; tone "",
            "good" or "bad". "caption" (str), "references" (list of str) and "ok" (bool or None) are a short form
            of lines. "tones": a tone for each image, shown as its frame.
        notes: sentences for the reader, such as which metric was left out and why.
        curves: losses to draw, each a name of the log or its beginning.
        histograms: name -> counts of probabilities in equal parts of 0 to 1.

    Returns:
        Path of report.html.

    Raises:
        UserError: an image cannot be read, or the folder cannot be written.
    """
    folder = Path(folder)
    cards = [_to_card(entry) for entry in images]
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
    with write_whole(folder / "report.html") as file:
        file.write(_page(title, groups, log, cards, notes, embedded))
    return folder / "report.html"


def _to_groups(scores: dict[str, Any]) -> Scores:
    """Return flat or grouped scores as groups; single values among groups get a group without a name."""
    groups = {str(name): put_test_first(value) for name, value in scores.items() if isinstance(value, dict)}
    single = {name: value for name, value in scores.items() if not isinstance(value, dict)}
    return ({"": put_test_first(single)} if single else {}) | groups


def _to_card(entry: dict[str, Any]) -> Card:
    images = [_thumbnail(source) for source in entry.get("images") or [entry["image"]]]
    lines = []
    if "caption" in entry:
        tone = {True: "good", False: "bad"}.get(entry.get("ok"), "")
        lines.append(("caption", entry["caption"], tone))
    lines += [("reference", text, "") for text in entry.get("references", ())]
    lines += entry.get("lines", ())
    lines = [(str(label), str(text), tone if tone in TONES else "") for label, text, tone in lines]
    return Card(images, list(entry.get("tones") or [""] * len(images)), lines)


def _thumbnail(source: ImageSource) -> Image.Image:
    image = as_rgb(source)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


# The page. Every text passes through escape.


def _page(
    title: str,
    scores: Scores,
    log: Sequence[dict[str, Any]],
    cards: Sequence[Card],
    notes: Sequence[str],
    figures: dict[str, str],
) -> str:
    items = "".join(f"<li>{escape(str(note))}</li>" for note in notes)
    histograms = f'<img class="wide" src="{figures.get("histograms.png")}" alt="Histograms of probabilities">'
    sections = [
        _scores_section(scores, figures.get("scores.png")),
        _section("Notes", f"<ul>{items}</ul>") if notes else "",
        _training_section(log, figures.get("curve.png")),
        _section("Matching probabilities", histograms) if "histograms.png" in figures else "",
        _cards_section(cards),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )


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


def _cards_section(cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    broad = " broad" if max(len(card.images) for card in cards) > 1 else ""
    return _section("Test images", f'<div class="cards{broad}">{"".join(map(_card_html, cards))}</div>')


def _card_html(card: Card) -> str:
    images = "".join(_image_html(image, tone) for image, tone in zip(card.images, card.tones, strict=True))
    lines = "".join(
        f'<p class="{tone}">{f"<small>{escape(label)}</small>" if label else ""}<b>{escape(text)}</b></p>'
        for label, text, tone in card.lines
    )
    return f'<div class="card"><div class="images">{images}</div>{lines}</div>'


def _image_html(image: Image.Image, tone: str) -> str:
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
