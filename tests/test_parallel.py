"""`parallel: fsdp` against `ddp`: losses, gradients, weights and checkpoints of every task, on two processes."""

from types import SimpleNamespace

import pytest
import torch
from test_compile import TASKS

from engine import parallel
from engine.loop import prepare_model
from engine.optim import create_optimizer
from formula import arr, build
from processes import run_in_processes

CPU = torch.device("cpu")
RETRIEVAL = {"negative_all_rank": True}


def losses_of(kind, model, rank, step):
    """Each rank's own pictures, and the task's losses."""
    image = arr(f"parallel{step}", (8, 3, 48, 48))[4 * rank : 4 * rank + 4]
    original = TASKS[kind].__globals__["img"]
    TASKS[kind].__globals__["img"] = lambda name, batch=2: image[2:] if name.endswith("2") else image[:2]
    try:
        return TASKS[kind](model)
    finally:
        TASKS[kind].__globals__["img"] = original


def start(kind, how, **options):
    model = build(kind, **(RETRIEVAL if kind == "retrieval" else {}), **options)
    model.train()
    for part in model.modules():  # what is random differs between processes; everything else must not
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    config = SimpleNamespace(compile=False, get=lambda key, default: options.get("vit_grad_ckpt", default))
    model = prepare_model(model, config, SimpleNamespace(device=CPU))
    wrapped = parallel.wrap(model, how, CPU)
    return model, wrapped, create_optimizer(model, 1e-3, 0.05)


def take_steps(kind, model, wrapped, optimizer, rank, steps, clip=0.0):
    rows, grads = [], {}
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        losses = losses_of(kind, wrapped, rank, step)
        sum(losses).backward()
        parallel.finish_gradients(model, clip)
        grads = {name: parallel._whole(p.grad, None).clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        rows.append([loss.item() for loss in losses])
    return rows, grads


def trained(rank, world_size, kind, options, clip):
    found = []
    for how in ("ddp", "fsdp"):
        model, wrapped, optimizer = start(kind, how, **options)
        rows, grads = take_steps(kind, model, wrapped, optimizer, rank, range(2), clip)
        state = {name: value.clone() for name, value in parallel.full_state(model).items()}
        assert parallel.is_sharded(model) == (how == "fsdp")
        found.append((rows, grads, state))
    return found


CHECKPOINTED = {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}


@pytest.mark.parametrize(
    ("kind", "options", "clip"),
    [("decoder", CHECKPOINTED, 0.5), ("vqa", {}, 0.0), ("nlvr", {}, 0.0), ("retrieval", {}, 0.0)]
    + [("pretrain", {}, 0.0), ("pretrain", CHECKPOINTED, 0.5)],
)
def test_shards_train_as_whole_copies_do(kind, options, clip):
    for whole, shards in run_in_processes(trained, 2, kind, options, clip):
        torch.testing.assert_close(torch.tensor(shards[0]), torch.tensor(whole[0]), atol=1e-5, rtol=1e-5)
        (_, shard_grads, shard_state), (_, grads, state) = shards, whole
        assert shard_grads.keys() == grads.keys() and shard_state.keys() == state.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(shard_grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)
        for name, value in state.items():  # AdamW makes steps of its full size out of gradients that only round
            if name.endswith("key.bias"):  # softmax does not see a key's bias: all its gradient is rounding
                continue
            clear = grads[name].abs() > 1e-4 if name in grads else torch.ones_like(value, dtype=torch.bool)
            torch.testing.assert_close(shard_state[name][clear], value[clear], atol=1e-4, rtol=1e-3, msg=name)


def resumed(rank, world_size, first, then, folder):
    """The second step's losses and optimizer, uninterrupted and after changing over between two steps."""
    model, wrapped, optimizer = start("pretrain", first)
    take_steps("pretrain", model, wrapped, optimizer, rank, [0])
    state = {name: value.clone() for name, value in parallel.full_state(model).items()}
    content = {"model": state, "optimizer": parallel.full_optimizer_state(model, optimizer)}
    torch.save(content, folder / f"{rank}.pth")
    whole = take_steps("pretrain", model, wrapped, optimizer, rank, [1])[0]
    content = torch.load(folder / f"{rank}.pth", weights_only=True)
    model, wrapped, optimizer = start("pretrain", then)
    parallel.load_full_state(model, content["model"])
    parallel.load_full_optimizer_state(model, optimizer, content["optimizer"])
    kept = parallel.full_optimizer_state(model, optimizer)["state"]
    same = all(torch.equal(kept[i][k], v) for i, row in content["optimizer"]["state"].items() for k, v in row.items())
    again = take_steps("pretrain", model, wrapped, optimizer, rank, [1])[0]
    plain = parallel.plain(model)
    text = plain.text_decoder
    tied = text.cls["predictions"].decoder.weight.data_ptr() == text.bert.embeddings.word_embeddings.weight.data_ptr()
    return whole, again, same, tied, len(kept)


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_each_way_continues_the_other(first, then, tmp_path):
    for whole, again, same, tied, count in run_in_processes(resumed, 2, first, then, tmp_path):
        assert same and tied and count > 10
        torch.testing.assert_close(torch.tensor(again), torch.tensor(whole), atol=1e-5, rtol=1e-5)
