"""Checkpoints: written whole or not at all, and read back to continue bit for bit."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import write_whole
from launch.run import LAST
from models.weights import refuse_compressed
from utils import UserError, all_gather_object, barrier, get_rank, get_world_size, on_main_process


def save_atomic(content: Any, path: Path) -> None:
    """Save with torch under a temporary name, then rename, so that `path` is always a whole file.

    Raises:
        UserError: it could not be written (a full disk); an earlier file of that name is untouched.
    """
    with write_whole(path, "wb") as file:
        torch.save(content, file)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's random numbers, as tensors and plain numbers."""
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
    """Continue this process's random numbers from a state that `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save_last(folder: Path, content: dict[str, Any], device: torch.device) -> None:
    """Save the checkpoint a run continues from; all ranks call it and all fail together."""
    rngs = all_gather_object(rng_state(device))
    on_main_process(lambda: save_atomic({**content, "rng": rngs}, folder / LAST))


def load_last(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint to continue from, and take up its random numbers.

    Raises:
        UserError: none there, damaged, not from this engine, or of another number of processes.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; leave out --resume to start a run, or correct --output_dir")
    refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
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
