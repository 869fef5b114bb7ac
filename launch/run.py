"""Start and end of every script: command line, processes, device, seeds, output folder, log, errors in one line."""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from files import append, disk_is_full, to_free, write_whole
from launch.command_line import make_parser, refuse_unknown
from launch.config import ModelConfig
from launch.interrupts import raise_interrupts
from launch.settings_file import load_config, save_config
from launch.watchdog import BUSY_MINUTES, Watchdog
from utils import (
    UserError,
    allow_tf32,
    choose_device,
    get_rank,
    get_world_size,
    has_group,
    is_main_process,
    on_main_process,
    say,
    user_message,
)

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"  # in the folder of a run
MEMORY_SIZES = ("batch_size", "batch_size_train", "batch_size_test", "image_size", "num_workers")
MEMORY_SAVERS = "; or set amp: bf16, vit_grad_ckpt: true, text_grad_ckpt: true, on several GPUs parallel: fsdp"
STOPPED = 143  # exit code after SIGTERM, which stops all ranks at one step
FREEING_SECONDS = 0.2  # that gloo's threads have for their last tensors
HANG_MINUTES = 15.0  # where the task's config does not say


class Interrupted(Exception):
    """A run was asked to stop and has saved itself; the message says how to go on."""


@dataclass
class Run:
    """What a script knows about its own run."""

    output_dir: Path
    device: torch.device
    seed: int = 42
    evaluate: bool = False
    resume: Path | None = None
    overwrite: bool = False
    command: str = ""
    notes: list[str] = field(default_factory=list)
    epoch: int | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return get_rank()

    def result(self, name: str) -> Path:
        """Return the path of a result file: result/<name>_epoch<n>.json in training, else result/<name>.json."""
        return self.output_dir / "result" / (f"{name}.json" if self.epoch is None else f"{name}_epoch{self.epoch}.json")

    def print(self, *words: Any) -> None:
        """Print on the main process."""
        if is_main_process():
            say(" ".join(map(str, words)), sys.stdout)

    def note(self, text: str) -> None:
        """Print something a reader of the report should know too, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.print(text)

    def log(self, row: dict[str, Any], name: str = "log.txt") -> None:
        """Append a row to a log, one JSON object per line, on the main process."""
        if is_main_process():
            append(self.output_dir / name, json.dumps(row) + "\n")

    def read_log(self, name: str = "log.txt") -> list[dict[str, Any]]:
        """Return the rows of a log."""
        path = self.output_dir / name
        return [row for _, row in _rows(path)] if path.is_file() else []

    def trim_log(self, keep: Callable[[dict[str, Any]], bool], name: str = "log.txt") -> None:
        """Drop the rows that a continued run is going to write again; a last row cut by a kill goes too."""
        path = self.output_dir / name
        if not is_main_process() or not path.is_file():
            return
        kept = [line for line, row in _rows(path) if keep(row)]
        with write_whole(path) as file:
            file.writelines(line + "\n" for line in kept)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a log's lines and what they hold, without those that a kill or a full disk has cut."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield line, row


@raise_interrupts()
def launch(
    main: Callable[[Any, Run], None], config_class: type[ModelConfig], default_config: str, default_output: str,
    description: str | None, examples: Sequence[str] = (),
) -> int:  # fmt: skip
    """Parse the command line, start the run, call `main(config, run)`, and report its end.

    Return the exit code: 0; 1 after an error in this code; 2 after one that the user can fix; 130 after Ctrl-C; 143
    after SIGTERM. After an error, a process of several ends here.
    """
    parser = make_parser(config_class, default_config, default_output, description, examples)
    args, unknown = parser.parse_known_args()
    watchdog, config, code = Watchdog(), config_class(), 1
    try:
        refuse_unknown(unknown, parser, config)
        config = load_config(config_class, args.config, args.set)
        slurm_to_torchrun()
        device = choose_device(args.device)
        allow_tf32(config.get("tf32", True))
        minutes = config.get("hang_minutes", HANG_MINUTES)
        store = join_process_group(device, minutes)
        watchdog = Watchdog(minutes, get_rank(), get_world_size(), store).start()
        main(config, start_run(args, config, device, watchdog))
        code = 0
    except KeyboardInterrupt:
        code = _end(watchdog, "\ninterrupted", 130)
    except Interrupted as stop:
        code = _end(watchdog, str(stop), STOPPED)
    except Exception as error:
        watchdog.wait_if_ending()
        message = user_message(error) or explain_error(error, watchdog, config, Path(args.output_dir))
        if message:
            code = _end(watchdog, f"error: {message}", 2)
        else:
            say(f"rank {get_rank()} failed in {watchdog.state}:\n{traceback.format_exc()}")
    finally:
        watchdog.close()
        leave_group(code)
    return code


def leave_group(code: int) -> None:
    """Leave the process group before the process ends with `code`.

    After an error the process ends here: destroying a group waits, over NCCL, for what the other ranks wait for.
    Destroying a group of gloo holds Python's lock, which gloo's threads need to free the tensors of the last
    collective: they get the time for it, or both would wait for ever.
    """
    if not has_group():
        return
    if code in (0, STOPPED):  # all ranks leave together
        time.sleep(FREEING_SECONDS)
        dist.destroy_process_group()
        return
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(watchdog: Watchdog, message: str, code: int) -> int:
    """Print why the run ends, once if all ranks have the same message."""
    if watchdog.is_first(message) and (has_group() or int(os.environ.get("LOCAL_RANK", 0)) == 0):
        say(message)
    return code


def explain_error(error: Exception, watchdog: Watchdog, config: Any, output_dir: Path) -> str:
    """Return a line for an error of the disk, of memory or of a collective, with the original message; else ''."""
    problem, place = " ".join(str(error).split()), f"rank {get_rank()} in {watchdog.state}"
    if disk_is_full(error):
        file = getattr(error, "filename", None)
        return f"the disk is full ({problem}): {to_free(Path(file).parent if file else output_dir)}"
    lost = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    if has_group() and (isinstance(error, dist.DistError) or any(sign in problem for sign in lost)):
        cause = "the cause is what another rank printed, or the loss of a process; continue with --resume"
        return f"{place}: a collective failed ({problem}); {cause}"
    memory = ("DefaultCPUAllocator", "killed by signal: Killed")  # the latter of a data worker
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in problem for sign in memory):
        sizes = ", ".join(f"{key}: {config[key]}" for key in MEMORY_SIZES if key in config)
        savers = MEMORY_SAVERS if "grad_accum" in config else ""
        return f"out of memory: {place}: {problem or 'MemoryError'}; lower {sizes}{savers}"
    return ""


def join_process_group(device: torch.device, hang_minutes: float) -> dist.Store | None:
    """Join the process group that the environment describes; return its store, None for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return None
    timeout = timedelta(minutes=max(hang_minutes, BUSY_MINUTES) + 10)  # the watchdog, which names the rank, is earlier
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:  # an incomplete environment
        problem = str(error).split("rendezvous: ")[-1]
        raise UserError(f"WORLD_SIZE is set, but {problem}; start the script with torchrun, or unset it") from None
    # torchrun keeps one store for all restarts of a run: the keys of an earlier start must not be read again
    store = dist.PrefixStore(f"start_{restart_count()}", store)
    backend, device_id = dist.get_default_backend_for_device(device), None if device.type == "cpu" else device
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=rank, world_size=world_size, device_id=device_id
    )
    return store


