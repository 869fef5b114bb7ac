"""Contrast over all ranks' pairs and over accumulated batches: losses and gradients of one large batch."""

from functools import partial

import pytest
import torch
from scripts import ROOT
from torch.nn.parallel import DistributedDataParallel

import train_retrieval
from formula import arr
from formula import build as build_formula
from launch.config import RetrievalConfig
from launch.run import Run
from processes import run_in_processes
from training.contrast import compute_candidates
from training.loop import Task, take_step
from training.progress import Progress
from training.state import create_state

build = partial(build_formula, vocab_file=ROOT / "configs" / "miniature" / "vocab.txt", num_layers=2)
CPU = torch.device("cpu")
ALPHA, STEPS, PAIRS = 0.4, 2, 8
IDX = torch.tensor([[5, 1, 2, 3, 4, 5, 2, 7], [1, 8, 9, 5, 9, 9, 10, 1]])  # same images in several parts, and steps
COLOURS = ["red", "blue", "green", "white", "black", "pink", "large", "small"]
KINDS = pytest.mark.parametrize("kind", ["pretrain", "retrieval"])


def pairs(kind, step, rows):
    """Rows of a step's pairs as a batch; pairs of one image share it."""
    images = arr(f"a:large{step}", (PAIRS, 3, 48, 48))
    if kind == "retrieval":
        images = images[(IDX[step][:, None] == IDX[step]).float().argmax(dim=1)]
    captions = [f"a {colour} ring {step}" for colour in COLOURS]
    batch = {"image": images[rows], "caption": captions[rows]}
    return batch if kind == "pretrain" else batch | {"idx": IDX[step][rows]}


def contrast(parallel, batch):
    """ITC of a batch; the other losses count nothing, so that all parameters take part and no draw matters."""
    loss, *others = parallel(alpha=ALPHA, **batch)
    return loss + 0 * sum(others)


def with_candidates(model, batches):
    """The arguments of forward for each batch of a step, with what its contrast compares it with."""
    found = compute_candidates(model, batches)
    return [{**batch, "candidates": candidates} for batch, candidates in zip(batches, found, strict=True)]


def trained(kind, rows, parts, train=False, rank=0, world_size=1, **options):
    """Take steps on rows of the pairs in parts; returns mean losses, gradients of each step, and the last state."""
    model = build(kind, **options).train(train)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    losses, gradients = [], []
    for step in range(STEPS):
        size = (rows.stop - rows.start) // parts
        model.begin_step()
        cuts = [slice(start, start + size) for start in range(rows.start, rows.stop, size)]
        batches = [pairs(kind, step, cut) for cut in cuts]
        batches = with_candidates(model, batches) if parts > 1 else batches
        model.zero_grad()
        total = 0.0
        for number, batch in enumerate(batches, 1):
            if world_size > 1:
                parallel.require_backward_grad_sync = number == parts
            loss = contrast(parallel, batch) / parts
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():  # plain descent, so that the next step sees what this one gave
            for name, p in model.named_parameters():
                p.sub_(0.1 * gradients[-1].get(name, torch.zeros(())))
    return losses, gradients, {n: v.clone() for n, v in model.state_dict().items()}


# What two ranks compute in one start: kind, batches of a step that go together, options.
CASES = {
    "pretraining, accumulated": ("pretrain", 2, {"itc_all_ranks": True}),
    "retrieval": ("retrieval", 1, {"itc_all_ranks": True}),
    "retrieval, accumulated": ("retrieval", 2, {"itc_all_ranks": True}),
    "each rank for itself": ("retrieval", 1, {}),
}


def on_rank(rank, world_size):
    size = PAIRS // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return {
        name: trained(kind, rows, parts, rank=rank, world_size=world_size, **options)
        for name, (kind, parts, options) in CASES.items()
    }


