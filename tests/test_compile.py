"""`compile: true`: every block in one graph, and the same losses, gradients and captions as without."""

import copy
from functools import partial

import pytest
import torch

from formula import arr, img
from formula import build as build_formula
from launch.config import NLVRConfig
from models.tokenizer import tokenize
from training.adapters import add_adapters
from training.state import compile_blocks

build = partial(build_formula, num_layers=2)
TEXTS = ["a red ring", "two rings left of a large green star"]
QUESTIONS = ["what color is it ?", "how many rings are left of the star ?"]


def captioning(model):
    return [model(img("compiled"), [f"a picture of {text}" for text in TEXTS])]


def pretraining(model):
    return model(img("compiled"), TEXTS, 0.4)


def retrieval(model):
    return model(img("compiled"), TEXTS, 0.4, torch.tensor([1, 2]))


def answering(model):
    weights = torch.tensor([1.0, 0.5, 0.5])
    return [model(img("compiled"), QUESTIONS, ["red", "two", "three"], n=[1, 2], weights=weights)]


def judging(model):
    pairs = torch.cat((img("compiled"), img("compiled 2")))
    return [model(pairs, TEXTS, torch.tensor([0, 1]), train=True)]


TASKS = {
    "decoder": captioning,
    "pretrain": pretraining,
    "retrieval": retrieval,
    "vqa": answering,
    "nlvr": judging,
}


def steps(model, losses):
    """Losses of two steps, and the gradients of the second."""
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad()
        values = losses(model)
        sum(values).backward()
        found += [value.item() for value in values]
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_compiled_equals_eager(plain, losses):
    """Backend `eager` runs the captured graphs as they are; `fullgraph` refuses breaks."""
    torch._dynamo.reset()
    compiled = copy.deepcopy(plain)
    assert compile_blocks(compiled, backend="eager", fullgraph=True) > 0
    (expected, gradients), (found, others) = steps(plain, losses), steps(compiled, losses)
    assert found == pytest.approx(expected, abs=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-4), name
    return gradients


@pytest.mark.parametrize(("kind", "recomputed"), [*((kind, False) for kind in TASKS), ("decoder", True)])
def test_every_task_compiles_without_graph_breaks(kind, recomputed):
    assert_compiled_equals_eager(build(kind, vit_grad_ckpt=recomputed, vit_ckpt_layer=1), TASKS[kind])


@pytest.mark.parametrize("kind", ["vqa", "nlvr"])
def test_adapters_compile_without_graph_breaks(kind):
    model = build(kind)
    add_adapters(model, NLVRConfig(adapter_rank=2, adapter_also=["cls_head"] if kind == "nlvr" else []))
    with torch.no_grad():  # they begin as nothing, so that only one factor would have a gradient
        for name, p in model.named_parameters():
            p.add_(0.1 * arr(f"adapter {name}", p.shape) if "lora_B" in name else 0)
    gradients = assert_compiled_equals_eager(model, TASKS[kind])
    assert sum("lora_" in name and gradient.abs().max() > 1e-6 for name, gradient in gradients.items()) > 20


def test_what_generates_and_ranks_compiles_too():
    torch._dynamo.reset()
    plain, ranker = build("decoder"), build("vqa")
    settings = dict(num_beams=3, max_length=14, min_length=8)
    expected = plain.generate(img("compiled"), **settings)
    candidates = tokenize(ranker.tokenizer, ["red", "red and white", "two", "no"], "dec")
    states = arr("compiled states", (2, 5, ranker.text_decoder.config.encoder_width))
    mask = torch.ones(2, 5, dtype=torch.long)
    losses = ranker.rank_losses(states, mask, candidates.input_ids, 4)[0]
    for model in (plain, ranker):
        compile_blocks(model, backend="eager")
    assert plain.generate(img("compiled"), **settings) == expected
    found = ranker.rank_losses(states, mask, candidates.input_ids, 4)[0]
    torch.testing.assert_close(found, losses, atol=1e-4, rtol=1e-4)
