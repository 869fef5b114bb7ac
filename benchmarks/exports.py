"""The ONNX runner in float32 and int8 beside PyTorch in float32 and bfloat16: python -m benchmarks.exports

Each captions the same images, in turn, with the same number of tokens. Weights are random.
"""

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.case import BASE, Size
from benchmarks.inference_rows import BEAMS, LENGTH, build
from benchmarks.measure import machine, seconds
from benchmarks.results import table, write_section
from inference import load
from inference.onnx import OnnxModel
from inference.onnx_export import export_whole, quantize
from models.blip import BLIP_Decoder
from utils import run_command

IMAGES, REPEATS = 2, 3
SEARCH = {"num_beams": BEAMS, "max_length": LENGTH, "min_length": LENGTH}
TITLE = "Captions of exported models: `python -m benchmarks.exports`"
NAMES = ("PyTorch, float32", "PyTorch, bfloat16", "ONNX Runtime, float32", "ONNX Runtime, int8")
COLUMNS = ("", "s", "times as fast as PyTorch in float32", "MB")


def make_ways(size: Size, folder: Path) -> dict[str, tuple[Callable[[list[Any]], list[str]], float]]:
    """Return the ways to caption images, each with the bytes of its weights on disk."""
    checkpoint = folder / "captioner.pth"
    torch.save({"model": build(BLIP_Decoder, size, "cpu").state_dict(), "config": size.settings}, checkpoint)
    found = {}
    for name, amp in zip(NAMES[:2], ("", "bf16"), strict=True):
        model = load("caption", checkpoint, "cpu", amp)
        found[name] = (
            lambda images, model=model: [row["captions"][0]["caption"] for row in model.captions(images, **SEARCH)],
            checkpoint.stat().st_size,
        )
    export_whole(str(checkpoint), "caption", folder / NAMES[2])
    shutil.copytree(folder / NAMES[2], folder / NAMES[3])
    for graph in (folder / NAMES[3]).glob("*.onnx"):
        quantize(graph)
    for name in NAMES[2:]:
        runner = OnnxModel(folder / name, torch.get_num_threads())
        stored = sum(path.stat().st_size for path in (folder / name).iterdir())
        found[name] = (lambda images, runner=runner: runner.caption(images, **SEARCH)), stored
    return found


def measure(size: Size = BASE, repeats: int = REPEATS) -> str:
    """Time the ways in turn; return the table.

    Raises:
        AssertionError: captions in float32 differ.
    """
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, size.image_size, size.image_size, 3), np.uint8)
    images, times, captions = [Image.fromarray(pixels) for pixels in noise], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(size, Path(folder))
        for name, (caption, _) in ways.items():
            captions[name], times[name] = caption(images), []
        for _ in range(repeats):
            for name, (caption, _) in ways.items():
                times[name].append(seconds(lambda caption=caption: caption(images)))
    first, _, exported, _ = NAMES
    assert captions[first] == captions[exported], captions
    rows = []
    for name, (_, stored) in ways.items():
        ratios = [own / other for own, other in zip(times[first], times[name], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([name, f"{statistics.median(times[name]):.2f}", ratio, f"{stored / 1e6:.1f}"])
    return table(COLUMNS, rows)


def main() -> None:
    """Measure, print and write the table."""
    facts = ", ".join(f"{name} {value}" for name, value in machine("cpu").items())
    if hasattr(os, "getloadavg"):
        facts += f", load {os.getloadavg()[0]:.1f}"
    body = f"{IMAGES} images, beam {BEAMS}, {LENGTH} tokens, base, {REPEATS} rounds; {facts}.\n\n{measure()}"
    print(body)
    write_section(TITLE, body)


if __name__ == "__main__":
    sys.exit(run_command(main))
