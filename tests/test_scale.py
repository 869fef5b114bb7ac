"""The plan's arithmetic, against numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scale, scale_counts
from benchmarks.scale_check import predicted_ratio
from models.blip_pretrain import BLIP_Pretrain

CLUSTER = scale.Cluster("test", rate=1000.0, memory=100.0, links=100.0, network=10.0)
COUNTS = scale_counts.Counts(
    trained=250_000_000, twin=200_000_000, queues=2_000_000_000, pair_bytes=1e8, step_bytes=5e8, gflop=7.0,
    kernels=1000, gathered=600_000_000, scattered=300_000_000, together=50_000_000,
)  # fmt: skip
VOCABULARY = Path(__file__).parent.parent / "configs" / "miniature" / "vocab.txt"  # small: logits are not recomputed
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "vocab_file": str(VOCABULARY)}  # fmt: skip
TINY = {"image_size": 32, "queue_size": 16, "embed_dim": 8, "med_config": TEXT}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def test_memory_is_divided_by_fsdp_but_for_queues_and_what_is_gathered():
    assert sum(scale.memory(COUNTS, 8, sharded=False).values()) == pytest.approx(1 + 1 + 1 + 2 + 0.8 + 2 + 0.5)
    sharded = scale.memory(COUNTS, 4, sharded=True)
    assert sum(sharded.values()) == pytest.approx(0.25 + 0.25 + 0.2 + 0.5 + 0.2 + 2 + 0.5)


def test_bytes_moved():
    found = list(scale.traffic(COUNTS, 4, 100).values())
    # a ring passes (N-1)/N of the bytes twice; each of 3 others' 100 pairs brings two features of 256 floats
    assert found == pytest.approx([1.5, 1.8, 0.9, 2 * 256 * 300 * 4 / 1e9])


def test_an_all_reduce_takes_the_slowest_link():
    latency = 40 * 2 * 3 * 5e-6  # 1 GB is 39 buckets of 25 MiB; a tree of 8 is 3 deep
    inside = scale.all_reduce_seconds(1e9, 8, CLUSTER)
    assert inside == pytest.approx(2 * 7 / 8 / 70 + latency * 39 / 40)
    assert scale.all_reduce_seconds(1e9, 16, CLUSTER) == pytest.approx(2 * 15 / 16 / 7 + 39 * 8 * 5e-6)
    assert scale.all_reduce_seconds(1e9, 1, CLUSTER) == 0


def test_a_step_waits_for_computing_or_for_launches_and_for_what_is_not_hidden():
    found = scale.step(COUNTS, 1, 50, CLUSTER)
    assert found.compute == pytest.approx(1.0)  # 350 GFLOP at 350 GFLOP/s
    assert found.update == pytest.approx(4 * (7 * 0.25 + 3 * 0.2) / 100)
    assert (found.exposed, found.rate) == pytest.approx((0, 50 / 1.094))
    small = scale.step(COUNTS, 1, 0.01, CLUSTER)
    assert small.seconds == pytest.approx(1000 * 6e-6 + 0.094)
    far = scale.step(replace(COUNTS, gflop=0.07), 16, 50, CLUSTER)  # compute 10 ms, of which 5.3 hide something
    features = 2 * 256 * 50 * 15 * 4 / 1e9 / 7
    assert far.exposed == pytest.approx(far.sums - 0.8 * 2 / 3 * 0.01 + features)
    near = scale.step(COUNTS, 8, 50, CLUSTER)  # all hidden but the last of the buckets
    assert near.exposed == pytest.approx(near.sums * 25 * 2**20 / 1e9 + 2 * 256 * 50 * 7 * 4 / 1e9 / 70)


def test_hours_and_prediction():
    assert scale.hours(3600, 20) == 1
    assert predicted_ratio(alone=2.0, reduced=0.5, slowdown=1.25) == pytest.approx(1.5)


def test_marked_parts_are_replaced():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb"
    assert scale.fill(text, "one", "new") == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb"
    assert scale.fill(scale.fill(text, "one", "new"), "one", "new").count("new") == 1


def test_counts_are_the_models():
    real = BLIP_Pretrain(vit=VIT, **TINY)
    found = scale_counts.count_model(lambda: scale_counts.build(VIT, **TINY))
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.twin == sum(p.numel() for p in real.parameters() if not p.requires_grad)
    assert found.queues == 4 * 2 * 8 * 16
    # every block is gathered at least once; a shared one is reduced after each of its uses
    assert found.scattered > found.trained and found.gathered > found.trained + found.twin
    recomputed = scale_counts.count_model(lambda: scale_counts.build(VIT, True, True, **TINY))
    assert recomputed.pair_bytes < 0.8 * found.pair_bytes
    assert recomputed.kernels > found.kernels


def test_kept_bytes_are_those_of_a_known_function():
    weight = torch.ones(3, 5, requires_grad=True)
    kept = scale_counts.Kept({"weight": weight})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        (torch.ones(2, 3) @ weight).relu().sum()
    assert sum(kept.values()) == (2 * 3 + 2 * 5) * 4  # the product keeps its input, relu its result
