"""The SLURM example: it goes on where there is something to go on with, and requeues itself when its time is up."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "slurm.sh"


@pytest.fixture
def submit(tmp_path):
    """Run the example with stand-ins for srun and scontrol, which note how they were called."""
    for name, code in (("srun", "exit ${STEP_CODE}"), ("scontrol", "exit 0")):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{code}\n')
        stub.chmod(0o755)

    def run(step_code, *arguments):
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STEP_CODE": str(step_code)}
        env["SLURM_JOB_ID"] = "77"
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


def test_a_run_that_fails_fails(submit, tmp_path):
    done, calls = submit(2, "pretrain.py", "--output_dir", str(tmp_path))
    assert done.returncode == 2 and len(calls) == 1
    done, _ = submit(0, "pretrain.py")
    assert done.returncode == 2 and "no --output_dir among the arguments" in done.stderr
