"""Two machines, as two torchrun agents with a common rendezvous: one is lost with its process, and comes back."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from scripts import ROOT, TINY, environment, kill_family, lines, run, settings

from data.miniature import write_miniature
from engine.rendezvous import agree
from utils import UserError

LAUNCH = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d",
          "--rdzv_id=one-run", "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=2"]  # fmt: skip

# Else torchrun tells an agent that joins a second start nothing of the store, and it gives up after a minute.
ENVIRONMENT = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def arguments(tmp_path):
    world = write_miniature(tmp_path / "world", 1, num_train=6, num_val=2, num_test=2, num_web=0)
    pairs = f"[{world / 'annotations' / 'pretrain_human.json'}]"
    more = settings(image_root=world, train_file=pairs, batch_size=2, queue_size=16, save_every=1, log_every=1)
    return ["--config", "configs/miniature/pretrain.yaml", *(x for value in TINY for x in ("--set", value)), *more]


@pytest.fixture
def node(arguments, tmp_path):
    """Start an agent of a run, with its process."""
    started, port = [], free_port()

    def start():
        launch = [sys.executable, *LAUNCH, f"--rdzv_endpoint=127.0.0.1:{port}", ROOT / "pretrain.py", *arguments]
        output = open(tmp_path / f"{len(started)}.log", "w")  # noqa: SIM115
        command = [*map(str, launch), "--output_dir", str(tmp_path / "broken")]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill_family(process.pid)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_node_is_lost_and_comes_back(arguments, node, tmp_path):
    """The untouched run is one of two processes on one machine."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("pretrain.py", *arguments, "--output_dir", whole, processes=2)
    first = node()
    time.sleep(0.5)  # it holds the rendezvous
    lost = node()
    wait_for(lambda: lines(broken / "curve.jsonl") >= 3)
    kill_family(lost.pid)
    lost.wait()
    back = node()
    assert [agent.wait(120) for agent in (first, back)] == [0, 0]
    told = "".join((tmp_path / f"{number}.log").read_text() for number in range(3))
    assert "lost another process" in told or "ended or was killed" in told
    assert "continuing from" in told
    one, other = (torch.load(f / "checkpoint_last.pth", weights_only=True)["model"] for f in (whole, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "curve.jsonl").read_text() == (broken / "curve.jsonl").read_text()


STARTED_TWICE = """
import os
import sys
from datetime import timedelta
import torch.distributed as dist
from engine.rendezvous import join_group
join_group("gloo", timedelta(seconds=60))
number = dist.distributed_c10d._get_default_store().add("counter", 1)
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(3)
open(f"{sys.argv[1]}/{dist.get_rank()}", "w").write(str(number))
"""


def test_processes_that_torchrun_starts_again_find_an_empty_store(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STARTED_TWICE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    command = [sys.executable, *launch, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"1", "2"}


def test_processes_agree_on_a_name_of_each_start():
    """Two starts of three processes on one store, which keeps the keys of the first, and of one that never began."""
    store, barrier, limit = torch.distributed.HashStore(), threading.Barrier(3), timedelta(seconds=20)

    def start(rank):
        found = []
        for _ in range(2):
            found.append(agree(store, rank, 3, limit))
            barrier.wait()
        return found

    store.set("asks/1", "stale")
    store.set("answer/2", "stale start-0")
    with ThreadPoolExecutor(3) as pool:
        one, other, third = pool.map(start, range(3))
    assert one == other == third and one[0] != one[1] and "start-0" not in one
    with pytest.raises(UserError, match="rank 2 of 3 waited 0:00:00.050000 for the other processes"):
        agree(store, 2, 3, timedelta(milliseconds=50))
