"""A process that hangs, is stopped or is killed ends the others, with a line that names it; a busy one does not."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import asdict

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from launch import watchdog
from launch.config import CaptionConfig
from launch.run import launch
from launch.watchdog import State, Watchdog
from utils import all_gather_object, on_main_process

SECONDS = 1.0  # that the tests' runs may stand still


class Stuck(Dataset):
    """Three batches; the fourth never comes."""

    def __init__(self, stuck):
        self.stuck = stuck

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if self.stuck and index == 3:
            time.sleep(1000)
        return index


def work(config, run, fault):
    """Steps as the loop takes them; at the fourth, rank 1 does what `fault` says."""
    stuck = run.rank == 1 and "data" in fault
    batches = iter(DataLoader(Stuck(stuck), batch_size=1, num_workers=int(fault == "data of a worker" and stuck)))
    for step in range(10**6):
        run.watchdog.enter("data loading", step)
        next(batches)
        run.watchdog.enter("a step", step)
        if step == 3 and run.rank == int("rank 0" not in fault) and fault.startswith(("stop", "kill")):
            time.sleep(0.5)  # until the others have heard that it is in this step
            os.kill(os.getpid(), signal.SIGSTOP if fault.startswith("stop") else signal.SIGKILL)
        if step == 3 and fault.startswith("error") and run.rank == 1:
            raise RuntimeError(fault.removeprefix("error: "))
        all_gather_object(step)
        if fault == "nothing" and step == 0:
            time.sleep(1.5 * SECONDS)  # the first step compiles
        if fault == "nothing" and step == 3:
            run.watchdog.enter("evaluation", step)
            time.sleep(2 * SECONDS * run.rank)
            all_gather_object(step)
            run.watchdog.enter("saving", step)
            on_main_process(lambda: time.sleep(1.5 * SECONDS))
            return


def process(rank, port, fault, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = open(f"{folder}/{rank}.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    watchdog.STORE_SECONDS, watchdog.END_SECONDS = 3.0, 2.0
    sys.argv = ["work", "--output_dir", f"{folder}/out", "--set", f"hang_minutes={SECONDS / 60}"]
    if fault != "nothing":  # NCCL waits there for collectives that other ranks have begun
        dist.destroy_process_group = lambda: time.sleep(60)
    os._exit(launch(lambda c, r: work(c, r, fault), CaptionConfig, "configs/miniature/caption.yaml", "", ""))


def two_processes(fault, folder, limit=30):
    """Return the exit codes, None for one that did not end by itself, and what was told."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")  # no second start; nothing goes backward here
    started = [context.Process(target=process, args=(rank, port, fault, folder)) for rank in range(2)]
    for one in started:
        one.start()
    end = time.monotonic() + limit
    faulty = started[0] if "rank 0" in fault else started[1]
    for one in started:
        if one is not faulty or not fault.startswith("stop"):
            one.join(max(end - time.monotonic(), 0))
    codes = [one.exitcode for one in started]
    for one in started:
        one.kill()
    told = "".join((folder / f"{rank}.txt").read_text() for rank in range(2))
    return codes, [line for line in told.splitlines() if line.startswith("error") or "Error" in line]


HANGS = "hangs, or was stopped; no rank made progress for 1 s; continue with --resume"


@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("stop", [2, None], "rank 1 in a step at step 3 (tests/test_watchdog.py, line "),
        ("stop rank 0", [None, 2], "no answer from the store, which rank 0 or torchrun holds, and no progress for 1 s"),
        ("kill", [2, -9], "rank 0 in a step at step 3"),
        ("kill rank 0", [-9, 2], "rank 1 in a step at step 3"),
        ("data", [2, 2], "rank 1 in data loading at step 3 (tests/test_watchdog.py, line "),
        ("data of a worker", [2, 2], "rank 1 in data loading at step 3 (tests/test_watchdog.py, line "),
    ],
)  # fmt: skip
def test_one_fault_ends_all(tmp_path, fault, codes, message):
    found, told = two_processes(fault, tmp_path)
    assert found == codes
    assert len(told) == 1 and message in told[0] and "continue with --resume" in told[0], told
    if fault in ("stop", "data", "data of a worker"):
        assert HANGS in told[0]
    if fault.startswith("kill"):
        assert "a collective failed (" in told[0] and "closed by peer" in told[0]  # the original, whole


def test_a_process_that_is_busy_is_left_alone(tmp_path):
    """One evaluates, and then the other saves, for longer than a step may take; so does the first step of each."""
    assert two_processes("nothing", tmp_path) == ([0, 0], [])


@pytest.mark.parametrize("words", ["NCCL communicator was aborted", "gloo: mismatched sizes", "Socket of the lamp"])
def test_17_7_no_error_hides_behind_a_lost_process(tmp_path, words):
    """An error that names NCCL, gloo or a socket keeps its own type, text and traceback."""
    found, told = two_processes(f"error: {words}", tmp_path)
    assert found[1] != 0 and f"RuntimeError: {words}" in told
    text = (tmp_path / "1.txt").read_text()
    assert "rank 1 failed in a step at step 3:" in text and 'in work\n    raise RuntimeError' in text


def watchdog_of(*states, rank=0):
    """A watchdog of one minute, of a run whose ranks have published these states."""
    store = dist.HashStore()
    dog = Watchdog(1.0, rank, len(states), store)
    for other, state in enumerate(states):
        store.set(f"watchdog/{other}", json.dumps(asdict(state)))
    dog.state = states[rank]
    return dog


def test_which_rank_is_named():
    step, data = State(4, "a step", 7, waits=True), State(3, "data loading", 7)
    assert watchdog_of(step, data, step).check(60, 59) == ""
    assert watchdog_of(step, data, step).check(60, 61).startswith("rank 1 in data loading at step 7: hangs")
    busy, waiting = State(5, "evaluation", 9), State(5, "evaluation", 9, waits=True)
    assert watchdog_of(waiting, waiting, busy).check(1800, 1801).startswith("rank 2 in evaluation at step 9: hangs")
    assert watchdog_of(waiting, waiting, State(5, "evaluation", 9, moved=2)).check(1800, 1801) == ""  # it moves
    dog = watchdog_of(step, data, step)
    dog.store.set("watchdog/1", "")  # it has ended as it should
    assert dog.check(60, 61).startswith("ranks 0, 2 in a step at step 7: hangs")


def test_what_counts_as_progress():
    dog = Watchdog(1.0)
    for phase, strict in (("a step", False), ("evaluation", False), ("a step", True), ("data loading", False)):
        dog.enter(phase, 3)
        assert dog.strict == strict  # the first step may compile, and the first batch starts the workers
    for phase, moves in (("evaluation", True), ("a step", False)):
        dog.enter(phase, 3)
        dog._look(10.0)
        dog._look(20.0)  # from another line: the main thread has moved
        assert (dog.state.moved == 20.0) == moves
    dog._look(30.0, restart=True)  # after the process was suspended
    assert dog.state.moved == 30.0
