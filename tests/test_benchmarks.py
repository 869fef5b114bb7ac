"""The benchmarks' own arithmetic: counted operations, tokens that must be computed, sections of the results."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import exports, floor, inference_rows, measure, results, throughput
from benchmarks.__main__ import ROWS, cells, run_row
from benchmarks.case import Size, word_texts
from benchmarks.inference_rows import needed_tokens
from benchmarks.measure import Timing
from benchmarks.training_rows import pretraining_floor
from models.blip_pretrain import BLIP_Pretrain
from models.cpu_products import pytorch_products
from models.med import TextDecoder, TextTransformer
from models.med_config import MedConfig
from models.vit import create_vit
from tests import plain
from utils import run_command

TINY = Size(
    {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 16},
    {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96},
    32,
)
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
    assert counted(lambda: plain.image_tokens(vit.eval(), image)) == pytest.approx(floor.vit(1, 17, width, 2, 8).gflop)


def test_the_floor_of_texts_is_what_is_counted():
    text, ids, mask = TextTransformer(CONFIG).eval(), torch.ones(1, 7, dtype=torch.long), torch.ones(1, 7)
    states = torch.randn(1, 11, 48)
    alone = counted(lambda: plain.text_states(text, ids, mask))
    assert alone == pytest.approx(floor.text(7, CONFIG).gflop)
    assert counted(lambda: text.project(states)) == pytest.approx(floor.projection(11, CONFIG).gflop)
    reading = counted(lambda: plain.text_states(text, ids, mask, states))
    both = floor.together(floor.text(7, CONFIG, states=11), floor.projection(11, CONFIG))
    assert reading == pytest.approx(both.gflop)
    head = counted(lambda: TextDecoder(CONFIG).eval().logits(torch.randn(1, 5, 32)))
    assert head == pytest.approx(floor.head(5, CONFIG).gflop)


def test_tokens_that_must_be_computed():
    # [DEC] red [SEP]; [DEC] red and white [SEP]; [DEC] yes [SEP]: 0 beginnings, each once, without end tokens
    ids = torch.tensor([[9, 1, 3, 0, 0], [9, 1, 4, 5, 3], [9, 2, 3, 0, 0]])
    mask = (ids != 0).long()
    assert needed_tokens(ids, mask, padding=False) == 5  # [DEC], red, and, white, yes
    assert needed_tokens(ids, mask, padding=True) == 5 + 2 + 0 + 2


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1) / 1e9


def test_the_weights_of_the_floor_are_the_models():
    vit, width = create_vit({"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}, 32)
    tables = vit.pos_embed.numel() + vit.cls_token.numel()
    assert matrices(vit) == pytest.approx(floor.vit(1, 17, width, 2, 8).weights + tables / 1e9)
    decoder = TextDecoder(CONFIG)
    reads, writes = floor.text(1, CONFIG, states=11), floor.text(1, CONFIG)
    layers = floor.together(reads, floor.projection(1, CONFIG))
    assert matrices(decoder.bert.encoder) == pytest.approx(layers.weights)
    assert matrices(decoder.cls) == pytest.approx(floor.head(1, CONFIG).weights)
    assert reads.weights - writes.weights == pytest.approx(3 * 2 * 32 * 32 / 1e9)  # a layer's query and output


def test_the_floor_of_a_pretraining_step_is_below_what_is_counted():
    """Ours computes what the floor counts, and little more."""
    settings = dict(med_config=vars(CONFIG) | {"vocab_size": 0}, image_size=32, queue_size=8, embed_dim=8)
    model = BLIP_Pretrain(vit={"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}, **settings).eval()
    texts = ["a red ring"] * 4
    attention = plain.plain_attention(model.visual_encoder)  # the counter knows neither fused attention nor oneDNN
    with FlopCounterMode(display=False) as counter, attention, pytorch_products():
        sum(model(torch.randn(4, 3, 32, 32), texts, 0.4)).backward()
    least = sum(part.gflop for part in pretraining_floor(model, texts))
    assert 0.7 * least < counter.get_total_flops() / 1e9 < 1.3 * least


def test_a_stage_waits_for_what_is_slower():
    part = floor.Part(gflop=50.0, weights=1.0)
    assert part.seconds(rate=100.0, bandwidth=20.0) == 0.5 and part.seconds(rate=100.0, bandwidth=4.0) == 1.0
    assert part.seconds(rate=1000.0, bandwidth=4.0, width=2) == 0.5


def test_a_row_is_summed_up_by_medians():
    parts = [floor.Part(50.0, 0.1), floor.Part(25.0, 10.0)]
    timing = Timing([1.0, 2.0, 1.5], [3.0, 3.0, 6.0], [2.0, 2.0, 2.0], rate=100.0, bandwidth=160.0)
    found = timing.summary(parts)
    assert found["ratio"] == 2.0 and found["torch products"] == 1.5
    assert (found["lowest ratio"], found["highest ratio"]) == (1.5, 4.0)
    assert (found["floor (GFLOP)"], found["floor (GB)"]) == (75.0, pytest.approx(40.4))
    assert found["times the floor"] == 2.0  # half a second of products, a quarter of reading


@pytest.fixture
def small_probes(monkeypatch):
    """Probes of the machine's rates that take milliseconds, captions of few tokens, and no compiler."""
    monkeypatch.setattr(inference_rows, "LENGTH", 9)
    monkeypatch.setattr(throughput, "WARM_UP", 1)
    monkeypatch.setattr(measure, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(measure, "FEW_ROWS", (2, 64, 64))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "retrieval"])  # whose size is not free
def test_a_row_at_tiny_size(name, small_probes):
    fewer = {"vqa": {"k": 4}, "pretraining": {"pairs": 2}}.get(name.split("_")[0], {})
    found = run_row(replace(ROWS[name], repeats=1), "cpu", size=TINY, **fewer)
    assert found["ratio"] > 0 and found["times the floor"] > 0 and found["difference"] <= ROWS[name].tolerance
    assert len(cells(found)) == 12


def test_the_page_of_a_gpu_at_tiny_size(small_probes, monkeypatch):
    """Only the card is missing."""
    monkeypatch.setattr(throughput, "STEPS", 1)
    plan = throughput.Plan({"tiny": TINY}, [2], (32, 64), (0, 1), batch_size=2, steps=1, texts=4)
    text = "\n\n".join(throughput.sections(plan, "cpu"))
    assert len([row for row in text.splitlines() if row.startswith("| tiny | ")]) == len(throughput.PRECISIONS)
    assert text.count("| captioning 8 images") == text.count("| re-ranking one image") == 2
    assert text.count("| VQA ranking") == 4 and "| 64 | 1 | " in text


def test_the_exported_captioners_at_tiny_size():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = exports.measure(TINY, repeats=1).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in exports.NAMES]
    stored = [float(row.split(" | ")[3].rstrip(" |")) for row in rows]
    assert stored[3] < stored[2]


def test_without_a_gpu_the_page_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["throughput"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(throughput.main) == 2 and "torch finds no CUDA GPU" in capsys.readouterr().err


def test_sections_are_replaced_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    for title, body in (("A", "one"), ("B", "two"), ("A", "three")):
        results.write_section(title, body)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == f"{results.TITLE}\n\n## A\n\nthree\n\n## B\n\ntwo\n"


def test_texts_are_as_long_as_captions():
    lengths = [len(text.split()) for text in word_texts(500)]
    assert 10 < sum(lengths) / 500 < 11 and min(lengths) >= 7