@pytest.fixture(scope="module")
def two_ranks():
    """For each case the mean losses of two ranks, and what each of them has."""
    ranks = run_in_processes(on_rank, 2)
    means = {name: [sum(pair) / 2 for pair in zip(*(rank[name][0] for rank in ranks), strict=True)] for name in CASES}
    return {name: (means[name], [rank[name][1:] for rank in ranks]) for name in CASES}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same(found, expected):
    losses, gradients, state = found
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert max(largest_difference(*pair) for pair in zip(gradients, expected[1], strict=True)) < 1e-5
    assert largest_difference(state, expected[2]) < 1e-5, "queues, pointers and momentum encoders too"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_two_ranks_equal_one_large_batch(two_ranks, name):
    mean, ranks = two_ranks[name]
    expected = trained(CASES[name][0], slice(0, PAIRS), 1)
    for found in ranks:
        assert_same((mean, *found), expected)


@KINDS
def test_accumulated_batches_equal_one_large_batch(kind):
    whole = trained(kind, slice(0, PAIRS), 1)
    assert_same(trained(kind, slice(0, PAIRS), 4), whole)


def test_without_the_options_contrast_is_each_ranks_own(two_ranks):
    expected = trained("retrieval", slice(0, PAIRS), 1)
    assert two_ranks["each rank for itself"][0][0] != pytest.approx(expected[0][0], abs=1e-3)


def test_dropout_is_drawn_once_for_each_pair():
    """With dropout on, each tower runs once on each batch, so that no second pass could draw differently."""
    model = build("pretrain").train()
    calls = []
    for name in ("visual_encoder", "visual_encoder_m"):
        getattr(model, name).register_forward_pre_hook(lambda m, args, name=name: calls.append((name, len(args[0]))))
    batches = [pairs("pretrain", 0, slice(start, start + 2)) for start in range(0, PAIRS, 2)]
    for batch in with_candidates(model, batches):
        contrast(model, batch).backward()
    assert calls == [("visual_encoder_m", 2)] * 4 + [("visual_encoder", 2)] * 4
    assert model.queue_ptr.item() == PAIRS % model.queue_size


@pytest.mark.parametrize("cached", [False, True])
def test_the_loop_contrasts_all_batches_of_a_step(tmp_path, cached):
    """The training script's step in the loop: one writing of the queue."""
    model = build("retrieval")
    whole = build("retrieval")
    expected = whole(alpha=ALPHA, **pairs("retrieval", 0, slice(0, PAIRS)))[0].item()
    config = RetrievalConfig(grad_accum=2, itc_cached=cached, num_workers=0)
    task = Task(partial(train_retrieval.train_step, alpha=ALPHA), candidates=compute_candidates if cached else None)
    state = create_state(Run(tmp_path, CPU), config, model, num_batches=2)
    state.progress = Progress(1, 2, epoch=1)
    values = take_step(state, task, [pairs("retrieval", 0, slice(0, 4)), pairs("retrieval", 0, slice(4, 8))])
    assert (values["loss_itc"].item() == pytest.approx(expected, abs=1e-5)) == cached
    same = torch.allclose(model.image_queue, whole.image_queue, atol=1e-5)
    assert same and model.ptr_queue.item() == PAIRS % model.queue_size


@pytest.mark.parametrize("cached", [False, True])
def test_momentum_moves_and_temperature_is_clamped_once_a_step(tmp_path, cached):
    model = build("retrieval")
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
        model.temp.fill_(0.9)
    start, online = model.vision_proj_m.weight.clone(), model.vision_proj.weight.clone()
    temperatures = []

    def train_step(wrapped, batch, progress, candidates=None):
        losses = wrapped(alpha=ALPHA, candidates=candidates, **batch)
        temperatures.append(model.temp.item())
        model.temp.data.fill_(0.9)
        return {"loss_itc": losses[0], "loss_itm": losses[1]}

    config = RetrievalConfig(grad_accum=2, itc_cached=cached, num_workers=0)
    task = Task(train_step, candidates=compute_candidates if cached else None)
    state = create_state(Run(tmp_path, CPU), config, model, num_batches=2)
    take_step(state, task, [pairs("retrieval", 0, slice(0, 4)), pairs("retrieval", 0, slice(4, 8))])
    expected = start.lerp(online, 1 - model.momentum)
    torch.testing.assert_close(model.vision_proj_m.weight, expected, rtol=0, atol=1e-7)
    assert temperatures == pytest.approx([0.5, 0.9])
