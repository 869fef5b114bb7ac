"""Ends a run that hangs: prints which rank, in which phase, at which step, and the time limit.

A thread of every process publishes the process's state in the process group's store, also while the main thread waits
in a collective or for data. A process that has made no progress for the time limit compares the states of all.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from utils import duration, say

CODE_FOLDER = str(Path(__file__).resolve().parent.parent) + os.sep
STRICT = ("data loading", "a step")  # phases with the limit `hang_minutes`, from the second time on
BUSY_MINUTES = 30.0  # least limit of other phases, and of the first step, which compiles and starts NCCL
STORE_SECONDS = 10.0  # for an answer
END_SECONDS = 5.0  # that a rank waits for the others to end with it


@dataclass
class State:
    """What a process publishes."""

    place: int = 0  # number of phases that the main thread has entered; a rank with a smaller one is behind
    phase: str = "starting"
    step: int = 0  # optimizer steps done when the phase began
    moved: float = 0.0  # when the process last made progress, in seconds of `time.time`
    line: str = ""  # the innermost line of this code that the main thread is in
    waits: bool = False  # the main thread is in a collective

    def __str__(self) -> str:
        return f"{self.phase} at step {self.step}" + (f" ({self.line})" if self.line else "")


class Watchdog:
    """Watches one process; `minutes` (0: none) limit a step, or waiting for its data; `store` is the group's."""

    def __init__(self, minutes: float = 0.0, rank: int = 0, world_size: int = 1, store: Any = None):
        self.limit, self.rank = 60 * minutes, rank
        self.interval = min(1.0, self.limit / 10) if minutes else 1.0  # seconds between two looks
        self.store = store.clone() if hasattr(store, "clone") else store  # the clone has its own connection
        self.keys = [f"watchdog/{other}" for other in range(world_size)]
        self.state, self.phases, self.strict = State(moved=time.time()), {""}, False
        self.progress: Any = None
        self.main, self.closed, self.ending = threading.get_ident(), threading.Event(), threading.Event()

    def enter(self, phase: str, step: int) -> None:
        """Record that the main thread begins a phase, after so many optimizer steps."""
        self.strict = phase in STRICT and phase in self.phases
        self.phases.add(phase)
        self.state = State(self.state.place + 1, phase, step, time.time())

    def start(self) -> "Watchdog":
        """Start watching, unless there is no limit."""
        if self.limit:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def close(self) -> None:
        """Stop watching: this process ends as it should, and the others do not wait for it."""
        if self.limit and not self.closed.is_set():
            self.closed.set()
            self._publish("")

    def is_first(self, message: str) -> bool:
        """Return True if no other rank has printed this message, so that an error that all ranks have is one line."""
        return self._count(message, 1) in (1, None)

    def _count(self, message: str, more: int) -> int | None:
        """Return the number of ranks that have had a message, None without an answer from the store."""
        return 1 if self.store is None else self._ask(lambda: self.store.add(f"printed/{message}", more))

    def _watch(self) -> None:
        last = time.time()
        while not self.closed.wait(self.interval):
            now = time.time()
            suspended = now - last > 0.5 * self.limit  # this process was, and perhaps the whole run
            last = now
            self._look(now, suspended)
            limit = self.limit if self.strict else max(self.limit, 60 * BUSY_MINUTES)
            if (message := self.check(limit, now)) and not self.closed.is_set():
                self.end(message)

    def _look(self, now: float, restart: bool = False) -> None:
        """Note whether the main thread has moved, and publish the state."""
        state = self.state
        stack, state.line, state.waits = inspect_stack(sys._current_frames().get(self.main))
        progress = state.place, 0 if self.strict else stack  # in a strict phase nothing but its end is progress
        if progress != self.progress or restart:
            self.progress, state.moved = progress, now
        self._publish(json.dumps(asdict(state)))

    def _publish(self, text: str) -> None:
        if self.store is not None:
            with suppress(RuntimeError):  # `check` reports it
                self.store.set(self.keys[self.rank], text)

    def check(self, limit: float, now: float) -> str:
        """Return which ranks hang if no rank has made progress for `limit` seconds, else ''."""
        if now - self.state.moved <= limit:
            return ""
        states = self._ask(self._read)
        if states is None:
            problem = f"no answer from the store, which rank 0 or torchrun holds, and no progress for {duration(limit)}"
            return f"rank {self.rank} in {self.state}: {problem}"
        if any(now - state.moved <= limit for state in states.values()):
            return ""
        place = min(state.place for state in states.values())
        behind = [rank for rank, state in states.items() if state.place == place]
        behind = [rank for rank in behind if not states[rank].waits] or behind
        names = f"rank{'s' * (len(behind) > 1)} {', '.join(map(str, behind))}"
        return f"{names} in {states[behind[0]]}: hangs, or was stopped; no rank made progress for {duration(limit)}"

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return the store's answer, None if the process that holds the store has ended or is stopped."""
        answers: list[Any] = []

        def ask() -> None:
            """Note the answer, if one comes."""
            with suppress(RuntimeError):
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        return answers[0] if answers else None

    def _read(self) -> dict[int, State]:
        """Return the states of the ranks that have published one and have not ended."""
        states = {self.rank: self.state}
        for rank, key in enumerate(self.keys):
            if rank != self.rank and self.store.check([key]) and (text := self.store.get(key)):
                states[rank] = State(**json.loads(text))
        return states

    def end(self, message: str) -> None:
        """Print why, and end this process and its data workers with exit code 2."""
        self.ending.set()
        number, deadline = self._count(message, 1), time.time() + END_SECONDS
        if number in (1, None):
            say(f"error: {message}; continue with --resume")
        # the end of one rank fails the collectives of the others, and rank 0 may hold the store: they end together
        while number is not None and number < len(self.keys) and time.time() < deadline:
            time.sleep(0.1)
            number = self._count(message, 0)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(2)

    def wait_if_ending(self) -> None:
        """Wait if the watchdog is ending this process; an error of the main thread then follows from that end."""
        if self.ending.is_set():
            time.sleep(2 * END_SECONDS)


def inspect_stack(frame: FrameType | None) -> tuple[int, str, bool]:
    """Return a hash of a stack, its innermost line of this code, and whether it is in a collective."""
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
