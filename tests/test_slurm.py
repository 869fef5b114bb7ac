"""The SLURM example: it goes on where there is something to go on with, and requeues itself when its time is up."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from launch.run import _slurm_to_torchrun

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
    _slurm_to_torchrun()
    assert [os.environ[name] for name in names] == ["9", "16", "1", "first", "23456"]


def test_a_run_that_fails_fails(submit, tmp_path):
    done, calls = submit(2, "pretrain.py", "--output_dir", str(tmp_path))
    assert done.returncode == 2 and len(calls) == 1
    done, _ = submit(0, "pretrain.py")
    assert done.returncode == 2 and "no --output_dir among the arguments" in done.stderr
