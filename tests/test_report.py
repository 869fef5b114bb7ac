"""Tests of the report: the page stands alone, escapes its texts, and its figures hold what was given."""

import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from metrics.units import format_score, put_test_first
from report.figures import _line, _places, draw_curves, draw_scores
from report.page import _thumbnail, write_report
from utils import UserError

ORANGE = (240, 120, 30)
LOG = [{"epoch": 0, "step": s, "train_loss_lm": 3.0 / s, "train_lr": 1e-3} for s in (10, 20)] + [
    {"epoch": 0, "train_loss_lm": 9.0, "val_CIDEr": 0.5}
]


class Page(HTMLParser):
    """Collects the tags, addresses and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def image(size=(60, 40)):
    """Return a image of one colour."""
    return Image.new("RGB", size, ORANGE)


def captions():
    """Return two test images with captions."""
    first = [("caption", "a <script>ball</script> for $5 & $6", "good"), ("reference", "a ball", "")]
    second = [("caption", "a dog", "bad"), ("reference", "a cat", ""), ("reference", "the cat", "")]
    return [{"image": image(), "lines": first}, {"image": image((300, 500)), "lines": second}]


def test_page_stands_alone_and_escapes(tmp_path):
    """All texts are shown as written; nothing is loaded from elsewhere; tags are closed."""
    path = write_report(tmp_path / "new", "A & <b>", {"CIDEr": 1.25}, LOG, captions(), ["left out: <SPICE>"])
    page = Page(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "new" / "report.html" and not page.open
    texts = {"A & <b>", "a <script>ball</script> for $5 & $6", "left out: <SPICE>", "125.0", "the cat"}
    assert texts <= set(page.texts) and "script" not in page.tags
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert len(page.addresses) == 2 + 2  # two figures, two test images


def test_figures_are_written(tmp_path):
    """The three figures are PNGs, and there is no other file."""
    write_report(tmp_path, "t", {"CIDEr": 1.25}, LOG, captions(), histograms={"web": [1, 2]})
    sizes = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert set(sizes) == {"scores.png", "curve.png", "histograms.png"} and all(min(s) > 50 for s in sizes.values())
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_to_draw(tmp_path):
    """Without data there is a page and no figure."""
    page = Page(write_report(tmp_path, "only a title", {}).read_text(encoding="utf-8"))
    assert "only a title" in page.texts and "section" not in page.tags
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_other_tasks(tmp_path):
    """Several images with tones, questions and odd scripts go in, without a warning."""
    entries = [
        {
            "images": [image(), image((40, 90))],
            "tones": ["bad", "good"],
            "lines": [("query", "\u732b", "")],
        },
        {
            "image": image(),
            "lines": [("question", "what?", ""), ("answer", "red", "good"), ("", "", "bad")],
        },
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(tmp_path, "t", {"acc": float("nan")}, [], entries).read_text(encoding="utf-8")
    assert (
        re.search(r'<img class="\S* ?good"', text)
        and '<p class="good"><small>answer</small><b>red</b>' in text
    )
    assert not (tmp_path / "scores.png").exists()


def test_groups_become_columns(tmp_path):
    """Scores by domain make one column each; a score that one lacks is an empty cell."""
    scores = {"in": {"CIDEr": 1.0, "SPICE": 0.1}, "out": {"CIDEr": 0.5}, "n": 3}
    text = write_report(tmp_path, "t", scores).read_text(encoding="utf-8")
    assert "<th></th><th></th><th>in</th><th>out</th>" in text
    assert "<tr><th>CIDEr</th><td></td><td>100.0</td><td>50.0</td></tr>" in text
    assert "<tr><th>SPICE</th><td></td><td>10.0</td><td></td></tr>" in text


def test_scores_without_numbers_draw_nothing(tmp_path):
    """Counts, texts and infinities make no bars."""
    assert not draw_scores(
        {"": {"n": 5000, "name": "x", "bad": float("inf"), "txt_mdR": 9.0, "flag": True}}, tmp_path / "s.png"
    )
    assert draw_scores({"": {"n": 5000, "acc": 0.5}}, tmp_path / "s.png")


def test_curve_places():
    """Rows of epochs stand at their last step; step values are not mixed with means over epochs."""
    unit, places = _places(LOG)
    assert (unit, places) == ("step", [10, 20, 20])
    assert _line(LOG, places, "train_loss_lm") == [(10, 0.3), (20, 0.15)]
    assert _line(LOG, places, "val_CIDEr") == [(20, 50.0)]  # as papers print it
    assert _places([{"epoch": 0}, {"epoch": 3}, {}]) == ("epoch", [0, 3, None])


def test_curves_skip_what_is_no_number(tmp_path):
    """Losses that are not finite leave a gap; without any number no figure is drawn."""
    row = {"epoch": 1, "train_loss": float("nan"), "train_lr": None, "val_note": "x"}
    assert not draw_curves([row, {}], ["train_loss"], tmp_path / "c.png")
    more = [{"epoch": epoch, "train_loss": 1.0} for epoch in (2, 3)]
    assert draw_curves([row, *more], ["train_loss"], tmp_path / "c.png")


def panels(draw, *args):
    """Return the titles and the bars or lines of what a function draws."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
        draw(*args)
    return drawn


