"""A process that hangs, is stopped or is killed ends the others, with a line that names it; a busy one does not."""

import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from launch.config import CaptionConfig
from launch.run import launch
from launch.watchdog import Heard, State, Watchdog
from utils import all_gather_object, on_main_process

SECONDS = 2.0  # that the tests' runs may stand still


class Stuck(Dataset):
    """Batches of which the fourth never comes."""

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
        all_gather_object(step)
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
    sys.stderr = open(f"{folder}/{rank}.txt", "w", buffering=1)  # noqa: SIM115
    sys.argv = ["work", "--output_dir", f"{folder}/out", "--set", f"hang_minutes={SECONDS / 60}"]
    code = launch(lambda c, r: work(c, r, fault), CaptionConfig, "configs/miniature/caption.yaml", "", "")
    os._exit(code)


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


@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("stop", [2, None], "rank 1 gave no sign for 1 s: stopped, or the machine is gone; the last was in a step at"),
        ("stop rank 0", [None, 2], "the process that holds it, rank 0 or torchrun, is stopped or gone"),
        ("kill", [2, -9], "rank 1 ended or was killed, in a step at step 3"),
        ("kill rank 0", [-9, 2], "rank 0, or torchrun, ended or was killed, in a step at step 3"),
        ("data", [2, 2], "rank 1 hangs in data loading at step 3 (tests/test_watchdog.py, line "),
        ("data of a worker", [2, 2], "rank 1 hangs in data loading at step 3 (tests/test_watchdog.py, line "),
    ],
)  # fmt: skip
def test_one_fault_ends_all(tmp_path, fault, codes, message):
    found, told = two_processes(fault, tmp_path)
    assert found == codes
    assert len(told) == 1 and message in told[0] and "continue with --resume" in told[0], told


def test_a_process_that_is_busy_is_left_alone(tmp_path):
    """One evaluates, and then the other saves, for longer than a step may take."""
    assert two_processes("nothing", tmp_path) == ([0, 0], [])


def heard(*states, told=0.0, moved=0.0):
    """A watchdog of a minute that heard these states of its processes at those seconds."""
    dog = Watchdog(1.0, 0, len(states))
    dog.heard = {rank: Heard(state, told, moved) for rank, state in enumerate(states)}
    dog.answered = 0.0
    return dog


def test_who_is_named():
    step, data = State(place=4, phase="a step", step=7, waits=True), State(place=3, phase="data loading", step=7)
    assert heard(step, data, step).verdict(50) == ""
    dog = heard(step, data, step, told=65)
    dog.answered = 65
    assert dog.verdict(61).startswith("rank 1 hangs in data loading at step 7")  # the one behind
    busy, waiting = State(phase="evaluation", step=9), State(phase="evaluation", step=9, waits=True)
    dog = heard(waiting, waiting, busy, told=1790, moved=0)
    dog.answered = 1790
    assert dog.verdict(1799) == ""  # half an hour
    dog.answered = dog.heard[0].told = dog.heard[1].told = dog.heard[2].told = 1800
    assert dog.verdict(1801).startswith("rank 2 hangs in evaluation at step 9")  # the one that waits for nobody
    dog = heard(step, step, told=65, moved=65)
    dog.answered, dog.heard[1].told = 65, 0
    assert dog.verdict(66).startswith("rank 1 gave no sign for 1:00")
    dog.heard[1].state.left = True  # it has ended in order
    assert dog.verdict(66) == ""


def test_what_counts_as_moving():
    one = Heard(State(place=1, phase="evaluation"), 0.0, 0.0)
    one.take(State(beat=1, place=1, phase="evaluation", stack=5), 10.0)
    assert (one.told, one.moved) == (10.0, 10.0)
    one = Heard(State(place=1, phase="a step"), 0.0, 0.0)
    one.take(State(beat=1, place=1, phase="a step", stack=5), 10.0)
    assert (one.told, one.moved) == (10.0, 0.0)
    one.take(State(beat=1, place=2, phase="a step", stack=5), 20.0)
    assert (one.told, one.moved) == (10.0, 20.0)


def test_a_run_that_was_stopped_as_a_whole_goes_on():
    dog = heard(State(), State())
    dog.forgive(1e6)
    assert dog.verdict(1e6 + 50) == ""


def test_every_exchange_is_a_sign():
    dog = Watchdog(1.0, 0, 2)
    for _ in range(2):  # without having heard of the other
        dog.exchange()
        assert dog.heard[0].told == dog.answered
