"""Schedules, meters and process groups by the names of the released utils.py and data/utils.py."""

import builtins
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median_low
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.annotations import find_annotation
from files import read_json, write_json
from launch.run import slurm_to_torchrun
from metrics.caption import caption_scores
from training.optimizer import cosine_lr, set_lr, step_lr, warmup_lr
from utils import all_gather_object, duration, gather_results, has_group, is_main_process, memory_used, on_main_process

__all__ = [
    "AttrDict", "MetricLogger", "SmoothedValue", "compute_acc", "compute_n_params", "cosine_lr_schedule",
    "init_distributed_mode", "is_dist_avail_and_initialized", "save_on_master", "setup_for_distributed",
    "step_lr_schedule", "warmup_lr_schedule",
]  # fmt: skip
is_dist_avail_and_initialized = has_group


def schedule(lr: Callable[..., float]) -> Callable[..., None]:
    """Return a function of an optimizer and the arguments of `lr`, which sets its learning rate."""
    return lambda optimizer, *args, **kwargs: set_lr(optimizer, lr(*args, **kwargs))


cosine_lr_schedule, warmup_lr_schedule, step_lr_schedule = map(schedule, (cosine_lr, warmup_lr, step_lr))


class SmoothedValue:
    """Statistics of the last `window_size` values of a series, and the mean of all; `fmt` is the format of `str()`."""

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total, self.count, self.fmt = 0.0, 0, fmt or "{median:.4f} ({global_avg:.4f})"

    def update(self, value: float, n: int = 1) -> None:
        """Add a value that counts `n` times in the mean of all."""
        self.deque.append(value)
        self.count, self.total = self.count + n, self.total + value * n

    def synchronize_between_processes(self) -> None:
        """Sum count and total over the ranks; the window stays local."""
        self.count, self.total = map(sum, zip(*all_gather_object((self.count, self.total)), strict=True))

    median = property(lambda self: median_low(self.deque))
    avg = property(lambda self: fmean(self.deque))
    global_avg = property(lambda self: self.total / self.count)
    max = property(lambda self: max(self.deque))
    value = property(lambda self: self.deque[-1])

    def __str__(self) -> str:
        fields = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in fields})


class MetricLogger:
    """Meters by name, and a loop that prints them; a meter is also an attribute."""

    def __init__(self, delimiter: str = "\t"):
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(f"MetricLogger has no meter {name!r}")

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use a meter of another window or format."""
        self.meters[name] = meter

    def update(self, **values: float | torch.Tensor) -> None:
        """Add a value to each of the named meters."""
        for name, value in values.items():
            self.meters[name].update(float(value))

    def synchronize_between_processes(self) -> None:
        """Sum every meter over the ranks."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def global_avg(self) -> str:
        """Return the means of all values as one line."""
        return self.delimiter.join(f"{name}: {meter.global_avg:.4f}" for name, meter in self.meters.items())

    def log_every(self, iterable: Iterable, print_freq: int, header: str | None = None) -> Iterator[Any]:
        """Yield the items, printing the meters, the time and the memory every `print_freq` items and after the last."""
        header, total, start = header or "", len(iterable), time.monotonic()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for index, item in enumerate(iterable):
            yield item
            if index % print_freq == 0 or index == total - 1:
                seconds = (time.monotonic() - start) / (index + 1)
                parts = [header, f"[{index}/{total}]", f"eta: {duration(seconds * (total - index - 1))}", str(self)]
                parts += [f"time: {seconds:.4f}", f"max mem: {memory_used(device) * 1024:.0f}"]
                print(self.delimiter.join(parts))
        print(f"{header} Total time: {duration(time.monotonic() - start)}")


class AttrDict(dict):
    """A dict whose keys are attributes too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


def compute_acc(logits: torch.Tensor, label: torch.Tensor, reduction: str = "mean") -> float | torch.Tensor:
    """Return the accuracy of logits (rows, classes), or with reduction "none" 1 or 0 for each row."""
    right = (logits.argmax(dim=1) == label).float().detach()
    return right if reduction == "none" else right.mean().item()


def compute_n_params(model: nn.Module, return_str: bool = True) -> str | int:
    """Count parameters; as a text in thousands (K) or millions (M)."""
    total = sum(p.numel() for p in model.parameters())
    if not return_str:
        return total
    return f"{total / 1e6:.1f}M" if total >= 1e6 else f"{total / 1e3:.1f}K"


def save_on_master(*args: Any, **kwargs: Any) -> None:
    """Call `torch.save` on the main process."""
    if is_main_process():
        torch.save(*args, **kwargs)


def setup_for_distributed(is_master: bool) -> None:
    """Make `print` silent on other processes than the main one, unless it is called with force=True."""
    original = getattr(builtins.print, "original", builtins.print)

    def print_on_master(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            original(*args, **kwargs)

    print_on_master.original = original
    builtins.print = print_on_master


class CPUDistributedDataParallel(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that ignores `device_ids`, which PyTorch refuses for a model on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any):
        super().__init__(module, **kwargs)


def init_distributed_mode(args: Any) -> None:
    """Join the process group that torchrun or SLURM describes.

    Differs from the released code: without a GPU, args.device becomes "cpu" and DistributedDataParallel takes models
    on the CPU; a process alone gets a group of one, so that `dist.barrier()` works.
    """
    if not torch.cuda.is_available():
        args.device = "cpu"
    slurm_to_torchrun()
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    args.rank, args.world_size, args.gpu = (int(os.environ.get(name, value)) for name, value in names.items())
    args.distributed, on_gpu = "RANK" in os.environ, getattr(args, "device", "cuda") != "cpu"
    args.dist_backend = "nccl" if on_gpu and args.distributed else "gloo"
    if on_gpu:
        args.gpu %= torch.cuda.device_count()  # SLURM may show each task one GPU
        torch.cuda.set_device(args.gpu)
    else:
        nn.parallel.DistributedDataParallel = CPUDistributedDataParallel
    where = {"init_method": args.dist_url} if args.distributed else {"store": dist.HashStore()}
    dist.init_process_group(args.dist_backend, rank=args.rank, world_size=args.world_size, **where)
    dist.barrier()
    setup_for_distributed(is_main_process())


# data/utils.py


def save_result(result: list[dict[str, Any]], result_dir: str, filename: str, remove_duplicate: str = "") -> str:
    """Write the results of all processes to `result_dir`/`filename`.json and return its path, on every process.

    Of rows with one value under the key `remove_duplicate` the first is kept.
    """
    path = Path(result_dir) / f"{filename}.json"
    rows = gather_results(result)
    if remove_duplicate:
        first: dict[Any, dict[str, Any]] = {}
        for row in rows:
            first.setdefault(row[remove_duplicate], row)
        rows = list(first.values())
    on_main_process(lambda: write_json(path, rows))
    return str(path)


def coco_caption_eval(coco_gt_root: str, results_file: str, split: str) -> SimpleNamespace:
    """Score captions against coco_karpathy_{split}_gt.json; the scores are in `.eval`, and printed."""
    truth = find_annotation(coco_gt_root, f"coco_karpathy_{split}_gt.json")
    scores, left_out = caption_scores(read_json(Path(results_file)), truth)
    for name, score in scores.items():
        print(f"{name}: {score:.3f}")
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    return SimpleNamespace(eval=scores)
