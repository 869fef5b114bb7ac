"""Checkpoints: whole or not at all."""

import os
import random
import resource

import numpy as np
import pytest
import torch

from files import write_whole
from processes import run_in_processes
from training.checkpoint import load_last, rng_state, save_atomic, save_last, set_rng_state
from utils import UserError

CPU = torch.device("cpu")


def full_disk(rank, world_size, folder):
    """Save a small file, then a large one where no file may be larger than 1 MB; return what was said."""
    save_atomic({"epoch": 1}, folder / "a.pth")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    told = []
    for name in ("a.pth", "b.pth"):
        try:
            save_atomic({"epoch": 2, "large": torch.zeros(1 << 20)}, folder / name)
        except UserError as error:
            told.append(str(error))
    return told


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    (told,) = run_in_processes(full_disk, 1, tmp_path)
    assert "a.pth could not be written (the disk is full" in told[0] and "previous one is intact" in told[0]
    assert "b.pth" in told[1] and "nothing was left behind" in told[1]
    assert torch.load(tmp_path / "a.pth") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_other_errors_are_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="File exists|Not a directory"):
        save_atomic({}, tmp_path / "file" / "a.pth")


def test_random_numbers_continue():
    state = rng_state(CPU)
    drawn = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    set_rng_state(state, CPU)
    assert [torch.rand(3).tolist(), random.random(), np.random.rand()] == drawn


def test_a_checkpoint_continues(tmp_path):
    save_last(tmp_path, {"epoch": 3}, CPU)
    drawn = torch.rand(2)
    assert load_last(tmp_path / "checkpoint_last.pth", CPU)["epoch"] == 3
    assert torch.equal(torch.rand(2), drawn)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="leave out --resume"):
        load_last(tmp_path / "none.pth", CPU)
    (tmp_path / "bad.pth").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        load_last(tmp_path / "bad.pth", CPU)
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds weights but no state of a run"):
        load_last(tmp_path / "weights.pth", CPU)
    torch.save({"rng": [1, 2]}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="written by 2 processes and this run has 1"):
        load_last(tmp_path / "two.pth", CPU)


def killed_while_writing(rank, world_size, folder):
    pid = os.fork()
    if pid == 0:
        with write_whole(folder / "a.pth", "wb") as file:
            file.write(b"half")
            os._exit(0)  # as SIGKILL: nothing is cleaned up
    os.waitpid(pid, 0)


def test_what_a_killed_process_left_half_written_is_replaced(tmp_path):
    """Or each kill would leave a file as large as a checkpoint behind."""
    run_in_processes(killed_while_writing, 1, tmp_path)
    save_atomic({"epoch": 1}, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.glob("a.pth*")] == ["a.pth"]
