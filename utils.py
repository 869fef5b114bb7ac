"""Errors, processes and their collectives, which take tensors of any device, the meter and the progress line."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from released import door

Item = TypeVar("Item")
LISTED = re.compile(r"""\[(['"]).*\1\]""", re.DOTALL)
DIVERGED = "scores are not numbers (NaN); the model has diverged: take an earlier checkpoint"
MARK = "UserError: "  # stands before the message that a data worker re-raises


class UserError(Exception):
    """An error the user can fix; its message says in one line what was got, what was expected, and what to do."""


def refuse_nan(scores: ArrayLike) -> None:
    """Raise UserError for scores of a model that has diverged, which would be ranked in any order."""
    if np.isnan(scores).any():
        raise UserError(DIVERGED)


def user_message(error: BaseException) -> str | None:
    """Return the line of a UserError, also of one that a data worker re-raised; None for other errors."""
    if not isinstance(error, UserError):
        return None
    # torch's data workers put the traceback first and "module.UserError: message" last
    return " ".join(str(error).rpartition(MARK)[2].splitlines()).strip()


def say(text: str, to: TextIO | None = None, end: str = "\n") -> None:
    """Print on standard error, or another stream. A run goes on where its disk is full or its reader has gone."""
    stream = to or sys.stderr
    try:
        encoding = stream.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        pass


def allow_tf32(enabled: bool) -> None:
    """Let CUDA compute float32 products and convolutions in TF32, the default of the released code's PyTorch."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


def run_command(main: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0; 2 after a UserError, whose line is printed; 130 after Ctrl-C."""
    try:
        main()
        return 0
    except UserError as error:
        say(f"error: {user_message(error)}")
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130


# Processes. In a single process the collectives return what they are given.


def has_group() -> bool:
    """Return True if this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if has_group() else 1


def get_rank() -> int:
    """Return this process's rank, 0 to world size - 1."""
    return dist.get_rank() if has_group() else 0


def is_main_process() -> bool:
    """Return True on rank 0, which writes files and prints."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if get_world_size() > 1:
        dist.barrier()


def to_group_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor where the process group's backend takes it: gloo the CPU, NCCL this rank's GPU."""
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    return tensor.to(device).contiguous()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' tensors, of equal shapes, along dimension 0; without gradient."""
    tensor = tensor.detach()
    if get_world_size() == 1:
        return tensor
    own = to_group_device(tensor)
    parts = [torch.empty_like(own) for _ in range(get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(tensor.device)


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        return all_reduce(grad).chunk(get_world_size())[get_rank()]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """As `all_gather`; backward gives the sum over ranks of the gradients for this rank's rows."""
    return tensor if get_world_size() == 1 else _AllGatherWithGrad.apply(tensor)


def all_gather_object(item: Item) -> list[Item]:
    """Return every rank's picklable object, in order of rank."""
    items: list[Any] = [item] * get_world_size()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def gather_results(items: Sequence[Item]) -> list[Item]:
    """Join the ranks' lists of results on every rank, in the order of the dataset (rank r holds r, r + world ...)."""
    shards = all_gather_object(list(items))
    return [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]


def all_reduce(tensor: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """Return the sum over ranks, or "MAX", in a new tensor; without gradient."""
    if get_world_size() == 1:
        return tensor.detach()
    total = to_group_device(tensor.detach().clone())
    dist.all_reduce(total, getattr(dist.ReduceOp, operation))
    return total.to(tensor.device)


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks, without gradient."""
    return all_reduce(tensor) / get_world_size()


@torch.no_grad()
def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Give all ranks the values that rank 0 has."""
    if get_world_size() > 1:
        for tensor in tensors:
            sent = to_group_device(tensor)
            dist.broadcast(sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)


def on_main_process(function: Callable[[], Item]) -> Item:
    """Run a function on rank 0 only and return its result, or raise its UserError, on every rank."""
    result: Any = None
    if is_main_process():
        try:
            result = function()
        except UserError as error:
            result = error
    result = all_gather_object(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def choose_device(name: str) -> torch.device:
    """Return this process's device, made current; `name` may have an index, and "" is cuda where there is a GPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        module = torch.backends.mps if device.type == "mps" else torch.get_device_module(device)
        available = module.is_available()
    except (RuntimeError, AttributeError):
        raise UserError(f"--device is {name!r}; expected cuda, cuda:0, xpu, mps or cpu") from None
    if not available:
        raise UserError(f"--device is {name!r}, and PyTorch finds no such device; use --device cpu")
    if device.type in ("cpu", "mps"):
        return device
    count, local_rank = module.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if device.index is None:
        device = torch.device(device.type, local_rank % count)
        if local_rank == count:  # as under SLURM with one visible GPU per task
            say(f"LOCAL_RANK is {local_rank} with {count} visible GPU; this rank uses {device}")
    if device.index >= count:
        raise UserError(f"--device is {name!r}, and PyTorch finds {count} of this kind; use a smaller index")
    module.set_device(device)
    return device


# The meter and the progress line.


class Mean:
    """Running mean that stays on the device of its tensors until it is read."""

    def __init__(self, total: float = 0.0, count: int = 0):
        self.total, self.count = total, count

    def update(self, value: torch.Tensor | float) -> None:
        """Add one value."""
        self.total = self.total + (value.detach() if isinstance(value, torch.Tensor) else value)
        self.count += 1

    def state(self) -> tuple[float, int]:
        """Return the sum and the number of values, as plain numbers (waits for the device)."""
        return float(self.total), self.count

    def value(self) -> float:
        """Return the mean, 0 of nothing (waits for the device)."""
        return float(self.total) / max(self.count, 1)


def memory_used(device: torch.device) -> float:
    """Return the peak memory in GiB, of the GPU or of this process on a CPU; 0 where it is not known (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Write a duration as '3 s', '4:05' or '2:03:04'."""
    seconds = int(seconds + 0.5)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}"
    return f"{minutes}:{seconds % 60:02d}" if minutes else f"{seconds} s"


class ProgressLine:
    """A line on rank 0, rewritten in place on a terminal, and printed every `interval` seconds elsewhere."""

    def __init__(self, total: int, title: str, interval: float = 10.0):
        self.total, self.title, self.width = total, title, 0
        self.start = self.last = time.monotonic()
        self.live = sys.stderr.isatty()
        self.interval = 0.2 if self.live else interval

    def update(self, done: int, details: str = "", first: int = 0) -> None:
        """Show that `done` items are done, `first` of them before this start."""
        now = time.monotonic()
        if not is_main_process() or (now - self.last < self.interval and done < self.total):
            return
        self.last = now
        rate = max(done - first, 0) / max(now - self.start, 1e-9)
        left = duration((self.total - done) / rate) if rate else "?"
        line = f"{self.title}  {done}/{self.total}  {details}  {left} left".replace("    ", "  ")
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            say(f"\r{line.ljust(self.width)}", end="")
            self.width = len(line)
        else:
            say(line)

    def close(self) -> None:
        """End the line on a terminal."""
        if self.live and self.width:
            say("")


def track(items: Sequence[Item] | Any, title: str) -> Iterator[Item]:
    """Yield the items of a sized iterable and show progress."""
    line = ProgressLine(len(items), title)
    for done, item in enumerate(items, 1):
        yield item
        line.update(done)
    line.close()


def note(text: str) -> None:
    """Print a line on standard error, on the main process only."""
    if is_main_process():
        say(f"note: {text}")


note_once = cache(note)


def id_text(value: Any) -> str:
    """Return the text of an image's or question's id, which is the same for 1, 1.0 and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"an id is {value!r:.40}; expected a whole number or a text")
    return str(value)


def first_few(names: Sequence[str]) -> str:
    """Return the first three names as text, for a message."""
    return ", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def short_repr(value: Any, most: int = 40) -> str:
    """Return a value's repr, cut to `most` characters for a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_listed(value: Any) -> bool:
    """Return True for a list of texts that is written as one text, as a table with one cell per list holds it."""
    return isinstance(value, str) and LISTED.fullmatch(value.strip()) is not None


__getattr__ = door(__name__)
