"""Processes, gathers, meters and the progress line."""

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from released import door

Item = TypeVar("Item")
MARK = "UserError: "  # how a worker's re-raised message is recognised


class UserError(Exception):
    """Something a person can cause and mend; the message says in one line what was got, expected and to do."""


def user_message(error: BaseException) -> str | None:
    """Return the line of a UserError, also of one that a data worker re-raised; None for other errors."""
    if not isinstance(error, UserError):
        return None
    lines = str(error).strip().splitlines()
    # torch's data workers put the traceback in front and the original "module.UserError: message" last
    found = [line.split(MARK, 1)[1] for line in lines if MARK in line]
    return found[-1] if found else " ".join(lines)


def allow_tf32(enabled: bool) -> None:
    """Let CUDA compute float32 products and convolutions in TF32, the default of the released code's PyTorch."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


def run_command(main: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0; 2 after a UserError, whose line is printed; 130 after Ctrl-C."""
    try:
        main()
        return 0
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


# Processes: no-ops in one process.


def has_group() -> bool:
    """Tell whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if has_group() else 1


def get_rank() -> int:
    """Return this process's number, 0 to world size - 1."""
    return dist.get_rank() if has_group() else 0


def is_main_process() -> bool:
    """Tell whether this is the process that writes files and prints."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' tensors, of equal shapes, along dimension 0; without gradient."""
    tensor = tensor.detach()
    if get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(get_world_size())[get_rank()]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """As `all_gather`; backward gives the sum over ranks of the gradients for this rank's rows."""
    return tensor if get_world_size() == 1 else _AllGatherWithGrad.apply(tensor)


def all_gather_object(item: Item) -> list[Item]:
    """Return every rank's picklable object, in order of rank."""
    if get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * get_world_size()
    dist.all_gather_object(items, item)
    return items


def gather_results(items: Sequence[Item]) -> list[Item]:
    """Join the ranks' lists of results on every rank, in the order of the dataset (rank r holds r, r + world ...)."""
    shards = all_gather_object(list(items))
    longest = max(len(shard) for shard in shards)
    return [shard[i] for i in range(longest) for shard in shards if i < len(shard)]


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks, without gradient."""
    if get_world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / get_world_size()


def all_reduce_max_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by the maximum over ranks, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def on_main_process(function: Callable[[], Item]) -> Item:
    """Run a function on the main process only and return its result, or raise its UserError, on every rank."""
    result, message = None, None
    if is_main_process():
        try:
            result = function()
        except UserError as error:
            message = str(error)
    result, message = all_gather_object((result, message))[0]
    if message is not None:
        raise UserError(message)
    return result


# Meters.


class Mean:
    """Running mean of tensors that stays on their device until it is read."""

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


# The progress line.


def memory_used(device: torch.device) -> float:
    """Return the peak memory in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
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
    """One line on the main process: rewritten in place on a terminal, printed every few seconds elsewhere.

    Args:
        total: how many items there are.
        title: what is being done.
        interval: least seconds between two printed lines where there is no terminal.
    """

    def __init__(self, total: int, title: str, interval: float = 10.0):
        self.total, self.title, self.start = total, title, time.monotonic()
        self.live = sys.stderr.isatty()
        self.interval, self.last = (0.2 if self.live else interval), self.start
        self.width = 0

    def update(self, done: int, details: str = "", first: int = 0) -> None:
        """Show that `done` items of the total are done, of which `first` were before this start."""
        now = time.monotonic()
        if not is_main_process() or (now - self.last < self.interval and done < self.total):
            return
        self.last = now
        rate = max(done - first, 0) / max(now - self.start, 1e-9)
        left = duration((self.total - done) / rate) if rate else "?"
        self._show(f"{self.title}  {done}/{self.total}  {details}  {left} left".replace("    ", "  "))

    def _show(self, line: str) -> None:
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line.ljust(self.width)}", end="", file=sys.stderr, flush=True)
            self.width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line on a terminal."""
        if self.live and self.width:
            print(file=sys.stderr, flush=True)


def track(items: Sequence[Item] | Any, title: str) -> Iterator[Item]:
    """Yield the items of something with a length, showing progress."""
    line = ProgressLine(len(items), title)
    for done, item in enumerate(items, 1):
        yield item
        line.update(done)
    line.close()


def note(text: str) -> None:
    """Print a line on standard error, on the main process only."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr, flush=True)


def id_text(value: Any) -> str:
    """Return the text of an image's or question's id, which is the same for 1, 1.0 and "1".

    Raises:
        UserError: it is no whole number and no text, or an empty one.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"an id is {value!r:.40}; expected a whole number or a text")
    return value if isinstance(value, str) else str(value)


__getattr__ = door(__name__)
