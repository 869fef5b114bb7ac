"""Watches over the processes of a run: one that hangs or is gone ends the run, with a line that names it.

A thread of every process tells the others, through the process group's store, that it is there and how far its main
thread is; so it goes on telling while the main thread is in a collective, or waits for data. A second thread, which
asks nobody, judges what was heard and ends the process.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from utils import duration

CODE_FOLDER = str(Path(__file__).resolve().parent.parent) + os.sep
STRICT = ("data loading", "a step")  # all else, such as evaluation, may keep one process busy for long
BUSY_MINUTES = 30.0  # for which a process may stand still in all else
SILENT_BEATS = 4  # beats that a process is late after which it counts as gone, once a collective has failed
NAMED = 3  # processes that a message names at most


@dataclass
class State:
    """What a process tells of itself.

    Attributes:
        beat: how often it has told.
        place: how many phases its main thread has begun; alike in all processes, so the smallest is behind.
        phase, step: the phase, and the steps done when it began.
        stack: a number that changes when the main thread moves.
        line: the innermost line of ours that the main thread is in.
        waits: whether it waits there for other processes.
        left: whether it has ended in order.
    """

    beat: int = 0
    place: int = 0
    phase: str = "starting"
    step: int = 0
    stack: int = 0
    line: str = ""
    waits: bool = False
    left: bool = False

    def progress(self) -> tuple[int, int]:
        """Return what changes when the process moves; in a step, or waiting for data, nothing counts but its end."""
        return self.place, 0 if self.phase in STRICT else self.stack

    def __str__(self) -> str:
        return f"{self.phase} at step {self.step}" + (f" ({self.line})" if self.line else "")


@dataclass
class Heard:
    """A process's last state, and when it last told anything and last moved (seconds of `time.monotonic`)."""

    state: State = field(default_factory=State)
    told: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)

    def take(self, state: State, now: float) -> None:
        """Take a state that came at a time."""
        if state.beat != self.state.beat:
            self.told = now
        if state.progress() != self.state.progress():
            self.moved = now
        self.state = state