def restart_count() -> int:
    """Return how often torchrun has restarted this run (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def slurm_to_torchrun() -> None:
    """Under `srun` without torchrun, set the variables that torchrun would."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    if "MASTER_ADDR" not in env:
        hosts = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True)
        env["MASTER_ADDR"] = hosts.stdout.split()[0]


def start_run(args: argparse.Namespace, config: ModelConfig, device: torch.device, watchdog: Watchdog) -> Run:
    """Seed the random numbers, make the output folder and write the resolved configuration into it.

    A run that torchrun restarts (`--max_restarts`) continues from its last checkpoint.
    """
    seed = args.seed + get_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.get("deterministic"):
        use_deterministic_algorithms()
    run = Run(Path(args.output_dir), device, args.seed, args.evaluate, command=f"python {' '.join(sys.argv)}")
    run.overwrite, run.watchdog = args.overwrite, watchdog
    last = run.output_dir / LAST
    holds_run = on_main_process(last.is_file)  # decided once, for all ranks
    if args.checkpoint:
        run.resume = Path(args.checkpoint)
    elif args.resume or (restart_count() and holds_run):
        run.resume = last
    elif holds_run and not args.evaluate and not args.overwrite:
        raise UserError(f"{run.output_dir} holds a run; continue it with --resume, or begin anew with --overwrite")
    on_main_process(lambda: _write_folder(run, config, begin=not run.resume and not args.evaluate))
    return run


def _write_folder(run: Run, config: ModelConfig, begin: bool) -> None:
    """Make the output folder, clear it of an earlier run's state if this one begins anew, and write config.yaml."""
    try:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        if begin or not (run.output_dir / "config.yaml").is_file():
            save_config(config, run.output_dir / "config.yaml")
        if begin:  # after what a full disk may refuse
            for name in (LAST, "log.txt", "curve.jsonl"):
                (run.output_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output folder {run.output_dir}: {error.strerror}; choose another --output_dir") from None


def use_deterministic_algorithms() -> None:
    """Make operations on a GPU give the same result in every run, or warn where PyTorch has no such algorithm."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=True)
