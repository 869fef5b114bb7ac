"""Runs the task scripts by their command lines, on a miniature world."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import run_script, start

ROOT = Path(__file__).parent.parent
TINY = ["vit={embed_dim: 32, depth: 2, num_heads: 2, patch_size: 16}", "num_workers=0"]


def command(script, *args, processes=1):
    """The command line of a script, under torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launcher + [str(ROOT / script), *map(str, args)]


def settings(**values):
    """Turn settings into --set arguments."""
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def environment(nccl_like=True):
    """The environment of a script; on several processes collectives refuse what NCCL would, if NCCL is not there."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "nccl_like") if nccl_like else str(ROOT)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run(script, *args, processes=1, check=True):
    """Run a script to its end, in copies of a process that has imported its modules."""
    words = [str(ROOT / script), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        process = start(run_script, words, processes, Path(folder), environment())
        process.join()
        told = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    if check:
        assert process.exitcode == 0, told[0][-2000:] + told[1][-3000:]
    return subprocess.CompletedProcess(words, process.exitcode, *told)


def run_here(script, *args):
    """Run a script in this process, which saves its start; returns the exit code and what went to stderr."""
    told, argv, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code, told.getvalue()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
    raise AssertionError(f"{script} ended without an exit code")


def family(pid):
    """A process and all that descend from it; torchrun's workers have sessions of their own."""
    with contextlib.suppress(FileNotFoundError):  # it has ended
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        return [pid] + [found for child in children for found in family(child)]
    return []


def kill_family(pid):
    """SIGKILL a process with all that descend from it."""
    for found in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(found), signal.SIGKILL)


def run_and_signal(script, *args, when, number=signal.SIGKILL, processes=1, limit=120, fresh=False):
    """Start a script, send it a signal as soon as `when()` is true, by `limit` seconds, and wait.

    SIGKILL goes to all its processes; any other to the first one, which under several is torchrun and passes it on.
    The processes are copies, as those of `run`, or with `fresh` those of the command line.
    """
    words = command(script, *args, processes=processes) if fresh else [str(ROOT / script), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        process = start(run_script, words, processes, Path(folder), environment(), fresh)
        try:
            wait_for(when, process, limit)
        except AssertionError as error:
            kill_family(process.pid)  # or it would go on beside the other tests
            raise AssertionError(f"{error}\n{output(folder)[-3000:]}") from None
        kill_family(process.pid) if number == signal.SIGKILL else os.kill(process.pid, number)
        process.join(120)
        return process.exitcode, output(folder)


def wait_for(when, process, limit):
    """Wait for `when()` to be true; an AssertionError if the process ends before, or after so many seconds."""
    deadline = time.monotonic() + limit
    while not when():
        assert process.is_alive(), "the script ended before the moment to send the signal"
        assert time.monotonic() < deadline, "the moment to send the signal never came"
        time.sleep(0.005)


def output(folder):
    """What `run_script` wrote to stdout, and then to stderr."""
    return "".join((Path(folder) / name).read_text() for name in ("stdout", "stderr"))


def lines(path):
    """Number of lines of a file that may not be there yet."""
    return len(path.read_text().splitlines()) if path.exists() else 0