class Watchdog:
    """One process's part of the watch.

    Args:
        minutes: for which a step, or waiting for its data, may take, and a process may be silent; 0 for no limit.
        rank, world_size: this process and their number.
        store: of the process group; None for one process.
    """

    def __init__(self, minutes: float = 0.0, rank: int = 0, world_size: int = 1, store: Any = None):
        self.limit, self.rank = 60 * minutes, rank
        self.busy_limit = max(self.limit, 60 * BUSY_MINUTES)
        self.interval = 0.5 * max(1.0, world_size / 16)  # the store answers world_size**2 questions an interval
        if minutes:
            self.interval = min(self.interval, self.limit / 10)
        self.store = store.clone() if hasattr(store, "clone") else store  # a copy can be used beside the original
        self.keys = [f"blip_watch/{rank}" for rank in range(world_size)]
        self.heard = {rank: Heard() for rank in range(world_size)}
        self.state, self.complete = State(), False
        self.answered = time.monotonic()
        self.main, self.closed = threading.get_ident(), threading.Event()
        self.teller = threading.Thread(target=self._exchange, daemon=True, name="watchdog-exchange")

    def enter(self, phase: str, step: int) -> None:
        """Note that the main thread begins a phase, after so many steps."""
        self.state = State(self.state.beat, self.state.place + 1, phase, step)

    def start(self) -> "Watchdog":
        """Begin to watch."""
        self.teller.start()
        if self.limit:
            threading.Thread(target=self._judge, daemon=True, name="watchdog").start()
        return self

    def close(self) -> None:
        """Tell the others that this process ends in order."""
        if self.closed.is_set():
            return
        self.closed.set()
        if self.teller.is_alive():
            self.teller.join(10 * self.interval)  # or what it is about to tell would come after these last words
        self.state.left = True
        with suppress(RuntimeError):  # the store is gone, and with it those who would read this
            if self.store is not None:
                self.store.set(self.keys[self.rank], json.dumps(asdict(self.state)))

    # What is told and heard.

    def _exchange(self) -> None:
        while not self.closed.wait(self.interval):
            try:
                self.exchange()
            except RuntimeError:  # the store is gone: there is nobody left to hear of
                self.store = None
                if len(self.keys) > 1:
                    return

    def exchange(self) -> None:
        """Tell the others this process's state and hear theirs."""
        state = self.state
        state.beat += 1
        state.stack, state.line, state.waits = look_at(sys._current_frames().get(self.main))
        states = {self.rank: replace(state)}  # a copy: what was heard must not change with what will be told
        if self.store is not None:
            self.store.set(self.keys[self.rank], json.dumps(asdict(state)))
            self.complete = self.complete or self.store.check(self.keys)
            if self.complete:
                states |= {rank: State(**json.loads(text)) for rank, text in enumerate(self._read())}
        now = time.monotonic()
        for rank, state in states.items():
            self.heard[rank].take(state, now)
        self.answered = now

    def _read(self) -> list[bytes]:
        if self.store.has_extended_api():
            return self.store.multi_get(self.keys)
        return [self.store.get(key) for key in self.keys]

    # What is made of it.

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.closed.wait(self.interval):
            now = time.monotonic()
            if now - last > 0.5 * self.limit:  # this process itself was stopped: what it heard is old
                self.forgive(now)
            last = now
            if message := self.verdict(now):
                self.end(message)

    def forgive(self, now: float) -> None:
        """Begin anew to count how long the others are silent or do not move."""
        self.answered = now
        for heard in self.heard.values():
            heard.told = heard.moved = now

    def verdict(self, now: float) -> str:
        """Return why the run has to end, '' if it may go on."""
        present = {rank: heard for rank, heard in self.heard.items() if not heard.state.left}
        if not present:
            return ""
        still = now - max(heard.moved for heard in present.values())
        patience = self.limit if still <= self.limit else 0.5 * self.limit  # a silence is then why nothing moves
        if now - self.answered > patience:
            return (
                f"rank {self.rank} has had no answer from the process group's store for {duration(patience)}, in "
                f"{self.state}: the process that holds it, rank 0 or torchrun, is stopped or gone"
            )
        silent = [rank for rank, heard in present.items() if rank != self.rank and now - heard.told > patience]
        if silent:
            told = f"{name(silent)} gave no sign for {duration(patience)}: stopped, or the machine is gone"
            return f"{told}; the last was in {self.heard[silent[0]].state}"
        return self._hanging(still)

    def _hanging(self, still: float) -> str:
        """Return who hangs, if no process has moved for so many seconds and that is too long."""
        behind = self.behind()
        state = self.heard[behind[0]].state
        limit = self.limit if state.phase in STRICT else self.busy_limit
        if still <= limit:
            return ""
        return f"{name(behind)} hangs in {state}: no process has moved for {duration(limit)}"

    def behind(self) -> list[int]:
        """Return the processes that the others wait for, as far as can be told."""
        states = {rank: heard.state for rank, heard in self.heard.items() if not heard.state.left}
        place = min(state.place for state in states.values())
        behind = [rank for rank, state in states.items() if state.place == place]
        return [rank for rank in behind if not states[rank].waits] or behind

    def gone(self) -> str:
        """Name the process that has been gone since a collective failed, and where it was; waits for it to be late."""
        if len(self.keys) == 1 or not self.complete:
            return ""
        wait = SILENT_BEATS * self.interval
        time.sleep(wait)
        late = [rank for rank, heard in self.heard.items() if self.answered - heard.told > 0.5 * wait]
        if late:
            return f"{name(late)} ended or was killed, in {self.heard[late[0]].state}"
        if self.store is None and self.rank:
            return f"rank 0, or torchrun, ended or was killed, in {self.heard[0].state}"
        return ""

    def end(self, message: str) -> None:
        """Say why, unless another process has, and end this process and its data workers with exit code 2."""
        if self.may_speak():
            print(f"error: {message}; the run is ended, continue with --resume", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        if self.rank == 0:
            time.sleep(3 * self.interval)  # it may hold the store, which tells the others that this was said
        os._exit(2)

    def may_speak(self) -> bool:
        """Tell whether no other process has said why the run ends, as far as the store still answers."""
        answer = [True]
        asking = threading.Thread(target=lambda: answer.insert(0, first_to_speak(self.store, self.rank)), daemon=True)
        asking.start()
        asking.join(10 * self.interval)
        return answer[0]


def first_to_speak(store: Any, rank: int) -> bool:
    """Tell whether no other process of the run has said yet why it ends."""
    if store is None:
        return rank == 0
    try:
        return store.add("blip_last_words", 1) == 1
    except RuntimeError:  # rank 0, which held the store, is gone
        return rank == 1


def name(ranks: list[int]) -> str:
    """Write ranks as 'rank 1' or 'ranks 1, 2'."""
    listed = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def look_at(frame: FrameType | None) -> tuple[int, str, bool]:
    """Return a number of a stack's place, its innermost line of ours, and whether that waits for other processes."""
    places, line, waits = [], "", False
    while frame is not None:
        file = frame.f_code.co_filename
        places.append((file, frame.f_lasti))
        if not line:
            if file.startswith(CODE_FOLDER) and "site-packages" not in file:
                line = f"{file.removeprefix(CODE_FOLDER)}, line {frame.f_lineno}"
            waits = waits or f"torch{os.sep}distributed" in file
        frame = frame.f_back
    return hash(tuple(places)), line, waits
