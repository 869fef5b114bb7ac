"""Ctrl-C while a script imports its modules, which takes seconds; imports nothing slow itself."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def end_on_interrupt() -> None:
    """Let Ctrl-C end the program with one line and exit code 130, without a stack trace, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raise_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt again; also a decorator."""
    changed = signal.getsignal(signal.SIGINT) is _end
    if changed:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)
