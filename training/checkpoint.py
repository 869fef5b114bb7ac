"""Checkpoints of a run: the last, which continues it (on CPUs bit for bit), and the best weights."""

import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import write_whole
from launch.run import BEST, LAST, Run
from launch.settings_file import save_config
from models.weights import refuse_compressed
from training import adapters, parallel
from training.progress import Progress
from training.state import TrainState
from utils import UserError, all_gather_object, barrier, get_rank, get_world_size, on_main_process


def save_atomic(content: Any, path: Path) -> None:
    """Save with torch; an error leaves an earlier file of that name untouched, as `write_whole`."""
    with write_whole(path, "wb") as file:
        torch.save(content, file)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's random number generators, as tensors and plain numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set this process's random number generators to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save_last(folder: Path, content: dict[str, Any], device: torch.device) -> None:
    """Save a checkpoint to continue from; all ranks call it and all fail together."""
    rngs = all_gather_object(rng_state(device))
    on_main_process(lambda: save_atomic({**content, "rng": rngs}, folder / LAST))


def save(state: TrainState, run: Run) -> None:
    """Save what continuing the run needs; all ranks call it. A bad step is raised before anything is written."""
    state.check.read()
    run.watchdog.enter("saving", state.progress.step)
    content = {
        "model": parallel.full_state(state.model),
        "optimizer": parallel.full_optimizer_state(state.model, state.optimizer),
        "scaler": state.scaler.state_dict(),
        "config": asdict(state.config),
        "epoch": state.progress.epoch,
        "progress": asdict(state.progress),
        "meters": state.log.state(),
        "best": state.best,
    }
    save_last(run.output_dir, content, run.device)


def save_best(state: TrainState, run: Run) -> None:
    """Save the weights with their config and epoch, and of a model with adapters the adapters alone too."""
    weights = adapters.merged_state(state.model, state.config)
    content = {"model": weights, "config": asdict(state.config), "epoch": state.progress.epoch}
    on_main_process(lambda: save_atomic(content, run.output_dir / BEST))
    if state.config.adapter_rank:
        content = adapters.adapter_file(state.model, state.config)
        on_main_process(lambda: save_atomic(content, run.output_dir / adapters.FILE))


def load_last(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint to continue from and set the random number generators to it; UserError if it does not fit."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; leave out --resume to start a run, or correct --output_dir")
    refuse_compressed(path)
    try:
        # Windows cannot replace a file that is mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=sys.platform != "win32")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); start from another checkpoint") from None
    if not isinstance(content, dict) or not isinstance(content.get("rng"), list):
        raise UserError(f"{path} holds weights but no state of a run; give it as --set pretrained={path} instead")
    if len(content["rng"]) != get_world_size():
        raise UserError(
            f"{path} was written by {len(content['rng'])} processes and this run has {get_world_size()}; "
            f"start as many, or begin a new run with --set pretrained={path}"
        )
    try:
        set_rng_state(content["rng"][get_rank()], device)
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); start from another checkpoint") from None
    barrier()
    return content


def check_space(state: TrainState, folder: Path) -> None:
    """Check that the disk takes the last checkpoint, the one that replaces it, and the best weights; else UserError."""
    weights = sum(x.numel() * x.element_size() for x in (*state.model.parameters(), *state.model.buffers()))
    moments = sum(2 * p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
    written = sum(path.stat().st_size for path in (folder / LAST, folder / BEST) if path.is_file())
    needed, free = 2 * (weights + moments) + weights - written, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"checkpoints need {needed / 1e9:.3g} GB more in {folder}, and {free / 1e9:.3g} are free; free space, or "
            "choose another --output_dir"
        )


def restore(state: TrainState, run: Run, path: Path) -> None:
    """Continue from a checkpoint that `save` wrote; UserError if it holds another model or other trained parts."""
    content = load_last(path, run.device)
    saved = Progress(**content["progress"])
    note_changes(run, content["config"], asdict(state.config))
    try:
        parallel.load_full_state(state.model, content["model"])
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds another model ({problem}); continue with the run's own config") from None
    load_optimizer(state, content["optimizer"], path)
    state.scaler.load_state_dict(content.get("scaler") or state.scaler.state_dict())
    state.progress.continue_from(saved)
    state.best = content["best"]
    state.log.load_state(content["meters"])
    run.trim_log(lambda row: row["epoch"] < saved.epoch)
    run.trim_log(lambda row: row["step"] <= saved.step, "curve.jsonl")
    on_main_process(lambda: save_config(state.config, run.output_dir / "config.yaml"))
    run.print(f"continuing from {path}: epoch {saved.epoch}, step {state.progress.step}")


def note_changes(run: Run, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Print every setting that differs from the checkpoint's."""
    for key, value in config.items():
        if key in saved and saved[key] != value:
            run.note(f"changed since the checkpoint: {key} from {saved[key]!r} to {value!r}")


def load_optimizer(state: TrainState, saved: dict[str, Any], path: Path) -> None:
    """Load the optimizer's moments; its settings, such as weight_decay, stay those of the config."""
    scheduled = ("params", "lr")  # the schedule sets the learning rate at each step
    settings = [{k: v for k, v in group.items() if k not in scheduled} for group in state.optimizer.param_groups]
    try:
        parallel.load_full_optimizer_state(state.model, state.optimizer, saved)
    except (LookupError, RuntimeError, ValueError):
        raise UserError(
            f"{path} has trained other parts of the model; continue with its own freeze and adapter settings, "
            f"or begin a new run with --set pretrained={path}"
        ) from None
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
