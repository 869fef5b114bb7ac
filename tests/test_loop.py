"""The training loop on a toy: accumulation, clipping, bad losses, processes, buffers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import make_loader
from launch.config import TrainConfig
from launch.run import Run
from launch.settings_file import load_config
from processes import run_in_processes
from training import loop
from training.checkpoint import restore
from training.loop import Task, fit, take_step
from training.state import create_state
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
    return make_loader(Points(), batch_size, True, seed=1, processes=(world_size, rank))


def train_step(model, batch, progress):
    return {"loss_mse": (model(batch["x"]) - batch["y"]).pow(2).mean()}


def trained(folder, batch_size, rank=0, world_size=1, step=train_step, **values):
    config = TrainConfig(**{"init_lr": 0.1, "max_epoch": 2, "num_workers": 0, "log_every": 1, **values})
    folder.mkdir(exist_ok=True)
    model = Toy()
    fit(Run(folder, CPU), config, model, loader(batch_size, rank, world_size), Task(step))
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


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_to_the_limit(tmp_path, limit):
    norms, toy = [], Toy()
    config = TrainConfig(init_lr=0.1, max_epoch=1, num_workers=0, log_every=1, clip_grad=limit)
    state = create_state(Run(tmp_path, CPU), config, toy, 2)
    state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in toy.parameters()]).norm().item())
    )
    values = take_step(state, Task(train_step), [next(iter(loader(8)))])
    assert values["grad_norm"] > 1
    assert norms == pytest.approx([min(limit, values["grad_norm"].item()) if limit else values["grad_norm"].item()])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    seen = []

    def step(model, batch, progress):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        loss = train_step(model, batch, progress)["loss_mse"]
        return {"loss_a": loss, "loss_b": loss * (float("nan") if progress.step == 2 else 1.0)}

    with pytest.raises(UserError, match="loss_b is nan on rank 0 at step 2; the weights were left as they were"):
        trained(tmp_path, 8, step=step)
    assert len(seen) == 3


def faulty(fault, at, ranks=(0,), rank=0):
    """A training step that goes wrong at one step."""

    def step(model, batch, progress):
        loss = train_step(model, batch, progress)["loss_mse"]
        if progress.step != at or rank not in ranks:
            return {"loss_mse": loss}
        if fault == "nan loss":
            return {"loss_mse": loss * float("nan")}
        # a finite loss whose gradient is infinite
        return {"loss_mse": loss + torch.sqrt(model(batch["x"] * 0).sum() * 0)}

    return step


def run_with_fault(folder, fault, late, rank=0, world_size=1, **values):
    """Train a toy with a fault at step 7; the message, whether the weights stayed, the checkpoint's step."""
    folder.mkdir(exist_ok=True)
    config = TrainConfig(init_lr=0.01, max_epoch=30, num_workers=0, log_every=50, **values)
    model = Toy()
    kept, loop.READ_EVERY_STEP = loop.READ_EVERY_STEP, () if late else ("cpu",)
    before = {}

    def step(wrapped, batch, progress):
        if progress.step == 7:
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return faulty(fault, 7, ranks=(world_size - 1,), rank=rank)(wrapped, batch, progress)

    try:
        with pytest.raises(UserError) as error:
            fit(Run(folder, CPU), config, model, loader(2, rank, world_size), Task(step))
    finally:
        loop.READ_EVERY_STEP = kept
    same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    last = folder / "checkpoint_last.pth"
    return str(error.value), same, torch.load(last)["progress"]["step"] if last.exists() else 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fault, told", [("nan loss", "loss_mse is nan"), ("infinite gradient", "gradient norm is")])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_bad_step_stops_the_run_with_the_weights_before_it(tmp_path, fault, told, late, clip_grad):
    """Also where it is read long after it, as on a GPU, at a step when the losses are finite again."""
    message, same, saved = run_with_fault(tmp_path, fault, late, clip_grad=clip_grad)
    assert told in message and "at step 7; the weights were left as they were before it" in message
    assert same and saved == 0


def fault_on_one_rank(rank, world_size, folder, fault, late):
    return run_with_fault(folder / f"rank{rank}", fault, late, rank, world_size)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fault", ["nan loss", "infinite gradient"])
def test_a_bad_step_of_one_rank_stops_both(tmp_path, fault, late):
    first, second = run_in_processes(fault_on_one_rank, 2, tmp_path, fault, late)
    assert first[0] == second[0] and "at step 7" in first[0] and first[1] and second[1] and first[2] <= 7
    assert "on rank 1" in first[0] if fault == "nan loss" else "gradient norm" in first[0]


def one_bad_batch(rank, world_size, folder):
    model, config = Toy(), TrainConfig(init_lr=0.01, max_epoch=2, num_workers=0)
    folder = folder / f"rank{rank}"
    folder.mkdir()
    inspect = lambda batch: "rank 1: too many bad images" if rank == 1 else ""  # noqa: E731
    try:
        fit(Run(folder, CPU), config, model, loader(4, rank, world_size), Task(train_step, inspect_batch=inspect))
    except UserError as error:
        return str(error)


def test_a_problem_of_one_rank_ends_all(tmp_path):
    assert run_in_processes(one_bad_batch, 2, tmp_path) == ["rank 1: too many bad images"] * 2