def test_bars_of_one_panel_have_one_scale(tmp_path):
    """CIDEr, to 1000, and median ranks do not share an axis with percentages; units unknown are not drawn."""
    scores = {"": {"test_CIDEr": 8.9, "test_Bleu_4": 0.9, "test_txt_r1": 55.0, "test_txt_mdR": 3.0}}
    bars = [[bar.get_width() for bar in axes.patches] for axes in panels(draw_scores, scores, tmp_path / "s.png")]
    assert bars == [[pytest.approx(890)], [pytest.approx(90), 55]]
    scores = {"web": {"kept (%)": 50.0, "words a text": 7.5}}
    (axes,) = panels(draw_scores, scores, tmp_path / "s.png")
    assert [bar.get_width() for bar in axes.patches] == [50]


def test_one_point_is_no_curve(tmp_path):
    """An evaluation after a single epoch is no line, and CIDEr's scale is its own."""
    log = [*LOG, {"epoch": 1, "step": 30, "train_loss": 1.0}, {"epoch": 1, "val_CIDEr": 0.6, "val_Bleu_4": 0.1}]
    drawn = panels(draw_curves, log, ["train_loss"], tmp_path / "c.png")
    titles = [axes.get_title(loc="left") for axes in drawn]
    assert titles == ["loss", "learning rate", "validation, CIDEr"]
    assert list(drawn[2].lines[0].get_ydata()) == [50, 60]
    assert not draw_curves([{"epoch": 0, "train_loss": 1.0, "val_acc": 0.5}], ["train_loss"], tmp_path / "d.png")


def test_test_scores_come_first(tmp_path):
    scores = {"val_CIDEr": 1.0, "test_CIDEr": 0.9, "epoch": 3}
    assert list(put_test_first(scores)) == ["test_CIDEr", "val_CIDEr", "epoch"]
    text = write_report(tmp_path, "t", scores).read_text(encoding="utf-8")
    assert text.index("test_CIDEr") < text.index("val_CIDEr")


def test_image_sources(tmp_path):
    """Paths, arrays and tensors, in either order and range, give the same image."""
    small = image((6, 4))
    small.save(tmp_path / "p.png")
    array = np.asarray(small)
    tensor = torch.tensor(array.copy()).permute(2, 0, 1).float() / 255
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), array, array / 255, tensor, small):
        opened = _thumbnail(source)
        assert opened.size == (6, 4) and opened.getpixel((0, 0)) == ORANGE
    assert max(_thumbnail(image((2000, 900))).size) == 480


def test_what_cannot_be_shown(tmp_path):
    """A file that is absent or no image, and an array of another shape, are named."""
    (tmp_path / "text.png").write_text("no image")
    for source in (tmp_path / "absent.png", tmp_path / "text.png"):
        with pytest.raises(UserError, match=source.name):
            _thumbnail(source)
    with pytest.raises(UserError, match=r"\(4, 4, 4, 4\)"):
        _thumbnail(np.zeros((4, 4, 4, 4)))
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / "text.png", "t", {})


def test_values():
    """Captioning scores are in percent, small rates keep their digits, counts stay whole."""
    values = (0.5, 1.33123, 71.4285, 1e-5, 0.0, 5000, 12345.6, "x")
    shown = ["0.5000", "1.3312", "71.43", "1e-05", "0.0000", "5000", "12,345.60", "x"]
    assert [format_score("any", value) for value in values] == shown
    assert format_score("val_CIDEr", 1.333) == "133.3" and format_score("test_near-domain_Bleu_4", 0.397) == "39.7"
    assert format_score("val_acc", 0.8215) == "82.15" and format_score("val_overall", 78.25) == "78.25"
