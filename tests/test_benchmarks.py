"""The benchmarks' own arithmetic: counted operations, tokens that must be computed, sections of the results."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor, results
from benchmarks.measure import Timing, summary
from benchmarks.rows import ROWS, needed_tokens, word_texts
from models.med import MedConfig, TextDecoder, TextTransformer
from models.vit import create_vit
from tests import plain

CONFIG = MedConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=80, vocab_size=50, encoder_width=48
)


def counted(work):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops() / 1e9


def test_the_floor_of_the_vit_is_what_is_counted():
    vit, width = create_vit({"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}, 32)
    image = torch.randn(1, 3, 32, 32)
    assert counted(lambda: plain.image_tokens(vit.eval(), image)) == pytest.approx(floor.vit(17, width, 2, 8))


def test_the_floor_of_texts_is_what_is_counted():
    text, ids, mask = TextTransformer(CONFIG).eval(), torch.ones(1, 7, dtype=torch.long), torch.ones(1, 7)
    states = torch.randn(1, 11, 48)
    alone = counted(lambda: plain.text_states(text, ids, mask))
    assert alone == pytest.approx(floor.text(7, CONFIG))
    assert counted(lambda: text.project(states)) == pytest.approx(floor.projection(11, CONFIG))
    reading = counted(lambda: plain.text_states(text, ids, mask, states))
    assert reading == pytest.approx(floor.text(7, CONFIG, states=11) + floor.projection(11, CONFIG))
    head = counted(lambda: TextDecoder(CONFIG).eval().logits(torch.randn(1, 5, 32)))
    assert head == pytest.approx(floor.head(5, CONFIG))


def test_tokens_that_must_be_computed():
    # [DEC] red [SEP]; [DEC] red and white [SEP]; [DEC] yes [SEP]: 0 beginnings, each once, without end tokens
    ids = torch.tensor([[9, 1, 3, 0, 0], [9, 1, 4, 5, 3], [9, 2, 3, 0, 0]])
    mask = (ids != 0).long()
    assert needed_tokens(ids, mask, padding=False) == 5  # [DEC], red, and, white, yes
    assert needed_tokens(ids, mask, padding=True) == 5 + 2 + 0 + 2


def test_a_row_is_summed_up_by_medians():
    found = summary(Timing(ours=[1.0, 2.0, 1.5], theirs=[3.0, 3.0, 6.0]), rate=100.0, gflop=75.0)
    assert found["ratio"] == 2.0 and (found["lowest ratio"], found["highest ratio"]) == (1.5, 4.0)
    assert found["times the floor"] == 2.0


def test_sections_are_replaced_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    for title, body in (("A", "one"), ("B", "two"), ("A", "three")):
        results.write_section(title, body)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == f"{results.TITLE}\n\n## A\n\nthree\n\n## B\n\ntwo\n"


def test_texts_are_as_long_as_captions():
    lengths = [len(text.split()) for text in word_texts(500)]
    assert 10 < sum(lengths) / 500 < 11 and min(lengths) >= 7 and len(ROWS) == 7
