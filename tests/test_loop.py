"""The training loop on a toy: accumulation, clipping, bad losses, processes, buffers."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import create_loader, create_sampler
from launch.config import TrainConfig
from launch.run import Run
from processes import run_in_processes
from training.loop import fit
from utils import UserError

CPU = torch.device("cpu")


class Points(Dataset):
    """Points on a plane with their targets."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x = torch.tensor([index / 16, (index * 7 % 16) / 16])
        return {"x": x, "y": 3 * x.sum() + 1}


class Toy(nn.Module):
    """A linear map with a buffer that starts differently on every rank."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("queue", torch.rand(3))
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def forward(self, x):
        return self.linear(x)[:, 0]


def loader(batch_size, rank=0, world_size=1) -> DataLoader:
    samplers = create_sampler([Points()], [True], world_size, rank, 1)
    return create_loader([Points()], samplers, [batch_size], [0], [True], [None])[0]


def train_step(model, batch, progress):
    return {"loss_mse": (model(batch["x"]) - batch["y"]).pow(2).mean()}


def trained(folder, batch_size, rank=0, world_size=1, step=train_step, **values):
    config = TrainConfig(**{"init_lr": 0.1, "max_epoch": 2, "num_workers": 0, "log_every": 1, **values})
    folder.mkdir(exist_ok=True)
    model = Toy()
    fit(Run(folder, CPU), config, model, loader(batch_size, rank, world_size), step)
    return {name: value.clone() for name, value in model.state_dict().items()}


def close(mine, theirs):
    return all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in ("linear.weight", "linear.bias"))


def test_accumulated_batches_equal_a_large_one(tmp_path):
    assert close(trained(tmp_path / "a", 4, grad_accum=2), trained(tmp_path / "b", 8))
    assert not close(trained(tmp_path / "c", 4), trained(tmp_path / "d", 8))


def rank_trained(rank, world_size, folder):
    torch.manual_seed(rank)
    return trained(folder / f"rank{rank}", 4, rank, world_size)


def test_two_processes_equal_one(tmp_path):
    first, second = run_in_processes(rank_trained, 2, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first), "buffers too"
    assert close(first, trained(tmp_path / "one", 8))
    rows = [json.loads(line) for line in (tmp_path / "rank0/curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and not (tmp_path / "rank1/curve.jsonl").exists()


def test_clipping_is_asked_for(tmp_path, monkeypatch):
    limits = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda params, limit: limits.append(limit) or clip(params, limit))
    trained(tmp_path / "a", 8, clip_grad=0.5)
    assert limits == [0.5] * 4
    trained(tmp_path / "b", 8)
    assert limits == [0.5] * 4


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    seen = []

    def step(model, batch, progress):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        loss = train_step(model, batch, progress)["loss_mse"]
        return {"loss_a": loss, "loss_b": loss * (float("nan") if progress.step == 2 else 1.0)}

    with pytest.raises(UserError, match="loss_b is nan on rank 0 at step 2; the weights were left as they were"):
        trained(tmp_path, 8, step=step)
    assert len(seen) == 3


def bad_on_rank_one(rank, world_size, folder):
    def step(model, batch, progress):
        loss = train_step(model, batch, progress)["loss_mse"]
        return {"loss_mse": loss * float("inf") if rank == 1 and progress.step == 1 else loss}

    try:
        trained(folder / f"rank{rank}", 4, rank, world_size, step=step)
    except UserError as error:
        return str(error)
    return "no error"


def test_all_ranks_hear_of_a_bad_loss(tmp_path):
    told = run_in_processes(bad_on_rank_one, 2, tmp_path)
    assert told[0] == told[1] and "loss_mse is inf on rank 1 at step 1" in told[0]


def test_too_few_data(tmp_path):
    with pytest.raises(UserError, match="the training data fill 0 batches and a step needs 1"):
        trained(tmp_path, 32)


def test_wrong_settings(tmp_path):
    with pytest.raises(UserError, match="schedule is 'weekly'; expected 'epoch' or 'step'"):
        trained(tmp_path / "a", 8, schedule="weekly")
    with pytest.raises(UserError, match="amp is 'fp16'; expected 'bf16'"):
        trained(tmp_path / "b", 8, amp="fp16")


def test_the_watchdog_is_told_of_every_phase(tmp_path):
    run, told = Run(tmp_path, CPU), []
    run.watchdog.enter = lambda phase, step: told.append((phase, step))
    config = TrainConfig(init_lr=0.1, max_epoch=1, num_workers=0)
    fit(run, config, Toy(), loader(8), train_step, lambda model: {"val_a": 1.0})
    assert told == [
        ("data loading", 0), ("a step", 0), ("data loading", 1), ("a step", 1),
        ("saving", 2), ("evaluation", 2), ("saving", 2), ("the report", 2),
    ]  # fmt: skip
