"""The counts of docs/large_runs.md against a real model, and against numbers worked out by hand."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import large_runs, results
from benchmarks.training_rows import build_pretraining

VOCABULARY = Path(__file__).parent.parent / "configs" / "miniature" / "vocab.txt"
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "vocab_file": str(VOCABULARY)}  # fmt: skip
SETTINGS = {"image_size": 32, "queue_size": 16, "embed_dim": 8, "med_config": TEXT}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def test_counts_are_those_of_the_model():
    real, found = build_pretraining(False, False, vit=VIT, **SETTINGS), large_runs.counts(VIT, **SETTINGS)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    momentum = sum(p.numel() for p in real.parameters() if not p.requires_grad)
    assert found["parameters trained, millions"] == trained / 1e6
    assert found["parameters of the momentum encoders, millions"] == momentum / 1e6
    kept = {name: value for name, value in found.items() if name.startswith("bytes of a pair")}
    assert len(kept) == 4 and min(kept, key=kept.get).endswith("image and text, MB")
    assert kept["bytes of a pair, recomputing none, MB"] > 1.2 * min(kept.values())
    fixed = found["queues, their copies and bfloat16 weights, GB"]
    assert fixed > 4 * 2 * 16 * 8 / 1e9
    assert found["memory under DDP without pairs, GB"] == pytest.approx(4 * (5 * trained + momentum) / 1e9 + fixed)


def test_kept_bytes_are_those_of_a_real_forward_pass():
    """A pass on real tensors keeps as much for each pair as one on fake tensors."""
    held = []
    for pairs in large_runs.BATCHES:
        text = TEXT | {"attention_probs_dropout_prob": 0.0}
        model, kept = build_pretraining(False, False, vit=VIT, **(SETTINGS | {"med_config": text})), {}
        weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(tensor, kept=kept, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu"):
            losses = model(torch.randn(pairs, 3, 32, 32), [large_runs.CAPTION] * pairs, 0.4)
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        del losses
    pair = (held[1] - held[0]) / (large_runs.BATCHES[1] - large_runs.BATCHES[0])
    assert large_runs.kept_bytes(VIT, "none", **SETTINGS)[0] == pytest.approx(pair, rel=0.05)


def test_hours_of_a_set():
    text = large_runs.hours_table({"base": {large_runs.GFLOP: 312.0}})
    row = next(line for line in text.splitlines() if line.startswith("| base, A100"))
    # 15% and 45% of 312e3 GFLOP/s make 150 and 450 pairs of 312 GFLOP a second
    assert re.split(r" *\| *", row)[2:4] == ["150 to 450", "22 to 65"]  # 14e6 x 20 / 450 / 8 / 3600 = 21.6


def test_the_part_between_two_marks_is_replaced():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb"
    assert results.fill(text, "one", "new") == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb"
    assert results.fill(results.fill(text, "one", "new"), "one", "new").count("new") == 1
