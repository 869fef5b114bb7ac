"""The SLURM example: it goes on where there is something to go on with, and requeues itself when its time is up."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from launch.run import choose_device, join_process_group, slurm_to_torchrun
from utils import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "slurm.sh"


@pytest.fixture
def submit(tmp_path):
    """Run the example with stand-ins for srun and scontrol, which note how they were called."""
    for name, code in (("srun", "exit ${STEP_CODE}"), ("scontrol", "exit 0")):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{code}\n')
        stub.chmod(0o755)

    def run(step_code, *arguments, **more):
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STEP_CODE": str(step_code)}
        env |= {"SLURM_JOB_ID": "77"} | more
        done = subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, calls

    return run


def test_a_finished_run_is_not_requeued(submit, tmp_path):
    done, calls = submit(0, "pretrain.py", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0
    assert calls == [f"srun --kill-on-bad-exit=0 python pretrain.py --output_dir {tmp_path}/out"]


def test_a_run_whose_time_is_up_is_requeued_and_goes_on(submit, tmp_path):
    done, calls = submit(143, "pretrain.py", "--output_dir", str(tmp_path))
    assert done.returncode == 0 and calls[1] == "scontrol requeue 77"
    (tmp_path / "checkpoint_last.pth").touch()
    _, calls = submit(0, "pretrain.py", "--output_dir", str(tmp_path))
    assert calls[2].endswith("--resume") and len(calls) == 3


def test_an_evaluation_that_outlasts_the_time_is_requeued(submit, tmp_path):
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho srun >> {tmp_path}/calls\nexec sleep 60\n")
    done, calls = submit(0, "pretrain.py", "--output_dir", str(tmp_path), SLURM_JOB_END_TIME=str(int(time.time()) + 61))
    assert done.returncode == 0 and calls == ["srun", "scontrol requeue 77"]


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (2, 0), (143, 1)])
def test_a_run_that_ends_before_its_time_is_judged_by_its_code(submit, tmp_path, code, requeued):
    later = str(int(time.time()) + 999)
    _, calls = submit(code, "pretrain.py", "--output_dir", str(tmp_path), SLURM_JOB_END_TIME=later)
    assert len(calls) == 1 + requeued


def test_tasks_of_several_nodes_find_each_other(monkeypatch, tmp_path):
    """Rank, number of processes and GPU come from SLURM; the first node's name from scontrol."""
    stub = tmp_path / "scontrol"
    stub.write_text("#!/bin/sh\necho first\necho second\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in names})
    os.environ |= {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    slurm_to_torchrun()
    assert [os.environ[name] for name in names] == ["9", "16", "1", "first", "23456"]


def test_a_run_that_fails_fails(submit, tmp_path):
    done, calls = submit(2, "pretrain.py", "--output_dir", str(tmp_path))
    assert done.returncode == 2 and len(calls) == 1
    done, _ = submit(0, "pretrain.py")
    assert done.returncode == 2 and "no --output_dir among the arguments" in done.stderr


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that a number of GPUs is visible; yields the devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    def see(count, local_rank):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    see.current = current
    return see


@pytest.mark.parametrize(("count", "local_rank", "index"), [(1, 0, 0), (1, 1, 0), (1, 3, 0), (8, 3, 3)])
def test_17_11_the_local_rank_stays_within_the_visible_gpus(gpus, capfd, count, local_rank, index):
    gpus(count, local_rank)
    assert choose_device("") == torch.device("cuda", index) == gpus.current[-1]
    told = "LOCAL_RANK is 1 with 1 visible GPU; this rank uses cuda:0\n" if (count, local_rank) == (1, 1) else ""
    assert capfd.readouterr().err == told


def test_17_11_the_process_group_gets_its_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {}
    note = lambda backend, **more: found.update(more, backend=backend)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", note)
    met = [(torch.distributed.HashStore(), 0, 2)]
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **more: iter(met))
    join_process_group(torch.device("cuda", 3), 15.0)
    assert (found["backend"], found["device_id"]) == ("nccl", torch.device("cuda", 3))
    join_process_group(torch.device("cpu"), 15.0)
    assert (found["backend"], found["device_id"]) == ("gloo", None)


def test_18_e_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set, but .*variable RANK expected.*; start the script with tor"):
        join_process_group(torch.device("cpu"), 15.0)


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda"])
def test_18_e_a_device_that_is_absent_is_refused(name):
    if torch.get_device_module(name).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UserError, match=f"--device is '{name}', and PyTorch finds no such device; use --device cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "7"])
def test_18_e_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=f"--device is '{name}'; expected cuda"):
        choose_device(name)


def test_18_f_mps_can_be_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")
