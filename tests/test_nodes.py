"""Two machines, as two torchrun agents with a common rendezvous: one is lost with its process, and comes back."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from scripts import ROOT, TINY, environment, kill_family, lines, settings

from launch.rendezvous import agree, join_group, started_before, was_restarted
from miniature.writing import write_miniature
from processes import run_agent, run_script, start
from utils import UserError

AGENT = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=one-run",
         "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3"]  # fmt: skip
# Else torchrun tells an agent that joins a second start nothing of the store, and it gives up after a minute.
ENVIRONMENT = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def arguments(tmp_path):
    world = write_miniature(tmp_path / "world", 1, num_train=6, num_val=2, num_test=2, num_web=0)
    pairs = f"[{world / 'annotations' / 'pretrain_human.json'}]"
    more = settings(image_root=world, train_file=pairs, batch_size=2, queue_size=16, save_every=1, log_every=1)
    return ["--config", "configs/miniature/pretrain.yaml", *(x for value in TINY for x in ("--set", value)), *more]


def train(words, log):
    """The agent's process."""
    try:
        run_script(words, log, ENVIRONMENT)
    except SystemExit as end:
        if end.code:
            os._exit(end.code)


@pytest.fixture
def node(arguments, tmp_path):
    """Start nodes of a run, each an agent with its process, and with a log."""
    started, options = [], [*AGENT, f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    words = [ROOT / "pretrain.py", *arguments, "--output_dir", tmp_path / "broken"]

    def start_node():
        started.append(start(run_agent, options, ENVIRONMENT, train, words, str(tmp_path / f"{len(started)}.log")))
        return started[-1]

    yield start_node
    for agent in started:
        if agent.is_alive():
            kill_family(agent.pid)


def train_whole(arguments, folder):
    """The run that nothing happens to: two processes on one machine."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words = [ROOT / "pretrain.py", *arguments, "--output_dir", folder]
    ranks = [environment() | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start(run_script, words, f"{folder}-{env['RANK']}.log", env) for env in ranks]
    assert [exit_code(process) for process in processes] == [0, 0]


def exit_code(process, seconds=120):
    process.join(seconds)
    return process.exitcode


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
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_whole(arguments, whole)
    first = node()
    time.sleep(0.5)  # it holds the rendezvous
    lost = node()
    wait_for(lambda: lines(broken / "curve.jsonl") >= 3)
    kill_family(lost.pid)
    lost.join()
    back = node()
    assert [exit_code(agent) for agent in (first, back)] == [0, 0]
    told = "".join((tmp_path / f"{number}.log").read_text() for number in range(3))
    assert "lost another process" in told or "ended or was killed" in told
    assert "continuing from" in told and "holds a run" not in told
    one, other = (torch.load(f / "checkpoint_last.pth", weights_only=True)["model"] for f in (whole, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "curve.jsonl").read_text() == (broken / "curve.jsonl").read_text()


def work_of_two_starts(folder):
    """In the first start both processes end; in the second each writes what it finds of the first."""
    join_group("gloo", timedelta(seconds=60))
    before = started_before()
    number = dist.distributed_c10d._get_default_store().add("counter", 1)
    dist.barrier()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    (folder / str(dist.get_rank())).write_text(f"{number} {before}")


def test_processes_that_torchrun_starts_again_find_an_empty_store(tmp_path):
    options = ["--nproc_per_node=2", "--max_restarts=1", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    assert exit_code(start(run_agent, options, environment(), work_of_two_starts, tmp_path)) == 0
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"1 True", "2 True"}


def test_starts_that_torchrun_does_not_count(tmp_path, monkeypatch):
    """Where a machine comes back before the others' processes have ended, all start again under the same count."""
    found = []
    for rank in (0, 1, 0):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_0/{rank}/error.json"))
        found.append(was_restarted())
    assert found == [False, False, True]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    assert not was_restarted()


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
