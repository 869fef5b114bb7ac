"""Start and end of every script: command line, processes, device, seeds, output folder, log, errors in one line."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from files import append, disk_is_full, to_free, write_whole
from launch.config import ModelConfig, describe, load_config, save_config
from launch.rendezvous import join_group, was_restarted
from launch.watchdog import BUSY_MINUTES, Watchdog, first_to_speak
from utils import UserError, get_rank, get_world_size, has_group, is_main_process, on_main_process, user_message

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"  # in the folder of a run
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
            print(*words, flush=True)

    def note(self, text: str) -> None:
        """Print something a reader of the report should know too."""
        self.notes.append(text)
        self.print(text)

    def note_once(self, text: str) -> None:
        """As `note`, but only the first time."""
        if text not in self.notes:
            self.note(text)

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
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield line, row


def launch(
    main: Callable[[Any, Run], None],
    config_class: type[ModelConfig],
    default_config: str,
    default_output: str,
    description: str,
    examples: Sequence[str] = (),
) -> int:
    """Parse the command line, set everything up, run `main(config, run)`, and tear everything down.

    Returns:
        The exit code: 0; 2 after something the user can mend; 130 after Ctrl-C; 143 after SIGTERM.
    """
    args = _parser(config_class, default_config, default_output, description, examples).parse_args()
    watchdog = Watchdog()
    try:
        config = load_config(config_class, args.config, args.set)
        minutes = config.get("hang_minutes", HANG_MINUTES)
        device = _start_processes(args.device, minutes)
        watchdog = Watchdog(minutes, get_rank(), get_world_size(), _store()).start()
        run = _prepare(args, config, device)
        run.watchdog = watchdog
        main(config, run)
        return 0
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except Interrupted as stop:
        return _end(str(stop), 143)
    except Exception as error:
        message = user_message(error)
        if message is None and disk_is_full(error):  # in a place that has no message of its own
            file = getattr(error, "filename", None)
            where = Path(file).parent if file else Path(args.output_dir)
            message = f"the disk is full ({' '.join(str(error).split())}): {to_free(where)}"
        if message is None and _lost_peer(error):
            return _end_without_peer(watchdog)
        if message is None:
            raise
        return _end(f"error: {message}", 2)
    finally:
        if has_group():
            dist.destroy_process_group()
        watchdog.close()


def _end(message: str, code: int) -> int:
    """Say why the run ends, once however many processes end with it."""
    if _first_to_speak():
        print(f"\n{message}" if code == 130 else message, file=sys.stderr, flush=True)
    return code


def _end_without_peer(watchdog: Watchdog) -> int:
    """Say which process is gone, unless that one has said why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now; it takes a moment to see who is silent
    if _first_to_speak():
        gone = watchdog.gone() or f"rank {get_rank()} lost another process, which ended or was killed"
        print(f"error: {gone}; continue with --resume", file=sys.stderr, flush=True)
    return 2


def _store() -> Any:
    """Return the process group's store, None for one process."""
    return dist.distributed_c10d._get_default_store() if has_group() else None


def _first_to_speak() -> bool:
    return first_to_speak(_store(), get_rank() if has_group() else int(os.environ.get("RANK", 0)))


def _lost_peer(error: Exception) -> bool:
    """Tell whether an error comes from another process that ended."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Socket", "NCCL", "remote process exited", "gloo")
    return has_group() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _parser(
    config_class: type[ModelConfig], default_config: str, default_output: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "".join(f"  {line}\n" for line in examples)
    epilog += "\nconfiguration keys, with their defaults:\n" + "\n".join(describe(config_class))
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=default_config, help=f"YAML file of settings (default: {default_config})")
    parser.add_argument("--output_dir", default=default_output, help=f"folder of results (default: {default_output})")
    parser.add_argument("--evaluate", action="store_true", help="evaluate only")
    parser.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=42, help="of all random numbers (default: 42)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--checkpoint", default="", help="continue from this checkpoint, of any folder")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; may be given many times"
    )
    for name in ("--world_size", "--dist_url", "--distributed"):
        parser.add_argument(name, default=None, help="accepted as in the released code; the launcher decides")
    return parser


def _start_processes(device: str, minutes: float) -> torch.device:
    """Join the process group that torchrun or SLURM describes, if there is one, and choose the device."""
    _slurm_to_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(kind)
    except RuntimeError:
        raise UserError(f"--device {device!r} is no device; expected cuda, cuda:0 or cpu") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device} was asked for and PyTorch sees no GPU; use --device cpu")
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        wait = timedelta(minutes=max(minutes, BUSY_MINUTES) + 10)  # the watchdog, which names the rank, speaks first
        join_group("nccl" if chosen.type == "cuda" else "gloo", wait)
    return chosen


def _slurm_to_torchrun() -> None:
    """Under `srun` without torchrun, set the variables that torchrun would."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    if "MASTER_ADDR" not in env:
        hosts = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True)
        env["MASTER_ADDR"] = hosts.stdout.split()[0]


def _prepare(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> Run:
    """Seed, make the output folder and write the resolved configuration into it."""
    seed_everything(args.seed + get_rank())
    run = Run(Path(args.output_dir), device, args.seed, args.evaluate, command=f"python {' '.join(sys.argv)}")
    run.overwrite = args.overwrite
    last = run.output_dir / LAST
    restarted, holds_run = was_restarted(), on_main_process(last.is_file)  # decided once, for all processes
    if args.checkpoint:
        run.resume = Path(args.checkpoint)
    elif args.resume or (restarted and holds_run):
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


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
