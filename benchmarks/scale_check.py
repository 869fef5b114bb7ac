"""The plan's arithmetic on this machine: one process's step predicts the step of two, which is measured."""

import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.loading import rate, write_images
from benchmarks.measure import matrix_rate, seconds
from benchmarks.rows import SMALL_TEXT, training_step, word_texts
from data.transforms import test_transform, train_transform
from models.blip_pretrain import BLIP_Pretrain
from tests.processes import run_in_processes
from training.parallel import wrap

PAIRS, STEPS, REPEATS = 4, 6, 5
SCREEN = 640  # longer side of the images that are decoded


def small_model() -> BLIP_Pretrain:
    """Return the model whose steps are timed."""
    torch.manual_seed(0)
    text = SMALL_TEXT | {"num_hidden_layers": 4}
    return BLIP_Pretrain(med_config=text, vit="small", image_size=224, queue_size=4096).train()


def step_seconds(rank: int, world_size: int) -> float:
    """Return the median time of a step in one of `world_size` processes."""
    model = wrap(small_model(), "ddp", torch.device("cpu"))
    images, texts = torch.randn(PAIRS, 3, 224, 224), word_texts(PAIRS)
    step = training_step(model, lambda m: m(images, texts, 0.4), plainly=False)
    step()
    return statistics.median(seconds(step) for _ in range(STEPS))


def link(rank: int, world_size: int, num_bytes: int) -> tuple[float, float]:
    """Return the time of an all-reduce of so many bytes, and the matrix rate while all processes compute."""
    block = torch.ones(num_bytes // 4)
    dist.all_reduce(block)
    taken = statistics.median(seconds(lambda: dist.all_reduce(block)) for _ in range(REPEATS))
    dist.barrier()
    return taken, matrix_rate("cpu", repeats=REPEATS)


def predicted_ratio(alone: float, reduced: float, slowdown: float) -> float:
    """Return the step of two processes over that of one: slower cores, and a sum that no idle core hides."""
    return (alone * slowdown + reduced) / alone


def decode_rates() -> dict[str, float]:
    """Return images a second on one core: as in pretraining, and as CapFilt reads them."""
    kinds = {"224 px": train_transform(224, 0.2, reduced_jpeg=True), "384 px": test_transform(384)}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), SCREEN)
        return {f"images/s a core, {name}": rate(kind.read, paths) for name, kind in kinds.items()}


def check() -> dict[str, float]:
    """Measure the inputs, predict, measure."""
    num_bytes = 4 * sum(p.numel() for p in small_model().parameters() if p.requires_grad)
    torch.set_num_threads(1)
    single, found = matrix_rate("cpu", repeats=REPEATS), decode_rates()
    (alone,) = run_in_processes(step_seconds, 1)
    links = run_in_processes(link, 2, num_bytes)
    reduced, both = max(time for time, _ in links), statistics.mean(rate for _, rate in links)
    together = max(run_in_processes(step_seconds, 2))
    predicted = predicted_ratio(alone, reduced, single / both)
    return found | {
        "gradients, MB": num_bytes / 1e6,
        "step of one process, s": alone,
        "all-reduce between two, s": reduced,
        "matrix rate of one core, GFLOP/s": single,
        "matrix rate a core while both compute, GFLOP/s": both,
        "step of two processes, s: predicted": predicted * alone,
        "step of two processes, s: measured": together,
        "ratio of two to one: predicted": predicted,
        "ratio of two to one: measured": together / alone,
        "prediction over measurement": predicted / (together / alone),
    }
