"""Result files, scores on the screen, and the report page that every script ends with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launch.run import Run
from models.precision import autocast
from report.page import write_report
from training.adapters import apply_adapters
from training.loop import compile_blocks, prepare_model
from utils import on_main_process


def evaluate_only(run: Run, config: Any, model: nn.Module, evaluate: Callable[[nn.Module], dict]) -> dict[str, Any]:
    """Evaluate a model as training would, and append the scores to evaluate.txt."""
    if not config.pretrained:
        run.note("these are scores of random weights: give --set pretrained=... to evaluate a checkpoint")
    if config.get("adapter_weights"):
        apply_adapters(model, config.adapter_weights)
    model = prepare_model(model, config, run).eval()
    if config.compile:
        compile_blocks(model)
    with torch.no_grad(), autocast(config.amp, run.device):
        scores = evaluate(model)
    run.log(scores, "evaluate.txt")
    return scores


def finish(run: Run, title: str, scores: dict[str, Any], images: Callable[[], list[dict[str, Any]]]) -> None:
    """Print the scores and write the report page."""
    scores = {name: value for name, value in scores.items() if name != "quality"}
    width = max((len(name) for name in scores), default=0)
    for name, value in scores.items():
        run.print(f"  {name.ljust(width)}  {value:.4g}")
    run.epoch = scores.get("epoch")
    page = on_main_process(lambda: _report(run, title, scores, images()))
    run.print(f"report: {page}")


def _report(run: Run, title: str, scores: dict[str, Any], images: list[dict[str, Any]]) -> str:
    log = run.read_log("curve.jsonl") + run.read_log()
    return str(write_report(run.output_dir, title, scores, log, images, run.notes))