def test_the_momentum_moves_once_per_step_of_accumulated_batches(tmp_path):
    calls = []
    toy = Toy()
    toy.begin_step = lambda: calls.append("begin")
    config = TrainConfig(init_lr=0.1, max_epoch=1, num_workers=0, grad_accum=2)
    fit(Run(tmp_path, CPU), config, toy, loader(4), Task(train_step))
    assert calls == ["begin"] * 2


def test_fp16_skips_steps_whose_gradients_overflow(tmp_path):
    config = TrainConfig(init_lr=0.1, max_epoch=1, num_workers=0, amp="fp16")
    toy = Toy()
    state = create_state(Run(tmp_path, CPU), config, toy, 2)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    batch, before = next(iter(loader(8))), {k: v.clone() for k, v in toy.state_dict().items()}
    assert take_step(state, Task(train_step), [batch])["grad_norm"] == 0.0  # infinity would stay in the epoch's mean
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())
    assert state.scaler.get_scale() == 2.0**126 and not state.check.read()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    take_step(state, Task(train_step), [batch])
    assert not torch.equal(toy.linear.weight, before["linear.weight"])


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
    with pytest.raises(UserError, match="amp is 'int8'; expected 'bf16'"):
        trained(tmp_path / "b", 8, amp="int8")


def test_the_watchdog_is_told_of_every_phase(tmp_path):
    run, told = Run(tmp_path, CPU), []
    run.watchdog.enter = lambda phase, step: told.append((phase, step))
    config = TrainConfig(init_lr=0.1, max_epoch=1, num_workers=0)
    fit(run, config, Toy(), loader(8), Task(train_step, lambda model: {"val_a": 1.0}))
    assert told == [
        ("data loading", 0), ("a step", 0), ("data loading", 1), ("a step", 1),
        ("saving", 2), ("evaluation", 2), ("saving", 2), ("the report", 2),
    ]  # fmt: skip


def resumed(folder, batch_size, stop=4, **changed):
    """Train a toy for some steps, 4 an epoch, and continue with other settings; the run, its start, learning rates."""
    folder.mkdir(exist_ok=True)
    base = dict(init_lr=0.1, max_epoch=3, num_workers=0, log_every=1, schedule="step", weight_decay=0.05, save_every=1)

    def train(config, size, step, resume=None):
        run = Run(folder, CPU, resume=resume)
        state = {}

        def keep(model, batch, progress):
            state.setdefault("progress", replace(progress))
            return step(model, batch, progress)

        fit(run, TrainConfig(**config), Toy(), loader(size), Task(keep))
        return run, state["progress"]

    def stopping(model, batch, progress):
        if progress.step == stop:
            raise KeyboardInterrupt
        return train_step(model, batch, progress)

    with pytest.raises(KeyboardInterrupt):
        train(base, 4, stopping)
    (folder / "curve.jsonl").unlink()
    run, first = train({**base, **changed}, batch_size, train_step, folder / "checkpoint_last.pth")
    rates = [json.loads(line)["train_lr"] for line in (folder / "curve.jsonl").read_text().splitlines()]
    return run, first, rates


@pytest.mark.parametrize(("batch_size", "stop"), [(4, 4), (2, 4), (8, 4), (2, 6), (8, 6)])
def test_18_a3_a_schedule_by_step_ends_at_its_end_whatever_the_batch_size(tmp_path, batch_size, stop):
    _, first, rates = resumed(tmp_path / "a", batch_size, stop)
    steps = 16 // batch_size
    assert (first.epoch, first.step_in_epoch) == (stop // 4, stop % 4 * steps // 4)
    assert first.step == stop * steps // 4
    assert rates == sorted(rates, reverse=True) and len(rates) == 3 * steps - first.step
    assert rates[-1] < 0.1 * 0.1 or batch_size == 8
    assert rates[0] == pytest.approx(0.05 * (1 + math.cos(math.pi * stop / 12)), rel=1e-4)


def test_18_a3_settings_of_the_optimizer_come_from_the_config_and_changes_are_told(tmp_path, capsys):
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append((self.param_groups[0]["weight_decay"], len(self.state)))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        run, *_ = resumed(tmp_path / "a", 4, weight_decay=0.2, max_epoch=2)
    assert {decay for decay, _ in seen} == {0.05, 0.2} and seen[-1] == (0.2, 2)
    assert seen[4][1] == 2  # the moments were loaded before the first step
    assert run.notes == [
        "changed since the checkpoint: weight_decay from 0.05 to 0.2",
        "changed since the checkpoint: max_epoch from 3 to 2",
    ]
    saved = load_config(TrainConfig, tmp_path / "a" / "config.yaml")
    assert (saved.weight_decay, saved.max_epoch, saved.schedule) == (0.2, 2, "step")


def test_18_a3_other_trained_parts_are_refused(tmp_path):
    trained(tmp_path / "a", 4)
    run, model = Run(tmp_path / "a", CPU), Toy()
    model.linear.bias.requires_grad_(False)
    state = create_state(run, TrainConfig(num_workers=0), model, 4)
    with pytest.raises(UserError, match="has trained other parts of the model; continue with its own freeze"):
        restore(state, run, tmp_path / "a" / "checkpoint_last.pth")


def test_18_a3_nothing_is_told_where_nothing_changed(tmp_path):
    run, *_ = resumed(tmp_path / "a", 4)
    assert run.notes == []
